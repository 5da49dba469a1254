"""Typed errors of every layer below the gRPC edge.

One exception class with a *bounded* reason (mirrored by the proto enum `mooring.v1.ErrorReason`), so that
storage, engine, training and evaluation can say precisely what is wrong without knowing gRPC. `rpc/status.py`
maps them to a status with `google.rpc.ErrorInfo`; the CLI prints message and remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """The canonical gRPC status codes this service answers with."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    CANCELLED = "CANCELLED"
    ABORTED = "ABORTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class Reason(StrEnum):
    """Machine-readable causes; each has exactly one status code (see `REASON_CODE`)."""

    INVALID_FIELD = "INVALID_FIELD"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    UNKNOWN_PLACEHOLDER = "UNKNOWN_PLACEHOLDER"
    STEPS_OUT_OF_RANGE = "STEPS_OUT_OF_RANGE"
    SIZE_NOT_SUPPORTED = "SIZE_NOT_SUPPORTED"
    BAD_RESOURCE_NAME = "BAD_RESOURCE_NAME"
    BAD_PAGE_TOKEN = "BAD_PAGE_TOKEN"  # noqa: S105 - a reason, not a secret
    BAD_IMAGE = "BAD_IMAGE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    RIGHTS_REQUIRED = "RIGHTS_REQUIRED"
    SUBJECT_NOT_FOUND = "SUBJECT_NOT_FOUND"
    SUBJECT_HAS_NO_PHOTOS = "SUBJECT_HAS_NO_PHOTOS"
    TOO_MANY_PHOTOS = "TOO_MANY_PHOTOS"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    ADAPTER_IN_USE = "ADAPTER_IN_USE"
    ADAPTER_KEYS_UNMATCHED = "ADAPTER_KEYS_UNMATCHED"
    ADAPTER_NOT_FINITE = "ADAPTER_NOT_FINITE"
    ADAPTER_RANK_TOO_LARGE = "ADAPTER_RANK_TOO_LARGE"
    ADAPTER_TOO_LARGE = "ADAPTER_TOO_LARGE"
    ADAPTER_NOT_SUPPORTED = "ADAPTER_NOT_SUPPORTED"
    BASE_DIGEST_MISMATCH = "BASE_DIGEST_MISMATCH"
    BASE_NOT_USABLE = "BASE_NOT_USABLE"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    JOB_NOT_CANCELLABLE = "JOB_NOT_CANCELLABLE"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    TRAINING_DIVERGED = "TRAINING_DIVERGED"
    CHECKPOINT_NOT_USABLE = "CHECKPOINT_NOT_USABLE"
    JOB_HAS_NO_RESULT = "JOB_HAS_NO_RESULT"
    ARTIFACT_NOT_FOUND = "ARTIFACT_NOT_FOUND"
    JUDGES_NOT_AVAILABLE = "JUDGES_NOT_AVAILABLE"
    QUEUE_FULL = "QUEUE_FULL"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    NOT_ALLOWED = "NOT_ALLOWED"
    NOT_AUTHENTICATED = "NOT_AUTHENTICATED"
    IDENTITY_UNAVAILABLE = "IDENTITY_UNAVAILABLE"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DRAINING = "DRAINING"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    GATE_REFUSED = "GATE_REFUSED"
    GATE_NEEDS_EVALUATION = "GATE_NEEDS_EVALUATION"
    ALIAS_NOT_FOUND = "ALIAS_NOT_FOUND"
    NOTHING_TO_ROLL_BACK = "NOTHING_TO_ROLL_BACK"
    TRAINING_NOT_ALLOWED = "TRAINING_NOT_ALLOWED"
    BATCH_NOT_VALID = "BATCH_NOT_VALID"
    BATCH_TOO_LARGE = "BATCH_TOO_LARGE"
    PROMPT_REFUSED = "PROMPT_REFUSED"
    IMAGE_WITHHELD = "IMAGE_WITHHELD"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    OBJECT_DAMAGED = "OBJECT_DAMAGED"
    INTERNAL = "INTERNAL"


