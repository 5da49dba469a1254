"""A batch job: pinned rows → an image each, and a manifest.

Rows are drawn in the engine's batch class, a window of them at a time, in the order of the file as far as the
engine's choices allow. A row is done when its image is stored and then its record is committed under the
job's lease; a run that is taken up again draws the rows without a record, from their own seeds, and so ends
with the pixels of a run that was never interrupted.

A row that cannot be drawn (its adapter was deleted, the device has too little memory) is done with an error
and the others go on. The job itself fails only for what concerns every row: another base.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from PIL import Image

from mooring_server.engine.adapters import AdapterWeights
from mooring_server.engine.model import BaseModel
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import AdapterUse, GenerationEvent, GenerationRequest, ImageReady
from mooring_server.engine.timeline import RequestTrace
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.jobs.batch_rows import (
    MANIFEST,
    PinnedRow,
    dump_manifest,
    dump_rows,
    error_document,
    filename_of,
    image_key,
    load_rows,
    manifest_of,
    rows_stem,
)
from mooring_server.jobs.photos import encode_png
from mooring_server.jobs.session import Handle, JobSession, Pixels
from mooring_server.provenance.marks import Marker, Origin
from mooring_server.safety.policy import SafetyPolicy, Verdict, refusal, withheld
from mooring_server.storage.database import new_id
from mooring_server.storage.models import Adapter, Document, DoneRow, Job, JobState
from mooring_server.storage.objects import ObjectStore, content_key, first_written
from mooring_server.storage.store import Store
from mooring_server.telemetry.traces import UNTRACED_ROW, RowSpan

log = logging.getLogger(__name__)

WINDOW = 16
"""Rows of one job that are with the engine at a time."""
_AGAIN_SECONDS = 0.2
_NOT_THE_ROWS = {Reason.QUEUE_FULL, Reason.DRAINING, Reason.CANCELLED}


class Drawer(Protocol):
    """The part of the engine that draws."""

    def generate(
        self,
        request: GenerationRequest,
        on_event: Callable[[GenerationEvent], None],
        *,
        klass: TaskClass,
        tenant: str,
        trace: RequestTrace | None = None,
    ) -> Handle[None]:
        """Make images; see `Engine.generate`."""


class Loader(Protocol):
    """Where adapters are loaded."""

    def get(self, adapter: Adapter) -> AdapterWeights:
        """The adapter; blocking."""


@dataclass(eq=False)
class _Drawing:
    """A row that is with the engine."""

    row: PinnedRow
    images: list[Pixels] = field(default_factory=list)
    handle: Handle[None] | None = None
    verdicts: tuple[Verdict, ...] = ()
    span: RowSpan = UNTRACED_ROW

    def on_event(self, event: GenerationEvent) -> None:
        if isinstance(event, ImageReady):
            self.images.append(event.image)


def queue_batch(
    store: Store,
    objects: ObjectStore,
    tenant: str,
    rows: Sequence[PinnedRow],
    spec: Document,
    *,
    request_id: str = "",
    traceparent: str | None = None,
    audited: Sequence[Document] = (),
    asked: Document | None = None,
) -> Job:
    """Store the rows, then queue the job that draws them.

    Args:
        store: where the job goes.
        objects: where the rows go.
        tenant: whose it is.
        rows: complete, in the order of the file.
        spec: as `BatchJob` says.
        request_id: makes the call idempotent.
        traceparent: the calling span, in W3C form.
        audited: what the audit log says of the rows once their job exists; see `Audit.record_all`.
        asked: see `Jobs.create_job`.

    Raises:
        MooringError: REQUEST_ID_REUSED, QUOTA_EXCEEDED: nothing was stored. STORAGE_UNAVAILABLE.
    """
    job_id = new_id()
    data = dump_rows(rows)
    key = content_key(rows_stem(job_id), data, "jsonl")
    objects.put(key, data)
    try:
        job = store.create_job(
            tenant,
            "batch",
            spec,
            request_id=request_id,
            job_id=job_id,
            objects=[key],
            traceparent=traceparent,
            asked=asked,
        )
    except StorageUnavailableError:  # the job may be there: rows that nobody draws are collected as garbage
        raise
    except MooringError:  # refused, so no job has these rows
        objects.delete(key)
        raise
    if job.job_id != job_id:  # the same request was answered before
        objects.delete(key)
    else:
        store.record_all(tenant, "Generate", audited)
    return job


class BatchJob:
    """Runs jobs with spec ``{"base_digest", "rows", "sha256", "filename", "size_bytes", "adapters"}``.

    Args:
        base: the resident base.
        engine: draws.
        adapters: loads them.
        safety: what is checked of prompts and images.
        marker: signs into images where they come from.
    """

    def __init__(
        self, base: BaseModel, engine: Drawer, adapters: Loader, safety: SafetyPolicy, marker: Marker
    ) -> None:
        self._base, self._engine, self._adapters = base, engine, adapters
        self.safety, self.marker = safety, marker

    def run(self, session: JobSession) -> None:
        """Draw what is missing, write the manifest and finish the job.

        Raises:
            MooringError: BASE_DIGEST_MISMATCH, OBJECT_DAMAGED.
            StoppedError: the job was stopped.
            LeaseLostError: another runner has it.
        """
        job, store = session.job, session.store
        expected = job.spec["base_digest"]
        if expected != self._base.digest:
            raise MooringError(
                Reason.BASE_DIGEST_MISMATCH,
                f"The batch was made for base {expected}, this server runs {self._base.digest}.",
                remedy="Serve that base, or submit the file again.",
                metadata={"expected": expected, "found": self._base.digest},
            )
        rows = _pinned_rows(session)
        records = {done.row: done.record for done in _all_done(session)}
        _Run(self, session, rows, records).to_the_end()
        session.span.phase("publishing")
        manifest = session.persist(
            lambda: session.put_artifact(MANIFEST, "application/jsonl", dump_manifest(list(records.values())))
        )
        failed = sum("error" in record for record in records.values())
        result: Document = {
            "artifacts": [manifest],
            "images": len(records) - failed,
            "failed": failed,
            "manifest_digest": f"sha256:{manifest['sha256']}",
        }
        session.persist(
            lambda: store.finish_job(job.tenant, job.job_id, job.lease, JobState.SUCCEEDED, result=result)
        )

    def submit(self, session: JobSession, drawing: _Drawing) -> None:
        """Hand a row to the engine. Raises what is wrong with it, and QUEUE_FULL."""
        row, tenant, began = drawing.row, session.job.tenant, time.time_ns()
        # again, after submission: the policy may have become stricter since
        drawing.verdicts = self.safety.require_prompts(tenant, [("prompt", row.prompt)])
        uses = []
        for pinned in row.adapters:
            record = session.store.get_adapter(tenant, pinned.adapter, pinned.version)
            uses.append(AdapterUse(self._adapters.get(record), pinned.scale))
        request = GenerationRequest(
            prompt=row.prompt,
            negative_prompt=row.negative_prompt,
            adapters=tuple(uses),
            steps=row.steps,
            guidance_scale=row.guidance_scale,
            width=row.width,
            height=row.height,
            seed=row.seed,
            sampler=row.sampler,
        )
        # begun where the engine takes it: a try that finds the queue full leaves no span
        span = session.span.row(row.row, began)
        drawing.handle = self._engine.generate(
            request, drawing.on_event, klass=TaskClass.BATCH, tenant=tenant, trace=span.trace
        )
        drawing.span = span

    @property
    def base_digest(self) -> str:
        """Of the resident base."""
        return self._base.digest


class _Run:
    """One runner's work on one job, all on the job's thread.

    Args:
        work: what draws.
        session: the claimed job.
        rows: of the job.
        records: manifest records of the rows that are done, by row; grows.
    """

    def __init__(
        self, work: BatchJob, session: JobSession, rows: Sequence[PinnedRow], records: dict[int, Document]
    ) -> None:
        self._work, self._session, self._records = work, session, records
        self._total = len(rows)
        self._waiting = deque(row for row in rows if row.row not in records)
        self._drawing: set[_Drawing] = set()
        self._ended: queue.SimpleQueue[_Drawing] = queue.SimpleQueue()
        self._done_before = len(records)
        self._failed = sum("error" in record for record in records.values())
        self._started = time.monotonic()

    def to_the_end(self) -> None:
        """Draw and record every row that waits. Raises StoppedError, LeaseLostError."""
        self._report()
        try:
            while self._waiting or self._drawing:
                self._session.check()
                self._fill()
                try:
                    drawing = self._ended.get(timeout=_AGAIN_SECONDS)
                except queue.Empty:
                    continue
                self._take(drawing)
                self._drawing.discard(drawing)
                self._report()
        finally:
            for drawing in self._drawing:
                if drawing.handle is not None:
                    drawing.handle.cancel()
                drawing.span.end("put back")

    def _fill(self) -> None:
        while self._waiting and len(self._drawing) < WINDOW:
            drawing, began = _Drawing(self._waiting.popleft()), time.time_ns()
            try:
                self._session.persist(partial(self._work.submit, self._session, drawing))
            except MooringError as error:
                if error.reason in _NOT_THE_ROWS:  # its turn comes again, or the job is stopped
                    self._waiting.appendleft(drawing.row)
                    return
                drawing.span = self._session.span.row(drawing.row.row, began)
                self._record_error(drawing, error)
                self._report()
                continue
            assert drawing.handle is not None
            self._drawing.add(drawing)
            drawing.handle.add_done_callback(partial(self._end, drawing))

    def _end(self, drawing: _Drawing, _handle: object) -> None:
        """Called on the engine's thread."""
        self._ended.put(drawing)

    def _take(self, drawing: _Drawing) -> None:
        row, handle = drawing.row, drawing.handle
        assert handle is not None
        try:
            handle.result(0)
        except MooringError as error:
            if error.reason in _NOT_THE_ROWS:
                self._waiting.appendleft(row)
                drawing.span.end("put back", error.reason.value)
            else:
                self._record_error(drawing, error)
            return
        except Exception as error:
            log.exception("job %s, row %d failed", self._session.job.job_id, row.row)
            fault = MooringError(
                Reason.INTERNAL,
                f"The row met a fault of the server: {type(error).__name__}.",
                remedy=f"Look for row {row.row} in the server's log.",
            )
            self._record_error(drawing, fault)
            return
        try:
            verdicts = self._work.safety.judge_image(self._session.job.tenant, drawing.images[0])
        except MooringError as error:
            self._record_error(drawing, error)
            return
        drawing.verdicts += verdicts
        refused = refusal(verdicts)
        if refused is not None:
            self._record_error(drawing, withheld(refused), drawing.verdicts)
        else:
            self._record_image(drawing)

    def _record_image(self, drawing: _Drawing) -> None:
        row, pixels, began = drawing.row, drawing.images[0], time.time_ns()
        origin = Origin(self._work.base_digest, tuple(use.digest for use in row.adapters))
        # A run that is taken up again signs anew: other bytes, the same pixels. The record says which count.
        data = self._work.marker.mark(encode_png(Image.fromarray(pixels)), origin)
        drawing.span.stage("encode", began)
        sha256 = hashlib.sha256(data).hexdigest()
        key = image_key(self._session.job.job_id, row.row, sha256)
        began = time.time_ns()
        self._session.persist(lambda: self._session.objects.put(key, data))
        image = {
            "file": filename_of(row.row),
            "sha256": sha256,
            "size_bytes": len(data),
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        }
        self._record(row, image | _told(drawing.verdicts))
        drawing.span.stage("store", began)
        if self._session.observer is not None:
            self._session.observer.drew(row.steps)
        drawing.span.end("drawn")

    def _record_error(self, drawing: _Drawing, error: MooringError, verdicts: Sequence[Verdict] = ()) -> None:
        self._failed += 1
        self._record(drawing.row, {"error": error_document(error)} | _told(verdicts))
        drawing.span.end("failed", error.reason.value)

    def _record(self, row: PinnedRow, outcome: Document) -> None:
        session, job = self._session, self._session.job
        record = manifest_of(row, self._work.base_digest) | outcome
        done = session.persist(
            lambda: session.store.add_batch_row(job.tenant, job.job_id, job.lease, row.row, record)
        )
        self._records[row.row] = done.record

    def _report(self) -> None:
        done = len(self._records)
        here = done - self._done_before
        left = (time.monotonic() - self._started) / here * (self._total - done) if here else None
        self._session.report(
            {
                "phase": "drawing",
                "step": done,
                "steps": self._total,
                "seconds_left": left,
                "failed_rows": self._failed,
            }
        )
        self._session.write_notes(final=done == self._total)


def _told(verdicts: Sequence[Verdict]) -> Document:
    """The verdicts as the manifest has them; nothing where nothing was checked."""
    return {"safety": [verdict.to_json() for verdict in verdicts]} if verdicts else {}


def _pinned_rows(session: JobSession) -> list[PinnedRow]:
    written = first_written(session.objects, rows_stem(session.job.job_id))
    if written is None:
        raise MooringError(
            Reason.OBJECT_DAMAGED,
            "The rows of the batch are gone from the store.",
            remedy="Submit the file again.",
        )
    return load_rows(written)


def _all_done(session: JobSession) -> list[DoneRow]:
    job = session.job
    found: list[DoneRow] = []
    while True:
        after = found[-1].position if found else 0
        page = session.persist(partial(session.store.batch_rows, job.tenant, job.job_id, after=after))
        if not page:
            return found
        found += page
