"""The mark on an image that a model made: a signed C2PA manifest in the file.

It says that a trained model made the picture, with which software, when, from which base and adapters. It
does not say for whom or of what: no tenant, prompt or subject, and no digest of a prompt, which could be
guessed back. The manifest is a chunk of its own before the pixels' (`caBX`), so the pixels stay what they
were; its signature covers every other byte of the file.

C2PA rather than a watermark: see docs/provenance.md and docs/decisions.md. Left out: time stamps of a third
party, which would be a call to another host for every image.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import c2pa
from PIL import Image

from mooring_server.errors import MooringError, Reason
from mooring_server.provenance import identity
from mooring_server.provenance.identity import Identity
from mooring_server.provenance.verify import ORIGIN_LABEL, MarkState, examine
from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.provenance")

_PNG = "image/png"
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_SETTINGS = json.dumps(
    {
        "builder": {"thumbnail": {"enabled": False}},
        # what is signed is looked at once, when the identity is taken up; nothing is ever fetched
        "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
    }
)


@dataclass(frozen=True)
class Origin:
    """What made an image.

    Attributes:
        base: digest of the base model.
        adapters: digests of the adapters that acted on it.
        composite: the picture also shows what was not made by them, such as photos beside it.
    """

    base: str
    adapters: tuple[str, ...] = ()
    composite: bool = False


class Marker:
    """Marks PNG files; on any thread, but not on the engine's: it takes milliseconds.

    The files are looked at before each mark, so that a new certificate is taken up without a restart. A pair
    of which only one half has been replaced yet is not used: the old one signs until both are there.

    Args:
        certificate: PEM chain; None marks nothing: images are handed on as they are.
        key: PEM of its private key.
        version: of this software, which the mark names.
        observe: receives the seconds that each mark took.

    Raises:
        MooringError: INVALID_FIELD when the two cannot sign what C2PA's verifiers take.
    """

    def __init__(
        self,
        certificate: Path | None = None,
        key: Path | None = None,
        version: str = "",
        *,
        observe: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._version, self._observe = version, observe
        self._lock = threading.Lock()
        self._identity: Identity | None = None
        self._paths: tuple[Path, Path] | None = None
        if certificate is not None and key is not None:
            self._paths = certificate, key
            self._seen: object = None
            with contextlib.suppress(OSError):  # `load` says what is wrong
                self._seen = _stamps(*self._paths)
            self._identity = self._tried(identity.load(*self._paths))

    def expiry(self) -> float:
        """When the certificate ends, in seconds since the epoch; 0 without one."""
        return 0.0 if self._identity is None else self._identity.expires.timestamp()

    def mark(self, png: bytes, origin: Origin) -> bytes:
        """A PNG file with the mark, its pixels untouched.

        Raises:
            MooringError: INTERNAL when it cannot be signed, for example because the certificate has ended:
                nothing goes out without its mark unmentioned.
        """
        if self._paths is None:
            return png
        signer = self._newest(*self._paths)
        started = time.perf_counter()
        try:
            marked = self._sign(signer, png, origin)
        except c2pa.C2paError as error:
            log.exception("an image could not be marked")
            raise MooringError(
                Reason.INTERNAL,
                f"The image could not get its provenance mark: {error}.",
                remedy=f"The server's operator: replace {signer.names[0].name}, which ends {signer.expires}.",
            ) from error
        self._observe(time.perf_counter() - started)
        return marked

    def _newest(self, certificate: Path, key: Path) -> Identity:
        with self._lock:
            assert self._identity is not None
            with contextlib.suppress(OSError):  # a file that is being replaced
                stamps = _stamps(certificate, key)
                if stamps != self._seen:
                    try:
                        self._identity = self._tried(identity.load(certificate, key))
                    except MooringError as error:
                        log.warning("the new certificate cannot sign; the old one does", error=str(error))
                    else:
                        log.info("the certificate of the marks was replaced", expires=self._identity.expires)
                    self._seen = stamps
            return self._identity

    def _tried(self, signer: Identity) -> Identity:
        """An identity that has signed a picture which verifiers take. Raises INVALID_FIELD."""
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        try:
            found = examine(self._sign(signer, buffer.getvalue(), Origin("sha256:" + "0" * 64)))
        except c2pa.C2paError as error:
            raise signer.unusable(f"C2PA does not take the certificate ({error})") from error
        if found.state is not MarkState.VALID:
            raise signer.unusable(f"C2PA does not take the certificate ({', '.join(found.problems)})")
        return signer

    def _sign(self, signer: Identity, png: bytes, origin: Origin) -> bytes:
        # Objects of the library are not to be shared between threads: each mark has its own.
        secret = c2pa.C2paSignerInfo(signer.algorithm, signer.chain, signer.key, None)
        marked = io.BytesIO()
        with (
            c2pa.Context.from_json(_SETTINGS) as context,
            c2pa.Signer.from_info(secret) as pen,
            c2pa.Builder(self._manifest(origin), context) as builder,
        ):
            builder.sign(pen, _PNG, io.BytesIO(png), marked)
        return marked.getvalue()

    def _manifest(self, origin: Origin) -> dict[str, Any]:
        software = {"name": "Mooring", "version": self._version}
        source = "compositeWithTrainedAlgorithmicMedia" if origin.composite else "trainedAlgorithmicMedia"
        created = {
            "action": "c2pa.created",
            "when": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "softwareAgent": software,
            "digitalSourceType": _SOURCE_TYPES + source,
        }
        return {
            "claim_generator_info": [software],
            "format": _PNG,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {
                    "label": ORIGIN_LABEL,
                    "data": {"base": origin.base, "adapters": list(origin.adapters)},
                    "created": True,
                },
            ],
        }


def _stamps(*paths: Path) -> object:
    """What changes when a file is replaced, also when by a link to another one."""
    found = [os.stat(path) for path in paths]  # noqa: PTH116 - one call, links followed
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]
