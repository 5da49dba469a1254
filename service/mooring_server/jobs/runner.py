"""The job runner: claims jobs, runs them to their end, and hands them back when the server stops.

One thread per kind of job, so that an evaluation never waits behind a long training, and several for
batches: a short one does not wait for a long one, and the engine shares its time among their tenants. What
happens on each way out: done → SUCCEEDED; a typed error, out of memory or a fault → FAILED with reason,
message and remedy; cancelled → CANCELLED; the server stops → back to PENDING, to be resumed from the
checkpoint; the process dies → the lease expires, and the next claim, here or on another replica, resumes
from the checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.model import BaseModel
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.evaluation.config import NEW_SCENES
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.prompts import GENERIC_PROMPTS, PromptSets
from mooring_server.jobs.batch_job import BatchJob, Drawer, Loader
from mooring_server.jobs.evaluate_job import EvaluateJob
from mooring_server.jobs.session import JobSession, SessionObserver, Stop, StoppedError, Submitter, Timing
from mooring_server.jobs.train_job import TrainJob
from mooring_server.provenance.marks import Marker
from mooring_server.safety.policy import SafetyPolicy
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import Document, Job, JobState
from mooring_server.storage.objects import ObjectStore
from mooring_server.storage.store import Store
from mooring_server.telemetry.traces import Tracing

log = logging.getLogger(__name__)

BATCHES_AT_A_TIME = 4
_BUSY = {Reason.QUEUE_FULL, Reason.DRAINING, Reason.STORAGE_UNAVAILABLE}


class JobWork(Protocol):
    """How one kind of job is done."""

    def run(self, session: JobSession) -> None:
        """Do the whole job, including its end; see `TrainJob.run`."""


class RunnerObserver(SessionObserver, Protocol):
    """Receives the runner's numbers, on its threads. Telemetry implements it."""

    def job_claimed(self, kind: str, *, resumed: bool) -> None:
        """A job was claimed, for the first time or again."""

    def job_ended(self, kind: str, outcome: str, seconds: float) -> None:
        """This runner is done with a job: a final state's name, "DRAINING" or "LEASE_LOST"."""


@dataclass(frozen=True)
class RunnerSettings:
    """What a runner is told.

    Attributes:
        worker: shown as the runner of a job.
        lease_seconds: a dead runner's job is taken over after at most this long.
        poll_seconds: how often other processes' changes are looked for.
        progress_seconds: least time between two progress events of a job.
        drain_seconds: how long a training may take to the end of its step when the server stops.
        prompts: what is drawn and measured with where a job names nothing.
    """

    worker: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    lease_seconds: float = 30.0
    poll_seconds: float = 0.5
    progress_seconds: float = 0.5
    drain_seconds: float = 10.0
    prompts: PromptSets = field(default_factory=lambda: PromptSets.of(NEW_SCENES, GENERIC_PROMPTS))


