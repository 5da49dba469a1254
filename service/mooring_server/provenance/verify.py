"""What an image's mark says, and whether it holds.

Any C2PA verifier answers the same; this one also reads which base and adapters Mooring names. Two questions
are kept apart: whether the file is as it was signed, and whether the signer is one that the caller trusts.
Without trust anchors the second is not answered: everybody can sign a mark that says "Mooring".
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import c2pa

ORIGIN_LABEL = "dev.mooring.origin"
"""Of the assertion with the digests of base and adapters."""
_UNTRUSTED = "signingCredential.untrusted"
_TRUSTED = "signingCredential.trusted"
_CHANGED = (".mismatch", ".missing")
"""Ends of the failure codes that say that something is not what was signed."""


class MarkState(StrEnum):
    """What became of a mark."""

    VALID = "valid"
    TAMPERED = "tampered"
    INVALID = "invalid"
    NONE = "no mark"


@dataclass(frozen=True)
class Finding:
    """What was found in a file.

    Everything but `state`, `trusted` and `problems` is what the mark claims: it is worth as much as they are.

    Attributes:
        state: valid; tampered: picture or mark is not as it was signed; invalid: the mark cannot be used,
            for example because its certificate has ended; no mark.
        trusted: whether an anchor vouches for the signer; None when there were none to ask.
        generator: software that made the claim, with its version.
        signer: organisation and name of the certificate.
        time: when the picture was made, by the signer's clock (RFC 3339).
        source: IPTC digital source type, its last part: trainedAlgorithmicMedia.
        base: digest of the base model.
        adapters: digests of the adapters.
        problems: C2PA's failure codes, or why the file cannot be read.
    """

    state: MarkState
    trusted: bool | None = None
    generator: str = ""
    signer: str = ""
    time: str = ""
    source: str = ""
    base: str = ""
    adapters: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def examine(data: bytes, anchors: str = "") -> Finding:
    """Read and check the mark of a picture.

    Args:
        data: the whole file.
        anchors: PEM of the authorities to trust. Nothing is fetched.
    """
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if anchors:
        settings["trust"] = {"trust_anchors": anchors}
    try:
        with (
            c2pa.Context.from_json(json.dumps(settings)) as context,
            c2pa.Reader(None, io.BytesIO(data), context=context) as reader,
        ):
            document: dict[str, Any] = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Finding(MarkState.NONE)
    except c2pa.C2paError as error:
        return Finding(MarkState.INVALID, problems=(str(error),))
    manifest = document["manifests"].get(document.get("active_manifest", ""), {})
    results = document.get("validation_results", {}).get("activeManifest", {})
    failures = _codes(results.get("failure", ()))
    problems = tuple(code for code in failures if code != _UNTRUSTED)
    if not problems:
        # the library's own verdict too, so that a rule it adds is not overlooked
        state = MarkState.INVALID if document.get("validation_state") == "Invalid" else MarkState.VALID
    else:
        state = MarkState.TAMPERED if any(c.endswith(_CHANGED) for c in problems) else MarkState.INVALID
    trusted = _TRUSTED in _codes(results.get("success", ())) if anchors else None
    return Finding(state, trusted, **_claimed(manifest), problems=problems)


def _codes(statuses: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(status.get("code", "")) for status in statuses))


def _claimed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says; whatever has another form than expected is left out."""
    signature = _object(manifest.get("signature_info"))
    software = _object(next(iter(_list(manifest.get("claim_generator_info"))), None))
    found: dict[str, Any] = {
        "generator": f"{software.get('name', '')} {software.get('version', '')}".strip(),
        "signer": ", ".join(str(signature[k]) for k in ("issuer", "common_name") if signature.get(k)),
    }
    for assertion in _list(manifest.get("assertions")):
        label, content = str(_object(assertion).get("label", "")), _object(_object(assertion).get("data"))
        if label.startswith("c2pa.actions"):
            for action in map(_object, _list(content.get("actions"))):
                if action.get("action") == "c2pa.created":
                    found["time"] = str(action.get("when", ""))
                    found["source"] = str(action.get("digitalSourceType", "")).rpartition("/")[2]
        elif label == ORIGIN_LABEL:
            found["base"] = str(content.get("base", ""))
            found["adapters"] = tuple(str(digest) for digest in _list(content.get("adapters")))
    return found


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []
