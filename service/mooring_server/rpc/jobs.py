"""JobService."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from functools import partial

from mooring.v1 import job_pb2 as pb
from mooring.v1 import job_pb2_grpc, media_pb2

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.batch_rows import image_key, row_of
from mooring_server.rpc import caller, convert, names, transfer
from mooring_server.rpc.edge import Context
from mooring_server.rpc.runtime import Provide, Runtime, require_no_drain
from mooring_server.rpc.times import timestamp
from mooring_server.storage.models import Document, DoneRow, Job, JobEvent, JobState

WATCH_POLL_SECONDS = 1.0
"""How often a watcher looks for changes that another process made; our own wake it at once."""

_EVENTS_AT_A_TIME = 100


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Jobs over the store.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        self._runtime = runtime

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """See the contract."""
        del context
        return pb.GetJobResponse(job=convert.job(await self._job(request.name)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent, anywhere=caller.anywhere())
        _check_enum(pb.JobKind, request.kind, "kind")
        _check_enum(pb.JobState, request.state, "state")
        state = pb.JobState.Name(request.state).removeprefix("JOB_STATE_")
        records, token = await asyncio.to_thread(
            self._runtime().store.list_jobs,
            tenant,
            kinds=[kind for kind, value in convert.KINDS.items() if value == request.kind],
            states=[JobState(state)] if request.state else [],
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListJobsResponse(jobs=[convert.job(record) for record in records], next_page_token=token)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        """See the contract."""
        del context
        where = names.resolve_job(caller.tenant(), request.name, anywhere=caller.anywhere())
        record = await asyncio.to_thread(self._runtime().store.request_cancel, where.tenant, where.id)
        return pb.CancelJobResponse(job=convert.job(record))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """See the contract."""
        del context
        runtime = self._runtime()
        if request.after_sequence < 0:
            raise _invalid("after_sequence", f"must not be negative, not {request.after_sequence}")
        where = names.resolve_job(caller.tenant(), request.name)
        sequence, told_end = request.after_sequence, False
        with _news_of(runtime, where) as news:
            while True:
                # The job is read before its events: one that has ended by then gets no event after these.
                job = await asyncio.to_thread(runtime.store.get_job, where.tenant, where.id)
                events = await asyncio.to_thread(
                    partial(runtime.store.events, after=sequence, limit=_EVENTS_AT_A_TIME),
                    where.tenant,
                    where.id,
                )
                for event in events:
                    message = await asyncio.to_thread(_event, runtime, job, event)
                    sequence = event.seq
                    told_end = event.kind == "state" and JobState(event.payload["state"]).final
                    yield message
                if events:
                    continue
                if job.state.final:
                    if not told_end:
                        yield pb.WatchJobResponse(
                            sequence=job.last_event,
                            event_time=timestamp(job.update_time),
                            job=convert.job(job),
                        )
                    return
                require_no_drain(runtime.gate)
                await _either(news, runtime.gate.draining, WATCH_POLL_SECONDS)
                news.clear()

    async def GetEvaluation(
        self, request: pb.GetEvaluationRequest, context: Context
    ) -> pb.GetEvaluationResponse:
        """See the contract."""
        del context
        job = await self._job(request.name)
        key = _result(job).get("evaluation")
        if key is None:
            raise MooringError(
                Reason.JOB_HAS_NO_RESULT,
                f"Job {job.job_id!r} is a {job.kind} job: it has no evaluation.",
                remedy="Name a job that Evaluate made.",
            )
        runtime = self._runtime()
        return await runtime.long.run(caller.tenant(), _evaluation, runtime, job, key)

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """See the contract."""
        del context
        job = await self._job(request.name)
        image = await asyncio.to_thread(_batch_image, self._runtime(), job, request.filename)
        artifacts = {} if image else {item["filename"]: item for item in _result(job).get("artifacts", ())}
        found = image or artifacts.get(request.filename)
        if found is None:
            some = ", ".join(list(artifacts)[:5]) or "none"
            raise MooringError(
                Reason.ARTIFACT_NOT_FOUND,
                f"Job {job.job_id!r} made no file {request.filename[:100]!r}.",
                remedy=f"It made {len(artifacts)} files: {some}{', …' if len(artifacts) > 5 else ''}.",
            )
        runtime, tenant = self._runtime(), caller.tenant()
        with runtime.held.call(tenant) as hold:
            header, data = await runtime.long.run(tenant, _artifact, runtime, found)
            hold(len(data))
            await self._audited(job, "DownloadArtifact", f"jobs/{job.job_id}/{found['filename']}")
            yield pb.DownloadArtifactResponse(file=header)
            for chunk in transfer.chunks(data):
                yield pb.DownloadArtifactResponse(chunk=chunk)

    async def DownloadBatch(
        self, request: pb.DownloadBatchRequest, context: Context
    ) -> AsyncIterator[pb.DownloadBatchResponse]:
        """See the contract."""
        del context
        runtime = self._runtime()
        if request.after_position < 0:
            raise _invalid("after_position", f"must not be negative, not {request.after_position}")
        job, position = await self._job(request.name), request.after_position
        if job.kind != "batch":
            raise MooringError(
                Reason.JOB_HAS_NO_RESULT,
                f"Job {job.job_id!r} is a {job.kind} job: it has no rows.",
                remedy="Name a job that RunBatch made.",
            )
        await self._audited(job, "DownloadBatch", f"jobs/{job.job_id}")
        where = names.Resolved(job.tenant, job.job_id)
        with _news_of(runtime, where) as news:
            while True:
                # The job is read before its rows: one that has ended by then gets no row after these.
                job = await asyncio.to_thread(runtime.store.get_job, where.tenant, where.id)
                rows = await asyncio.to_thread(
                    partial(runtime.store.batch_rows, after=position, limit=_EVENTS_AT_A_TIME),
                    where.tenant,
                    where.id,
                )
                for row in rows:
                    data = await runtime.long.run(job.tenant, _row_image, runtime, job, row)
                    yield pb.DownloadBatchResponse(row=convert.batch_row(row, job.spec["rows"], data))
                    for chunk in transfer.chunks(data):
                        yield pb.DownloadBatchResponse(chunk=chunk)
                    position = row.position
                if rows:
                    continue
                if job.state.final:
                    return
                require_no_drain(runtime.gate)
                await _either(news, runtime.gate.draining, WATCH_POLL_SECONDS)
                news.clear()

    async def _audited(self, job: Job, what: str, resource: str) -> None:
        record = partial(self._runtime().store.record, job.tenant, what, resource, decision="allowed")
        await asyncio.to_thread(record)

    async def _job(self, name: str) -> Job:
        where = names.resolve_job(caller.tenant(), name, anywhere=caller.anywhere())
        return await asyncio.to_thread(self._runtime().store.get_job, where.tenant, where.id)


def _event(runtime: Runtime, job: Job, event: JobEvent) -> pb.WatchJobResponse:
    message = pb.WatchJobResponse(sequence=event.seq, event_time=timestamp(event.time))
    if event.kind == "state":
        # `job` was read before the event: read it again when the event is newer than what we know.
        if event.seq > job.last_event:
            job = runtime.store.get_job(job.tenant, job.job_id)
        message.job.CopyFrom(convert.job_at(job, event))
    else:
        message.progress.CopyFrom(convert.progress(event.payload, runtime.objects.get))
    return message


def _result(job: Job) -> Document:
    if job.result is None:
        raise MooringError(
            Reason.JOB_HAS_NO_RESULT,
            f"Job {job.job_id!r} is {job.state.lower()}: it has made nothing.",
            remedy="Watch it until it has succeeded." if not job.state.final else "Start a new job.",
        )
    return job.result


def _batch_image(runtime: Runtime, job: Job, filename: str) -> Document | None:
    """An image of a batch job in the form of an artifact; None for any other file."""
    row = row_of(filename) if job.kind == "batch" else None
    done = None if row is None else runtime.store.batch_row(job.tenant, job.job_id, row)
    if done is None or "sha256" not in done.record:
        return None
    key = image_key(job.job_id, done.row, done.record["sha256"])
    return {"filename": filename, "media_type": "image/png", "object_key": key}


def _row_image(runtime: Runtime, job: Job, row: DoneRow) -> bytes:
    """The bytes of a done row's image; none for a row with an error."""
    sha256 = row.record.get("sha256")
    return _stored(runtime, image_key(job.job_id, row.row, sha256)) if sha256 else b""


