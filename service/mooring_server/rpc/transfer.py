"""Files in streams: a header, then chunks. Receiving (upload) and sending (export, artifacts)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping

from mooring.v1 import media_pb2

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.rpc.images import CHUNK_BYTES, pieces

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPES: Mapping[str, str] = {
    "safetensors": "application/octet-stream",
    "txt": "text/plain",
    "json": "application/json",
    "html": "text/html",
    "png": "image/png",
}


def header_of(filename: str, data: bytes, media_type: str = "") -> media_pb2.FileHeader:
    """Announce a file."""
    guessed = _MEDIA_TYPES.get(filename.rpartition(".")[2], "application/octet-stream")
    return media_pb2.FileHeader(
        filename=filename,
        media_type=media_type or guessed,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def chunks(data: bytes) -> Iterator[bytes]:
    """A file's bytes in pieces of at most 1 MiB."""
    for _, piece in pieces(data):
        yield piece


class IncomingFile:
    """One file being received.

    Args:
        header: as announced.
        index: position in the stream, for messages.
        max_bytes: larger files are read to their end and dropped, so that others' errors are found too.
        too_large: makes the error of such a file from its size and the limit.

    Raises:
        MooringError: INVALID_FIELD for a header that announces nothing usable.
    """

    def __init__(
        self,
        header: media_pb2.FileHeader,
        index: int,
        max_bytes: int,
        *,
        too_large: Callable[[int, int], MooringError] | None = None,
    ) -> None:
        self.index = index
        self.header = header
        self._data = bytearray()
        self._received = 0
        self._keep = header.size_bytes <= max_bytes
        self._max_bytes = max_bytes
        self._too_large = too_large or self._photo_too_large
        problems = [
            FieldViolation(f"files[{index}].{field}", text)
            for field, text, wrong in (
                ("filename", "must have 1 to 255 bytes", not 1 <= len(header.filename.encode()) <= 255),
                ("size_bytes", "must be larger than 0", header.size_bytes <= 0),
                ("sha256", "must be 64 lower-case hex digits", not _SHA256.fullmatch(header.sha256)),
            )
            if wrong
        ]
        if problems:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"The header of file {index} is not usable: "
                + "; ".join(f"{p.field} {p.description}" for p in problems),
                fields=problems,
            )

    @property
    def held_bytes(self) -> int:
        """What it takes of memory."""
        return len(self._data)

    def add(self, chunk: bytes) -> None:
        """Take the next bytes. Raises INVALID_FIELD for an empty or oversized chunk."""
        if not 1 <= len(chunk) <= CHUNK_BYTES:
            problem = f"must have 1 to {CHUNK_BYTES} bytes, not {len(chunk)}"
            raise MooringError(
                Reason.INVALID_FIELD, f"chunk {problem}.", fields=[FieldViolation("chunk", problem)]
            )
        self._received += len(chunk)
        if self._keep and self._received <= self.header.size_bytes:
            self._data += chunk

    def finish(self) -> bytes:
        """The file. Blocking for as long as it takes to hash it.

        Raises:
            MooringError: IMAGE_TOO_LARGE (or what `too_large` makes), DIGEST_MISMATCH when it is not what
                was announced.
        """
        name = self.header.filename
        if not self._keep:
            raise self._too_large(self.header.size_bytes, self._max_bytes)
        if self._received != self.header.size_bytes:
            raise MooringError(
                Reason.DIGEST_MISMATCH,
                f"{name!r} was announced with {self.header.size_bytes} bytes and {self._received} came.",
                remedy="Upload it again.",
            )
        data = bytes(self._data)
        if hashlib.sha256(data).hexdigest() != self.header.sha256:
            raise MooringError(
                Reason.DIGEST_MISMATCH,
                f"The bytes of {name!r} do not have the announced SHA-256.",
                remedy="The file changed on the way, or the digest is of another file: upload it again.",
            )
        return data

    def _photo_too_large(self, size: int, limit: int) -> MooringError:
        return MooringError(
            Reason.IMAGE_TOO_LARGE,
            f"{self.header.filename!r} has {size} bytes; at most {limit} are taken.",
            remedy="Save it smaller, for example as a JPEG of 2,000 px.",
        )