_INVALID = (
    "INVALID_FIELD EMPTY_PROMPT PROMPT_TOO_LONG UNKNOWN_PLACEHOLDER SIZE_NOT_SUPPORTED BAD_RESOURCE_NAME "
    "BAD_PAGE_TOKEN BAD_IMAGE IMAGE_TOO_LARGE DIGEST_MISMATCH RIGHTS_REQUIRED ADAPTER_KEYS_UNMATCHED "
    "ADAPTER_NOT_FINITE ADAPTER_RANK_TOO_LARGE ADAPTER_TOO_LARGE ADAPTER_NOT_SUPPORTED TRAINING_NOT_ALLOWED "
    "BATCH_NOT_VALID BATCH_TOO_LARGE PROMPT_REFUSED"
)
_PRECONDITION = (
    "SUBJECT_HAS_NO_PHOTOS TOO_MANY_PHOTOS ADAPTER_IN_USE BASE_DIGEST_MISMATCH BASE_NOT_USABLE "
    "JOB_NOT_CANCELLABLE JOB_HAS_NO_RESULT TRAINING_DIVERGED CHECKPOINT_NOT_USABLE JUDGES_NOT_AVAILABLE "
    "GATE_REFUSED GATE_NEEDS_EVALUATION NOTHING_TO_ROLL_BACK "
    "IMAGE_WITHHELD"
)
REASON_CODE: dict[Reason, Code] = {
    **{Reason(name): Code.INVALID_ARGUMENT for name in _INVALID.split()},
    **{Reason(name): Code.FAILED_PRECONDITION for name in _PRECONDITION.split()},
    Reason.STEPS_OUT_OF_RANGE: Code.OUT_OF_RANGE,
    Reason.SUBJECT_NOT_FOUND: Code.NOT_FOUND,
    Reason.ADAPTER_NOT_FOUND: Code.NOT_FOUND,
    Reason.ALIAS_NOT_FOUND: Code.NOT_FOUND,
    Reason.JOB_NOT_FOUND: Code.NOT_FOUND,
    Reason.ARTIFACT_NOT_FOUND: Code.NOT_FOUND,
    Reason.REQUEST_ID_REUSED: Code.ALREADY_EXISTS,
    Reason.ALREADY_EXISTS: Code.ALREADY_EXISTS,
    Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.OUT_OF_MEMORY: Code.RESOURCE_EXHAUSTED,
    Reason.QUOTA_EXCEEDED: Code.RESOURCE_EXHAUSTED,
    Reason.NOT_ALLOWED: Code.PERMISSION_DENIED,
    Reason.NOT_AUTHENTICATED: Code.UNAUTHENTICATED,
    Reason.IDENTITY_UNAVAILABLE: Code.UNAVAILABLE,
    Reason.CANCELLED: Code.CANCELLED,
    Reason.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    Reason.DRAINING: Code.UNAVAILABLE,
    Reason.STORAGE_UNAVAILABLE: Code.UNAVAILABLE,
    Reason.OBJECT_DAMAGED: Code.DATA_LOSS,
    Reason.INTERNAL: Code.INTERNAL,
}


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request and what is wrong with it (becomes `BadRequest.FieldViolation`)."""

    field: str
    description: str


class MooringError(Exception):
    """What a caller did or met, with its reason, a remedy and the request's faulty fields.

    Args:
        reason: bounded cause; decides the status code.
        message: what is wrong, in one sentence, naming the offending value.
        remedy: what to do about it; shown after the message.
        metadata: short strings for `ErrorInfo.metadata` (limits, found and expected values).
        fields: field violations for INVALID_ARGUMENT.
        retry_after: seconds after which a repeat may succeed; `math.inf` says that none will before something
            else changes; None leaves it to the reason.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        remedy: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.reason = reason
        self.message = message
        self.remedy = remedy
        self.metadata = dict(metadata or {})
        self.fields = tuple(fields)
        self.retry_after = retry_after

    @property
    def code(self) -> Code:
        """The canonical status code that belongs to the reason."""
        return REASON_CODE[self.reason]


_QUOTA_REMEDIES = {
    "requests_per_second": "Call less often; the answer says when to go on.",
    "concurrent_calls": "Wait for calls to end, or end streams that are not needed.",
    "queue_depth": "Wait for earlier requests, or send them as one GenerateBatch.",
    "concurrent_jobs": "Wait for a job to end, or cancel one.",
    "adapters": "Delete adapter versions that are not needed.",
    "stored_bytes": "Delete subjects or adapter versions that are not needed.",
    "device_seconds_per_day": "Go on after midnight UTC.",
}


def quota_exceeded(cause: str, *, limit: float, used: float, retry_after: float) -> MooringError:
    """A tenant asked for more than its share.

    Args:
        cause: which limit, a field of `config.Quota`.
        limit: its value.
        used: how much of it is used.
        retry_after: as in `MooringError`.
    """
    return MooringError(
        Reason.QUOTA_EXCEEDED,
        f"The tenant's limit of {limit:g} for {cause} is reached.",
        remedy=_QUOTA_REMEDIES[cause],
        metadata={"cause": cause, "scope": "tenant", "limit": f"{limit:g}", "used": f"{used:g}"},
        retry_after=retry_after,
    )


class StorageUnavailableError(MooringError):
    """The database or the objects cannot be used just now: repeating later is right.

    Args:
        what: which of them, and how it fails, as a sentence that any caller may read.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            Reason.STORAGE_UNAVAILABLE,
            what,
            remedy="Repeat in a few seconds; if it lasts, the server's log has the cause.",
        )
