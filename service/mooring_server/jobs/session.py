"""One claimed job while this process works on it.

Threads: the *engine* thread advances the job's generator and calls `report` and the checkpoint store's
`save`; both only leave a note and return, so that a slow disk or database never stalls a tick. The *job*
thread (`drive`) writes the notes down. A third one renews the lease, so that it holds through long pieces of
host work, and notices cancellation.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mooring_server.engine.policy import TaskClass
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.jobs.photos import encode_png
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import Document, Job, Lease
from mooring_server.storage.objects import ObjectStore, content_key
from mooring_server.storage.store import Store
from mooring_server.telemetry.traces import JobSpan, Tracing

log = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Pixels = NDArray[np.uint8]  # [H, W, 3]
MAX_PREVIEW_SIDE = 256
CHECKPOINTED_PHASE = "training"
_RETRY_SECONDS = 1.0


class Handle(Protocol[T_co]):
    """What the engine gives for a submitted generator."""

    def cancel(self) -> None:
        """Close the generator at the next tick."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the return value; raises what the generator raised."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when the generator has ended."""

    def done(self) -> bool:
        """Whether the generator has ended."""


class Submitter(Protocol):
    """The part of the engine that jobs use."""

    def submit(
        self, steps: Generator[None, None, T], klass: TaskClass, name: str, *, tenant: str = ""
    ) -> Handle[T]:
        """Run a generator, one `next` per tick."""


class SessionObserver(Protocol):
    """Receives a session's numbers. Telemetry implements it."""

    def job_step(self, kind: str, seconds: float) -> None:
        """A step of a training took so long; on the engine's thread."""

    def drew(self, steps: int) -> None:
        """A row of a batch job gave its image in so many steps."""

    def trained(self, drift: float, budget: float) -> None:
        """A training with a budget ended with that drift, both as shares of the base's guidance energy."""


class Stop(StrEnum):
    """Why a job must stop before its end."""

    CANCELLED = "cancelled"
    DRAINING = "draining"
    LEASE_LOST = "lease lost"


class StoppedError(Exception):
    """The job was stopped; `reason` says why."""

    def __init__(self, reason: Stop) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Timing:
    """Paces of a runner, in seconds.

    Attributes:
        lease: how long a claim holds without a heartbeat; a dead runner's job waits at most this long.
        poll: how often other processes' changes (new jobs, cancellation) are looked for.
        progress: least time between two progress events of a job.
    """

    lease: float = 30.0
    poll: float = 0.5
    progress: float = 0.5


