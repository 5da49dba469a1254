"""Typed errors as gRPC statuses with details, and as `google.rpc.Status` messages inside jobs and batches.

Details travel in a trailing header, and peers drop calls whose headers exceed 8 KiB, so what a caller or an
input can make long is cut here: by its bytes, which are up to four a character in the details and, percent-
encoded, up to twelve in the status message. What is no text (a lone surrogate from a JSON file) is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from mooring_server.errors import Code, FieldViolation, MooringError, Reason

DOMAIN = "mooring"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_DETAILS_BYTES = 4096
_MAX_MESSAGE = 600
_MAX_TEXT = 300
_RETRY_MILLISECONDS: Mapping[Reason, int] = {
    Reason.DRAINING: 1000,
    Reason.QUEUE_FULL: 2000,
    Reason.STORAGE_UNAVAILABLE: 2000,
    Reason.IDENTITY_UNAVAILABLE: 2000,
}
_NEVER = -1
"""As push-back: do not repeat the call."""

_CODES = {code: grpc.StatusCode[code.value] for code in Code}

Metadata = tuple[tuple[str, str | bytes], ...]


def grpc_code(error: MooringError) -> grpc.StatusCode:
    """The status code of an error."""
    return _CODES[error.code]


def to_status(error: MooringError, request_id: str = "") -> status_pb2.Status:
    """The whole error as one message: code, text, ErrorInfo, BadRequest, RetryInfo.

    Args:
        error: what went wrong.
        request_id: of the failing call, repeated in ErrorInfo so that it can be found in the log.
    """
    metadata = {_clip(key, _MAX_TEXT): _clip(value, _MAX_TEXT) for key, value in error.metadata.items()}
    if error.code is Code.RESOURCE_EXHAUSTED:
        metadata.setdefault("scope", "server")
    if error.remedy:
        metadata["remedy"] = _clip(error.remedy, _MAX_TEXT)
    if request_id:
        metadata["request_id"] = request_id
    status = status_pb2.Status(code=grpc_code(error).value[0], message=_clip(str(error), _MAX_MESSAGE))
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata)
    status.details.append(_pack(info))
    delay = _pushback(error)
    if delay is not None and delay != _NEVER:
        pause = duration_pb2.Duration()
        pause.FromMilliseconds(delay)
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=pause)))
    if error.fields:
        status.details.append(_pack(_bad_request(error.fields, MAX_DETAILS_BYTES - status.ByteSize())))
    return status


def trailing_metadata(error: MooringError, request_id: str) -> Metadata:
    """What goes beside the status code: the details, and how long to wait before a repeat."""
    metadata: list[tuple[str, str | bytes]] = [
        (DETAILS_KEY, to_status(error, request_id).SerializeToString()),
        ("x-request-id", request_id),
    ]
    delay = _pushback(error)
    if delay is not None:
        metadata.append((PUSHBACK_KEY, str(delay)))
    return tuple(metadata)


def _pushback(error: MooringError) -> int | None:
    """Milliseconds until a repeat makes sense, rounded up; None when nothing is known."""
    if error.retry_after is None:
        return _RETRY_MILLISECONDS.get(error.reason)
    return _NEVER if math.isinf(error.retry_after) else math.ceil(error.retry_after * 1000)


def message_of(error: MooringError) -> str:
    """The status message: what is wrong, then what to do."""
    return _clip(str(error), _MAX_MESSAGE)


def _bad_request(fields: tuple[FieldViolation, ...], room: int) -> error_details_pb2.BadRequest:
    bad = error_details_pb2.BadRequest()
    for index, violation in enumerate(fields):
        bad.field_violations.add(
            field=_clip(violation.field, _MAX_TEXT), description=_clip(violation.description, _MAX_TEXT)
        )
        if index and bad.ByteSize() > room - 100:
            del bad.field_violations[-1]
            bad.field_violations.add(field="…", description=f"and {len(fields) - index} more")
            break
    return bad


def _pack(message: error_details_pb2.ErrorInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _clip(text: str, limit: int) -> str:
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"
