"""What a call can fail with: one class per canonical status code, all with a reason and a remedy.

The server says why in `google.rpc.ErrorInfo` and which fields are at fault in `google.rpc.BadRequest`; both
travel in the trailing metadata `grpc-status-details-bin`. Only `UnavailableError` is worth retrying as it
stands, and the channel already does so (see `mooring._channel`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request and what is wrong with it."""

    field: str
    description: str


class MooringError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        message: what is wrong, in one sentence.
        reason: bounded machine-readable cause, a name of `mooring.v1.ErrorReason` without its prefix, or "".
        remedy: what to do about it, or "".
        fields: faulty fields of the request.
        metadata: short strings that belong to the reason (limits, found and expected values).
        code: gRPC status code, or None where no call was involved.
        retry_after: seconds after which the server invites another try, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        remedy: str = "",
        fields: Iterable[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        code: grpc.StatusCode | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.remedy = remedy
        self.fields = tuple(fields)
        self.metadata = dict(metadata or {})
        self.code = code
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class InvalidArgumentError(MooringError):
    """The request is wrong whatever the state of the server; `fields` says where."""


class OutOfRangeError(InvalidArgumentError):
    """A value lies outside its documented range."""


class NotFoundError(MooringError):
    """The resource does not exist, or belongs to somebody else: the two look the same."""


class AlreadyExistsError(MooringError):
    """The name is taken, or the request id was used for another request."""


class FailedPreconditionError(MooringError):
    """The request is right, but not in the present state (no photos yet, another base)."""


class PermissionDeniedError(MooringError):
    """The credential does not allow the call."""


class UnauthenticatedError(MooringError):
    """The credential is missing or not valid."""


class ResourceExhaustedError(MooringError):
    """A queue, a quota or the device's memory is full; `retry_after` says when to come back if known."""


class UnavailableError(MooringError):
    """The server is away or draining; retries of the channel were used up."""


class DeadlineExceededError(MooringError):
    """The call took longer than its timeout, or was refused early because it would."""


class CancelledError(MooringError):
    """The call or the job was cancelled."""


class InternalError(MooringError):
    """A defect of the server; its log has the details."""


class JobFailedError(MooringError):
    """A job ended without success; `job` is its resource name."""

    def __init__(self, message: str, *, job: str, reason: str = "", remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)
        self.job = job


_BY_CODE: dict[grpc.StatusCode, type[MooringError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: Any) -> MooringError:
    """Turn a `grpc.RpcError` of either API into a typed error.

    Args:
        error: what a stub raised; sync and asyncio calls both carry code, details and trailing metadata.
    """
    code = error.code()
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            status = status_pb2.Status.FromString(value)
    return _build(code, error.details() or code.name.lower(), status)


def from_status(status: status_pb2.Status) -> MooringError:
    """Turn a `google.rpc.Status` inside a message (of a job, of a batch) into a typed error."""
    return _build(_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN), status.message, status)


def _build(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> MooringError:
    found: dict[str, Any] = {}
    for packed in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        links = error_details_pb2.Help()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            metadata = dict(info.metadata)
            found["remedy"] = metadata.pop("remedy", "") or found.get("remedy", "")
            found["reason"] = info.reason.removeprefix("ERROR_REASON_")
            found["metadata"] = metadata
        elif packed.Unpack(bad):
            found["fields"] = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif packed.Unpack(links) and links.links:
            found["remedy"] = found.get("remedy") or links.links[0].description
        elif packed.Unpack(retry):
            found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
    remedy = found.get("remedy", "")
    # a server that writes "message remedy" into the status line must not make us say the remedy twice
    text = message.removesuffix(remedy).strip() if remedy else message
    return _BY_CODE.get(code, InternalError)(text or message, code=code, **found)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what a stub raises into a typed error."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
