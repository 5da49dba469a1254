"""Messages between server and decoder: a JSON object and some bytes, with both sizes before them.

No pickle: what comes back is from a process that hostile bytes may have taken over, and is checked like any
other input from outside.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

_SIZES = struct.Struct(">II")
MAX_HEADER_BYTES = 64 * 1024


class FrameError(Exception):
    """The other side ended, or sent something that is no message."""


def write_frame(stream: IO[bytes], header: dict[str, Any], body: bytes = b"") -> None:
    """Send one message. Raises OSError when the other side is gone."""
    text = json.dumps(header).encode()
    stream.write(_SIZES.pack(len(text), len(body)) + text)
    stream.write(body)
    stream.flush()


def read_frame(stream: IO[bytes], *, max_body: int) -> tuple[dict[str, Any], bytes]:
    """Receive one message.

    Args:
        stream: where from.
        max_body: a larger body is refused before anything of it is read.

    Raises:
        FrameError: see there.
    """
    head_size, body_size = _SIZES.unpack(_exactly(stream, _SIZES.size))
    if head_size > MAX_HEADER_BYTES or body_size > max_body:
        raise FrameError("a message is too long")
    try:
        header = json.loads(_exactly(stream, head_size))
    except ValueError:
        raise FrameError("a message is not JSON") from None
    if not isinstance(header, dict):
        raise FrameError("a message is not a JSON object")
    return header, _exactly(stream, body_size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise FrameError("the other side ended")
    return data