def _artifact(runtime: Runtime, found: Document) -> tuple[media_pb2.FileHeader, bytes]:
    data = _stored(runtime, found["object_key"])
    return transfer.header_of(found["filename"], data, found["media_type"]), data


def _evaluation(runtime: Runtime, job: Job, key: str) -> pb.GetEvaluationResponse:
    content: Document = json.loads(_stored(runtime, key))
    return pb.GetEvaluationResponse(evaluation=convert.evaluation(job, content))


def _stored(runtime: Runtime, key: str) -> bytes:
    try:
        return runtime.objects.get(key)
    except KeyError:
        days = runtime.settings.gc_result_days
        raise MooringError(
            Reason.ARTIFACT_NOT_FOUND,
            f"The job's files are gone: they are kept for {days:g} days after its end.",
            remedy="Start the job again if you need them.",
        ) from None


@contextlib.contextmanager
def _news_of(runtime: Runtime, where: names.Resolved) -> Iterator[asyncio.Event]:
    """An event that is set whenever this process changes the job."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def changed(tenant: str, job_id: str) -> None:
        if (tenant, job_id) == (where.tenant, where.id):
            # The loop may be closed when the runner writes its last event during shutdown.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

    unsubscribe = runtime.store.subscribe(changed)
    try:
        yield news
    finally:
        unsubscribe()


async def _either(first: asyncio.Event, second: asyncio.Event, seconds: float) -> None:
    """Wait for one of two events, or for the time to pass."""
    waits = [asyncio.ensure_future(first.wait()), asyncio.ensure_future(second.wait())]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _check_enum(enum: object, value: int, field: str) -> None:
    if value not in enum.values():  # type: ignore[attr-defined]
        raise _invalid(field, f"is not a known value: {value}")


def _invalid(field: str, problem: str) -> MooringError:
    return MooringError(Reason.INVALID_FIELD, f"{field} {problem}.", fields=[FieldViolation(field, problem)])
