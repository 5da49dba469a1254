"""The records the store hands out: plain frozen dataclasses, no SQL.

Times are seconds since the Unix epoch (UTC) as floats; a `digest` is ``sha256:<64 hex>``; documents
(`rights`, `spec`, `certificate`, …) are JSON objects as Python dicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

Document: TypeAlias = dict[str, Any]


class JobState(StrEnum):
    """States of a job: PENDING → RUNNING → one of the three final ones.

    RUNNING goes back to PENDING when its runner hands the job back (drain).
    """

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """Whether the job can never change again."""
        return self in FINAL_STATES


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Lease(StrEnum):
    """What a heartbeat learns."""

    HELD = "HELD"
    CANCEL_REQUESTED = "CANCEL_REQUESTED"
    LOST = "LOST"


@dataclass(frozen=True)
class Subject:
    """One thing to learn, as its tenant declared it."""

    tenant: str
    subject_id: str
    uid: str
    """Server-made id: the only part of a subject that ever becomes part of a storage path."""
    display_name: str
    class_noun: str
    placeholder: str
    rights: Document
    photo_count: int
    create_time: float


@dataclass(frozen=True)
class NewPhoto:
    """A photo that was checked, re-encoded and put into the object store, about to get its row.

    `sha256` (64 hex digits) and `size_bytes` are of the file as uploaded; `width` and `height` of the stored
    picture.
    """

    filename: str
    sha256: str
    object_key: str
    width: int
    height: int
    size_bytes: int


@dataclass(frozen=True)
class Photo:
    """A stored photo; `position` is its place in upload order, which training follows."""

    tenant: str
    subject_id: str
    position: int
    filename: str
    sha256: str
    object_key: str
    width: int
    height: int
    size_bytes: int
    create_time: float


@dataclass(frozen=True)
class Job:
    """A long piece of work.

    Attributes:
        spec: what was asked for; immutable.
        progress: payload of the newest progress event, without its previews.
        result: what a SUCCEEDED job made.
        error: ``{"reason", "message", "remedy"}`` of a FAILED job.
        last_event: sequence number of the newest event, 0 when there is none.
        checkpoint_key: where the newest checkpoint is; None before the first.
        attempts: how often a runner claimed the job.
        crashes: runners lost since the last checkpoint; the job fails when they become too many.
        worker, lease, lease_expires: who runs it, the fencing token of that claim, and until when.
        traceparent: the span of the call that made it, in W3C form, which every runner's span links to; None
            where nothing was traced.
    """

    tenant: str
    job_id: str
    kind: str
    spec: Document
    state: JobState
    cancel_requested: bool
    progress: Document | None
    result: Document | None
    error: Document | None
    last_event: int
    attempts: int
    crashes: int
    worker: str
    lease: str
    lease_expires: float | None
    create_time: float
    update_time: float
    start_time: float | None
    end_time: float | None
    checkpoint_key: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True)
class JobEvent:
    """One entry of a job's history: `seq` counts 1, 2, 3, … without gaps within a job.

    `kind` is "state" (payload ``{"state", "result"?, "error"?}``) or "progress" (see `jobs.progress`).
    """

    tenant: str
    job_id: str
    seq: int
    kind: str
    payload: Document
    time: float


@dataclass(frozen=True)
class DoneRow:
    """A row of a batch job that is done.

    Attributes:
        row: its number, that of its line in the file, from 1.
        position: the how-manyth row of the job that was done, from 1 without gaps.
        record: its line of the manifest.
    """

    row: int
    position: int
    record: Document


@dataclass(frozen=True)
class Adapter:
    """One immutable version of an adapter."""

    tenant: str
    adapter_id: str
    version: int
    object_key: str
    digest: str
    base_digest: str
    rank: int
    size_bytes: int
    subject_id: str
    job_id: str
    class_noun: str
    placeholder: str
    rights: Document
    certificate: Document
    summary: Document
    create_time: float
    delete_time: float | None

    @property
    def name(self) -> str:
        """``<adapter_id>@<version>``."""
        return f"{self.adapter_id}@{self.version}"


class Verdict(StrEnum):
    """How the gate decided about a version that was to be published."""

    PASSED = "PASSED"
    REFUSED = "REFUSED"
    WARNED = "WARNED"
    NOT_CHECKED = "NOT_CHECKED"


@dataclass(frozen=True)
class Judgement:
    """What the gate found, before it is written down: its verdict, its checks and the complete policy."""

    verdict: Verdict
    checks: list[Document]
    policy: Document
    evaluation_job_id: str


@dataclass(frozen=True)
class GateDecision:
    """A judgement as it was written down; never changed afterwards."""

    tenant: str
    decision_id: str
    adapter_id: str
    version: int
    digest: str
    base_digest: str
    alias: str
    verdict: Verdict
    checks: list[Document]
    policy: Document
    policy_revision: int
    evaluation_job_id: str
    actor: str
    create_time: float


@dataclass(frozen=True)
class GatePolicyRow:
    """A tenant's gate policy; `policy` is None while nobody has changed the default."""

    tenant: str
    revision: int
    policy: Document | None
    actor: str
    update_time: float | None


@dataclass(frozen=True)
class Alias:
    """Where an alias points, and where a rollback would take it (None: nowhere)."""

    tenant: str
    adapter_id: str
    alias: str
    version: int
    digest: str
    previous_version: int | None
    update_time: float
    actor: str


class MoveKind(StrEnum):
    """What moved an alias."""

    PUBLISH = "PUBLISH"
    ROLL_BACK = "ROLL_BACK"
    DELETE = "DELETE"


@dataclass(frozen=True)
class AliasMove:
    """One entry of an alias's history; a version of None is "points nowhere"."""

    tenant: str
    adapter_id: str
    alias: str
    kind: MoveKind
    version: int | None
    previous_version: int | None
    decision_id: str
    actor: str
    create_time: float