class JobSession:
    """A claimed job, its lease and its notes.

    Use as a context manager: the lease is renewed inside the block.

    Args:
        store: where the job is.
        objects: where its checkpoint, previews and artifacts go, below `jobs/<job id>/`.
        engine: runs the generators.
        job: as claimed.
        timing: paces.
        observer: receives numbers.
        span: told the phases.
    """

    def __init__(
        self,
        store: Store,
        objects: ObjectStore,
        engine: Submitter,
        job: Job,
        timing: Timing,
        *,
        observer: SessionObserver | None = None,
        span: JobSpan | None = None,
    ) -> None:
        self.store, self.objects, self.job, self.observer = store, objects, job, observer
        self.span = span or Tracing().job(job.kind, job.job_id, job.attempts, None)
        self._told = time.monotonic()
        self._saved: float | None = None
        self._step = 0
        self._engine, self._timing = engine, timing
        self._folder = f"jobs/{job.job_id}"
        self._news = threading.Event()
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._stop: Stop | None = None
        self._handle: Handle[Any] | None = None
        self._progress: Document | None = None
        self._previews: list[tuple[int, int, Pixels]] = []
        self._checkpoint: bytes | None = None
        self._checkpoint_key = job.checkpoint_key
        self._loaded: bytes | None = None
        self._phase = ""
        self._drain_by: float | None = None
        self._phase_written = ""
        self._written = -math.inf
        self._heart = threading.Thread(target=self._beat, name=f"lease-{job.job_id[:8]}", daemon=True)
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._unsubscribe = self.store.subscribe(self._changed)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()
        self._ended.set()
        self._wake.set()
        self._heart.join()

    def stop(self, reason: Stop) -> None:
        """Tell the job to stop at its next tick; the first reason counts."""
        with self._lock:
            self._stop = self._stop or reason
            handle = self._handle
        if handle is not None:
            handle.cancel()

    def drain(self, grace_seconds: float) -> None:
        """Tell the job to stop; a training first gets to save its state, so that it loses no step.

        Args:
            grace_seconds: how long it may take to the end of its step.
        """
        with self._lock:
            grace = grace_seconds if self._phase == CHECKPOINTED_PHASE else 0.0
            self._drain_by = time.monotonic() + grace
        self._news.set()

    # -- called on the job's thread ------------------------------------------------------------------------

    def drive(self, steps: Generator[None, None, T], klass: TaskClass) -> T:
        """Run a generator on the engine to its end, writing down what it reports.

        Returns:
            Its return value.

        Raises:
            StoppedError: the job was stopped before the generator ended.
            Exception: whatever the generator raised.
        """
        self._loaded = self._fetch_checkpoint()
        handle = self._engine.submit(steps, klass, self.job.job_id, tenant=self.job.tenant)
        handle.add_done_callback(lambda _handle: self._news.set())
        with self._lock:
            self._handle = handle
        if self._stop is not None:
            handle.cancel()
        try:
            while not handle.done():
                self._news.wait(self._timing.poll)
                self._news.clear()
                self.write_notes()
                if self._drain_by is not None and time.monotonic() >= self._drain_by:
                    self.stop(Stop.DRAINING)
            self.write_notes(final=True)
            return self._result_of(handle)
        finally:
            handle.cancel()  # nothing when it has ended; else nobody would wait for what it makes
            with self._lock:
                self._handle = None

    def _fetch_checkpoint(self) -> bytes | None:
        """The job's last checkpoint, read before the engine's thread asks for it.

        One that is lost or damaged costs time, not the job: training is deterministic and starts anew.
        """
        key = self._checkpoint_key
        if key is None:
            return None
        try:
            return self.persist(lambda: self.objects.get(key))
        except KeyError:
            log.warning("job %s: its checkpoint is gone, starting anew", self.job.job_id)
        except MooringError as error:
            if error.reason is not Reason.OBJECT_DAMAGED:
                raise
            log.warning("job %s: its checkpoint is damaged, starting anew", self.job.job_id)
        return None

    def check(self) -> None:
        """Raise StoppedError once the job is to stop; for work that does not go through `drive`."""
        if self._drain_by is not None and time.monotonic() >= self._drain_by:
            self.stop(Stop.DRAINING)
        if self._stop is not None:
            raise StoppedError(self._stop)

    def write_notes(self, *, final: bool = False) -> None:
        """Write down what was reported, as far as it is due; `drive` does so by itself.

        Args:
            final: whether it is due in any case.
        """
        with self._lock:
            checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None and self._stop not in {Stop.CANCELLED, Stop.LEASE_LOST}:
            self._write_checkpoint(checkpoint)
        with self._lock:
            progress, previews = self._progress, self._previews
            due = time.monotonic() - self._written >= self._timing.progress
            new_phase = progress is not None and progress.get("phase") != self._phase_written
            if progress is None or not (final or due or previews or new_phase):
                return
            self._progress, self._previews = None, []
        self._written, self._phase_written = time.monotonic(), str(progress.get("phase"))

        def write() -> None:
            pictures = [self._put_preview(step, index, pixels) for step, index, pixels in previews]
            payload = finite(progress) | {"previews": pictures}
            self.store.append_event(*self._claim, kind="progress", payload=payload)

        self._while_leased(write, "progress")

    def put_artifact(self, filename: str, media_type: str, data: bytes) -> Document:
        """Store a file of the job; returns its description for the job's result."""
        stem, _, suffix = filename.rpartition(".")
        key = content_key(f"{self._folder}/artifacts/{stem}", data, suffix)
        self.persist(lambda: self.objects.put(key, data))
        return {
            "filename": filename,
            "media_type": media_type,
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "object_key": key,
        }

    def persist(self, write: Callable[[], T]) -> T:
        """Do what the job cannot go on without: while the store is away, try again until the job is stopped.

        Raises:
            LeaseLostError: the job is no longer this runner's.
            StoppedError: it was stopped while the store was away.
        """
        while True:
            try:
                return write()
            except StorageUnavailableError as error:
                log.warning("job %s: trying again: %s", self.job.job_id, error.message)
            time.sleep(_RETRY_SECONDS)
            if self._stop is not None:
                raise StoppedError(self._stop)

    # -- called on the engine's thread ---------------------------------------------------------------------

    def report(self, progress: Document, previews: Sequence[Pixels] = ()) -> None:
        """Note the newest progress; previews are kept until they are written, progress only if newest."""
        step = int(progress.get("step", 0))
        self._note_pace(step, str(progress.get("phase")))
        self.span.phase(str(progress.get("phase")))
        with self._lock:
            self._progress, self._phase = progress, str(progress.get("phase"))
            self._previews += [(step, index, pixels) for index, pixels in enumerate(previews)]
        if previews or progress.get("phase") != self._phase_written:
            self._news.set()

    def ages(self) -> tuple[float, float | None]:
        """Seconds since the last progress and the last checkpoint (before it: since the steps began)."""
        now, saved = time.monotonic(), self._saved
        return now - self._told, None if saved is None else now - saved

    def _note_pace(self, step: int, phase: str) -> None:
        now = time.monotonic()
        if phase == CHECKPOINTED_PHASE:
            done = step - self._step
            if self._phase == phase and done > 0 and self.observer is not None:
                for _ in range(done):
                    self.observer.job_step(self.job.kind, (now - self._told) / done)
            self._saved = self._saved or now
        else:
            self._saved = None  # what comes after the steps is not saved, and short
        self._step, self._told = step, now

    def load(self) -> bytes | None:
        """The job's last checkpoint (training's CheckpointStore)."""
        return self._loaded

    def save(self, data: bytes) -> None:
        """Note a checkpoint (training's CheckpointStore); the newest one is written soon after."""
        with self._lock:
            self._checkpoint = data
        self._news.set()
        if self._drain_by is not None:
            self.stop(Stop.DRAINING)

    def wanted(self) -> bool:
        """Whether to save after this step, whatever its number (training's CheckpointStore): on a drain."""
        return self._drain_by is not None

    # -- the rest ------------------------------------------------------------------------------------------

    def forget_checkpoint(self) -> None:
        """Remove the checkpoint of a job that has ended; what stays behind is collected as garbage."""
        if self._checkpoint_key is not None:
            self._discard(self._checkpoint_key)

    def _discard(self, key: str) -> None:
        try:
            self.objects.delete(key)
        except StorageUnavailableError as error:
            log.warning("job %s: an old checkpoint stays behind: %s", self.job.job_id, error.message)

    def _result_of(self, handle: Handle[T]) -> T:
        try:
            result = handle.result(0)
        except Exception:
            # A generator that was closed ends in the engine's own way of saying "cancelled".
            if self._stop is not None:
                raise StoppedError(self._stop) from None
            raise
        if self._stop in {Stop.CANCELLED, Stop.LEASE_LOST}:
            raise StoppedError(self._stop)
        return result

    def _write_checkpoint(self, data: bytes) -> None:
        # Under a key of this claim's own: a runner that lost the lease cannot touch its successor's.
        def write() -> None:
            stem = f"{self._folder}/checkpoint-{self.job.lease[:8]}"
            key = content_key(stem, data, "safetensors")
            self.objects.put(key, data)
            before = self.store.note_checkpoint(*self._claim, key)
            self._checkpoint_key = key
            if before is not None and before != key:
                self._discard(before)
            self._saved = None if self._saved is None else time.monotonic()

        self._while_leased(write, "checkpoint")

    def _while_leased(self, write: Callable[[], object], what: str) -> None:
        """Do a write that the job can do without, such as progress."""
        try:
            write()
        except LeaseLostError:
            self.stop(Stop.LEASE_LOST)
        except (StorageUnavailableError, OSError):
            log.warning("job %s: could not write its %s", self.job.job_id, what, exc_info=True)

    def _put_preview(self, step: int, index: int, pixels: Pixels) -> Document:
        image = Image.fromarray(np.asarray(pixels))
        image.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
        data = encode_png(image)
        key = content_key(f"{self._folder}/previews/{step:06d}-{index}", data, "png")
        self.objects.put(key, data)
        return {"index": index, "object_key": key, "width": image.width, "height": image.height}

    @property
    def _claim(self) -> tuple[str, str, str]:
        return self.job.tenant, self.job.job_id, self.job.lease

    def _changed(self, tenant: str, job_id: str) -> None:
        if (tenant, job_id) == (self.job.tenant, self.job.job_id):
            self._wake.set()

    def _beat(self) -> None:
        """Look at the job at every change and every `poll` seconds; renew its lease in good time."""
        renewed = time.monotonic()
        while not self._ended.is_set():
            try:
                if time.monotonic() - renewed >= self._timing.lease / 3:
                    lease = self.store.heartbeat(*self._claim, self._timing.lease)
                    renewed = time.monotonic()
                else:
                    lease = self._look()
                if lease is Lease.LOST and not self._ended.is_set():
                    self.stop(Stop.LEASE_LOST)
                elif lease is Lease.CANCEL_REQUESTED:
                    self.stop(Stop.CANCELLED)
            except StorageUnavailableError:
                pass  # the lease may outlive that
            except Exception:  # nor may any other fault end the renewals
                log.exception("job %s: its lease could not be renewed", self.job.job_id)
            self._wake.wait(min(self._timing.poll, self._timing.lease / 3))
            self._wake.clear()

    def _look(self) -> Lease:
        job = self.store.get_job(self.job.tenant, self.job.job_id)
        if job.lease != self.job.lease:
            return Lease.LOST
        return Lease.CANCEL_REQUESTED if job.cancel_requested else Lease.HELD


def finite(document: Document) -> Document:
    """The document with None in place of NaN and infinities, which JSON cannot say."""

    def clean(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    cleaned: Document = clean(document)
    return cleaned