class JobRunner:
    """Runs this process's share of the jobs.

    Args:
        store: the queue.
        objects: photos, checkpoints, adapters.
        engine: runs the device work.
        base: the resident base.
        bank: its bank.
        judges: None where none are configured: evaluations then fail with JUDGES_NOT_AVAILABLE.
        settings: paces and prompts.
        observer: receives numbers.
        drawer: draws the rows of batches; the engine again.
        adapters: loads what they use. Without both, batches are left to other runners.
        safety: what is checked of their prompts and images; None for nothing.
        marker: signs into pictures where they come from; None leaves them unmarked.
        tracing: makes a span of each job that is run; None for none.
    """

    def __init__(
        self,
        store: Store,
        objects: ObjectStore,
        engine: Submitter,
        base: BaseModel,
        bank: AdapterBank,
        judges: Judges | None,
        settings: RunnerSettings | None = None,
        *,
        observer: RunnerObserver | None = None,
        drawer: Drawer | None = None,
        adapters: Loader | None = None,
        safety: SafetyPolicy | None = None,
        marker: Marker | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        marker = marker or Marker()
        self._store, self._objects, self._engine = store, objects, engine
        self._settings = settings = settings or RunnerSettings()
        self._observer = observer
        self._tracing = tracing or Tracing()
        self._timing = Timing(settings.lease_seconds, settings.poll_seconds, settings.progress_seconds)
        self._works: dict[str, JobWork] = {
            "train": TrainJob(base, bank, settings.prompts.steering),
            "evaluate": EvaluateJob(base, bank, judges, settings.prompts, marker),
        }
        if drawer is not None and adapters is not None:
            self._works["batch"] = BatchJob(base, drawer, adapters, safety or SafetyPolicy(), marker)
        self._wakes = {kind: threading.Event() for kind in self._works}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._sessions: set[JobSession] = set()
        self._threads: list[threading.Thread] = []
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to claim jobs, also those whose runners died."""
        self._unsubscribe = self._store.subscribe(lambda _tenant, _job_id: self._wake())
        self._threads = [
            threading.Thread(target=self._claim, args=[kind], name=f"jobs-{kind}", daemon=True)
            for kind in self._works
            for _ in range(BATCHES_AT_A_TIME if kind == "batch" else 1)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Claim nothing more, save the running jobs' states and hand them back. Call before `Engine.close`.

        Args:
            timeout: how long to wait, in seconds; a job that takes longer is resumed when its lease ends.
        """
        with self._lock:
            self._stopping.set()
            sessions = list(self._sessions)
        for session in sessions:
            session.drain(self._settings.drain_seconds)
        self._wake()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._unsubscribe()

    def ages(self) -> list[tuple[str, float, float | None]]:
        """Kind, seconds since the last progress and since the last checkpoint of each job run here.

        The last is None for a job that has nothing to save yet, or never has.
        """
        with self._lock:
            return [(session.job.kind, *session.ages()) for session in self._sessions]

    def _wake(self) -> None:
        for wake in self._wakes.values():
            wake.set()

    def _claim(self, kind: str) -> None:
        while not self._stopping.is_set():
            ran = False
            try:
                job = self._store.claim_job(self._settings.worker, self._settings.lease_seconds, kinds=[kind])
                ran = job is not None and self._run(job)
            except StorageUnavailableError as error:
                log.warning("looking for jobs again soon: %s", error.message)
            except Exception:
                # A thread that ended here would leave a server that takes jobs and never runs one.
                log.exception("looking for jobs again soon")
            if not ran:
                self._wakes[kind].wait(self._settings.poll_seconds)
                self._wakes[kind].clear()

    def _run(self, job: Job) -> bool:
        """Run a claimed job; False when it was handed back because the engine is busy or the store away."""
        started, observer = time.monotonic(), self._observer
        if observer is not None:
            observer.job_claimed(job.kind, resumed=job.attempts > 1)
        log.info("job %s (%s) claimed, attempt %d", job.job_id, job.kind, job.attempts)
        span = self._tracing.job(job.kind, job.job_id, job.attempts, job.traceparent)
        outcome = "LEASE_LOST"  # of a fault that `_outcome` does not know
        try:
            with JobSession(
                self._store, self._objects, self._engine, job, self._timing, observer=observer, span=span
            ) as session:
                with self._lock:
                    self._sessions.add(session)
                    draining = self._stopping.is_set()
                if draining:
                    session.drain(0.0)
                try:
                    outcome = self._outcome(session)
                finally:
                    with self._lock:
                        self._sessions.discard(session)
        finally:
            span.end(outcome)
        log.info("job %s: %s after %.1f s", job.job_id, outcome, time.monotonic() - started)
        if observer is not None:
            observer.job_ended(job.kind, outcome, time.monotonic() - started)
        return outcome not in {Reason.QUEUE_FULL, Reason.STORAGE_UNAVAILABLE}

    def _outcome(self, session: JobSession) -> str:
        job = session.job
        try:
            ending, error = self._attempt(session)
            if error is not None:
                session.span.failed(str(error["reason"]))
            if ending is JobState.PENDING:
                session.persist(lambda: self._store.release_job(job.tenant, job.job_id, job.lease))
                return "DRAINING" if error is None else str(error["reason"])
            if ending is not JobState.SUCCEEDED:
                session.persist(
                    lambda: self._store.finish_job(job.tenant, job.job_id, job.lease, ending, error=error)
                )
            session.forget_checkpoint()
        except (LeaseLostError, StoppedError):
            return "LEASE_LOST"
        except Exception:
            # Nothing could be written down: the lease runs out and the job is taken up again.
            log.exception("job %s: its end could not be recorded", job.job_id)
            return "LEASE_LOST"
        return str(ending)

    def _attempt(self, session: JobSession) -> tuple[JobState, Document | None]:
        """Do the work; returns how the job is to be ended (PENDING: handed back) and why."""
        job = session.job
        try:
            self._works[job.kind].run(session)
        except StoppedError as stopped:
            if stopped.reason is Stop.LEASE_LOST:
                raise
            return (JobState.CANCELLED if stopped.reason is Stop.CANCELLED else JobState.PENDING), None
        except LeaseLostError:
            raise
        except MooringError as error:
            document = {"reason": str(error.reason), "message": error.message, "remedy": error.remedy}
            return (JobState.PENDING if error.reason in _BUSY else JobState.FAILED), document
        except (MemoryError, torch.OutOfMemoryError):
            log.exception("job %s: out of memory", job.job_id)
            return JobState.FAILED, {
                "reason": str(Reason.OUT_OF_MEMORY),
                "message": "The device ran out of memory.",
                "remedy": "Lower batch_size or rank, or use a server with more memory.",
            }
        except Exception as error:
            log.exception("job %s failed", job.job_id)
            return JobState.FAILED, {
                "reason": str(Reason.INTERNAL),
                "message": f"The job met a fault of the server: {type(error).__name__}.",
                "remedy": f"Look for {job.job_id} in the server's log.",
            }
        return JobState.SUCCEEDED, None
