"""PersonalizationService."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from google.protobuf import duration_pb2, json_format
from mooring.v1 import media_pb2, personalization_pb2_grpc, training_pb2
from mooring.v1 import personalization_pb2 as pb

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import MAX_COUNT, MAX_SIZE_FACTOR, MAX_STEPS, ImageReady, Progress
from mooring_server.engine.tiers.host import require_base
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.jobs.photos import MAX_PHOTO_BYTES
from mooring_server.rpc import batches, caller, convert, facts, generation, images, names, quotas, status
from mooring_server.rpc.edge import Context
from mooring_server.rpc.generation import Prepared, Stopwatch
from mooring_server.rpc.runtime import Provide, Runtime, find_adapter, require_no_drain
from mooring_server.safety.policy import refusal
from mooring_server.storage.models import Document, Job, Subject
from mooring_server.storage.subjects import MAX_PHOTOS
from mooring_server.training.config import PRESETS, Method, TrainConfig

_BUSY_PAUSES = (0.05, 0.1, 0.2, 0.5)
"""Seconds between two tries of a batch's request while the engine's queue is full; the last one repeats."""

_CONTRACT_NAMES: Mapping[str, str] = {"budget": "drift_budget", "strength": "fixed_strength"}
"""Fields of `TrainConfig` that the contract calls differently."""

T = TypeVar("T")


class PersonalizationServicer(personalization_pb2_grpc.PersonalizationServiceServicer):
    """Jobs into the store, generations into the engine.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        self._runtime = runtime

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """See the contract."""
        del request, context
        return _server_info(self._runtime(), caller.tenant())

    async def Train(self, request: pb.TrainRequest, context: Context) -> pb.TrainResponse:
        """See the contract."""
        del context
        job = await asyncio.to_thread(_queue, self._runtime(), caller.tenant(), "train", request, _train_spec)
        return pb.TrainResponse(job=convert.job(job))

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        """See the contract."""
        del context
        job = await asyncio.to_thread(
            _queue, self._runtime(), caller.tenant(), "evaluate", request, _evaluate_spec
        )
        return pb.EvaluateResponse(job=convert.job(job))

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See the contract."""
        runtime, watch, tenant = self._runtime(), Stopwatch.start(), caller.tenant()
        deadline = generation.deadline_of(context)
        prepared = await asyncio.to_thread(generation.prepare, runtime, tenant, request)
        # an unfinished image cannot be judged, and must not show what the finished one may not
        previews = not runtime.safety.checks_images(tenant)
        judged = [convert.verdict(verdict) for verdict in prepared.verdicts]
        events = generation.draw(runtime, prepared, tenant=tenant, deadline=deadline)
        try:
            async for event in events:
                if isinstance(event, ImageReady):
                    for chunk in await _chunks(runtime, tenant, prepared, event, judged):
                        yield pb.GenerateResponse(image=chunk)
                elif isinstance(event, Progress):
                    _note_step(runtime, watch, TaskClass.INTERACTIVE)
                    progress = pb.GenerateProgress(step=event.step, steps=event.steps)
                    if event.preview is not None and previews:
                        progress.previews.append(await asyncio.to_thread(images.preview, event.preview))
                    yield pb.GenerateResponse(progress=progress)
                else:
                    yield pb.GenerateResponse(queued=pb.GenerateQueued(position=event.position))
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        runtime.metrics.steps.inc(_steps(prepared))
        yield pb.GenerateResponse(done=_done(runtime, prepared, watch, judged))

    async def GenerateBatch(  # type: ignore[override]  # the stubs know handlers that yield only
        self, request_iterator: AsyncIterator[pb.GenerateBatchRequest], context: Context
    ) -> None:
        """See the contract.

        A request is read only when fewer than `max_batch_in_flight` are unfinished; HTTP/2 flow control then
        slows the caller. It writes by itself rather than yield, because results come from many tasks.
        """
        runtime, tenant = self._runtime(), caller.tenant()
        # taken once: requests of one call then have equal deadlines and take turns
        deadline = generation.deadline_of(context)
        room = asyncio.Semaphore(runtime.settings.max_batch_in_flight)
        writing = asyncio.Lock()
        unfinished: set[str] = set()

        async def write(messages: list[pb.GenerateBatchResponse]) -> None:
            async with writing:  # an image's chunks stay together
                for message in messages:
                    await _whole(context.write(message))

        async def answer(request: pb.GenerateBatchRequest) -> None:
            with runtime.tracing.work("batch request") as span:
                try:
                    async for messages in _batch_results(runtime, tenant, request, deadline):
                        await write(messages)
                except MooringError as error:
                    span.failed(error.reason.value)
                    failed = status.to_status(error)
                    await write([pb.GenerateBatchResponse(id=request.id, error=failed)])
                finally:
                    unfinished.discard(request.id)
                    room.release()

        requests = aiter(request_iterator)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await room.acquire()
                    request = await anext(requests, None)
                    if request is None:
                        break
                    _check_batch_id(request.id, unfinished)
                    unfinished.add(request.id)
                    tasks.create_task(answer(request))
        except* MooringError as group:
            raise _first(group, MooringError) from None
        except* Exception as group:
            raise _first(group, Exception) from group

    async def RunBatch(
        self, request_iterator: AsyncIterator[pb.RunBatchRequest], context: Context
    ) -> pb.RunBatchResponse:
        """See the contract."""
        del context
        runtime, tenant = self._runtime(), caller.tenant()
        with runtime.held.call(tenant) as hold:
            job = await batches.receive(runtime, tenant, request_iterator, hold)
        return pb.RunBatchResponse(job=convert.job(job))


async def _whole(writing: Awaitable[None]) -> None:
    """Write a message to its end even where the task that writes it is cancelled.

    gRPC takes one operation of a kind at a time: with a write still under way, the status that is to end the
    call would be refused, and its caller would wait until its deadline.
    """
    sending = asyncio.ensure_future(writing)
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending})
        sending.cancelled() or sending.exception()  # looked at: the call is over either way
        raise


async def _batch_results(
    runtime: Runtime, tenant: str, message: pb.GenerateBatchRequest, deadline: float | None
) -> AsyncIterator[list[pb.GenerateBatchResponse]]:
    watch = Stopwatch.start()
    prepared = await asyncio.to_thread(generation.prepare, runtime, tenant, message.request)
    judged = [convert.verdict(verdict) for verdict in prepared.verdicts]
    pauses = iter(_BUSY_PAUSES)
    pause = 0.0
    while True:
        require_no_drain(runtime.gate)
        events = generation.draw(runtime, prepared, TaskClass.BATCH, tenant=tenant, deadline=deadline)
        try:
            async for event in events:
                if isinstance(event, ImageReady):
                    chunks = await _chunks(runtime, tenant, prepared, event, judged)
                    yield [pb.GenerateBatchResponse(id=message.id, image=chunk) for chunk in chunks]
                elif isinstance(event, Progress):
                    _note_step(runtime, watch, TaskClass.BATCH)
            break
        except MooringError as error:
            # A full queue means that other calls are ahead: this one waits its turn rather than fail.
            if not quotas.is_queue_full(error):
                raise
            pause = next(pauses, pause)
            await asyncio.sleep(pause)
        finally:
            await events.aclose()  # type: ignore[attr-defined]
    runtime.metrics.steps.inc(_steps(prepared))
    yield [pb.GenerateBatchResponse(id=message.id, done=_done(runtime, prepared, watch, judged))]


async def _chunks(
    runtime: Runtime, tenant: str, prepared: Prepared, event: ImageReady, judged: list[pb.SafetyVerdict]
) -> list[media_pb2.ImageChunk]:
    """A finished image as messages, counted; none when it is withheld.

    Judged, compressed and marked off the event loop, and off the engine's thread.
    """
    trace = runtime.tracing.current()
    if runtime.safety.checks_images(tenant):
        verdicts = await asyncio.to_thread(runtime.safety.judge_image, tenant, event.image)
        judged += [convert.verdict(verdict, event.index) for verdict in verdicts]
        if refusal(verdicts) is not None:
            facts.add("images_withheld", 1)
            return []
    origin = prepared.origin(runtime.base.digest)
    began = time.time_ns()
    chunks = await asyncio.to_thread(
        images.image_chunks, event.index, event.seed, event.image, runtime.marker, origin
    )
    if trace is not None:
        trace.stage("encode", began, time.time_ns())
    runtime.metrics.images.inc()
    facts.add("images", 1)
    return chunks


def _check_batch_id(value: str, unfinished: set[str]) -> None:
    """An id that cannot be answered under ends the call. Raises INVALID_FIELD."""
    if not 1 <= len(value) <= 128:
        problem = f"must have 1 to 128 characters, not {len(value)}"
    elif value in unfinished:
        problem = f"{value!r} is the id of an unfinished request of this call"
    else:
        return
    raise MooringError(Reason.INVALID_FIELD, f"id {problem}.", fields=[FieldViolation("id", problem)])


R = TypeVar("R", pb.TrainRequest, pb.EvaluateRequest)


def _queue(
    runtime: Runtime, tenant: str, kind: str, request: R, spec_of: Callable[[Runtime, str, R], Document]
) -> Job:
    """Queue the job that a request asks for, once. Blocking.

    Args:
        runtime: the server's parts.
        tenant: who asks.
        kind: of the job.
        request: what was asked.
        spec_of: checks everything that can be known before the job starts, and says what it is to do.
    """
    names.check_parent(tenant, request.parent)
    names.check_request_id(request.request_id)
    # what a repeated request must ask for again
    asked: Document = json_format.MessageToDict(request, preserving_proto_field_name=True)
    asked.pop("request_id", None)
    made_before = runtime.store.job_made_before(tenant, kind, request.request_id, asked)
    if made_before is not None:
        return made_before
    generation.require_device_time(runtime, tenant)
    return runtime.store.create_job(
        tenant,
        kind,
        spec_of(runtime, tenant, request),
        request_id=request.request_id,
        traceparent=runtime.tracing.traceparent(),
        asked=asked,
    )


def _train_spec(runtime: Runtime, tenant: str, request: pb.TrainRequest) -> Document:
    where = names.resolve_subject(tenant, request.subject, "subject")
    subject = runtime.store.get_subject(where.tenant, where.id)
    _require_photos(subject)
    adapter_id = names.check_id(request.adapter_id or subject.subject_id, "adapter_id")
    config = _within("config", lambda: TrainConfig.from_json(convert.training_document(request.config)))
    if config.budget is None and config.target_drift is not None:
        config = replace(config, budget=config.target_drift)  # the job shall show what it was steered by
    if config.rank > runtime.bank.rank:
        problem = f"must be at most {runtime.bank.rank} on this server, not {config.rank}"
        raise MooringError(
            Reason.ADAPTER_RANK_TOO_LARGE,
            f"config.rank {problem}.",
            remedy="Lower it, or start the server with a larger MOORING_RANK.",
            metadata={"limit": str(runtime.bank.rank)},
            fields=[FieldViolation("config.rank", problem)],
        )
    if config.targets == "attention+ff" and runtime.bank.targets == "attention":
        problem = "ATTENTION_FF is not among the layers that this server adapts"
        raise MooringError(
            Reason.INVALID_FIELD,
            f"config.targets: {problem}.",
            remedy="Use ATTENTION, or start the server with MOORING_TARGETS=attention+ff.",
            fields=[FieldViolation("config.targets", problem)],
        )
    return {"subject": subject.subject_id, "adapter_id": adapter_id, "config": config.to_json()}


def _evaluate_spec(runtime: Runtime, tenant: str, request: pb.EvaluateRequest) -> Document:
    if not runtime.judges_available:
        raise MooringError(
            Reason.JUDGES_NOT_AVAILABLE,
            "This server has no judges (CLIP and DINO) to evaluate with.",
            remedy="Start it with MOORING_CLIP_JUDGE and MOORING_DINO_JUDGE.",
        )
    adapter = None
    if request.adapter:
        where = names.resolve_adapter(tenant, request.adapter, "adapter")
        adapter = find_adapter(runtime, where)
        require_base(adapter, runtime.base.digest)
    if request.subject:
        where = names.resolve_subject(tenant, request.subject, "subject")
        subject = runtime.store.get_subject(where.tenant, where.id)
    elif adapter is not None and adapter.subject_id:
        subject = runtime.store.get_subject(tenant, adapter.subject_id)
    else:
        raise MooringError(
            Reason.INVALID_FIELD,
            "subject is empty.",
            remedy="Name the subject to compare with; only an adapter's own subject is found by itself.",
            fields=[FieldViolation("subject", "is required for the base alone")],
        )
    _require_photos(subject)
    given = convert.evaluation_document(request.config)
    wanted = EvaluationConfig.from_json(
        {
            "prompts": runtime.prompts.scenes,
            "generic_prompts": runtime.prompts.generic,
            "class_noun": subject.class_noun,
            "placeholder": "" if adapter is None else adapter.placeholder,
            **given,
        }
    )
    learned = None if adapter is None else runtime.adapters.get(adapter).embeddings
    if "prompts" not in given:
        # The default scenes are for any subject; one with a long class noun keeps those that still fit.
        fitting = [p for p in wanted.prompts if not _cut(runtime, wanted.adapted_prompt(p), learned)]
        wanted = replace(wanted, prompts=tuple(fitting) or wanted.prompts[:1])
    _within("config", wanted.validate)
    for name in ("prompts", "generic_prompts"):
        asked = [(f"config.{name}[{index}]", prompt) for index, prompt in enumerate(given.get(name, ()))]
        runtime.safety.require_prompts(tenant, asked)
        for index, prompt in enumerate(getattr(wanted, name)):
            runtime.base.require_prompt_fits(
                wanted.adapted_prompt(prompt), learned, field=f"config.{name}[{index}]"
            )
    document = wanted.to_json()
    return {
        "adapter": "" if adapter is None else adapter.name,
        "subject": subject.subject_id,
        "config": {name: document[name] for name in convert.EVALUATION_FIELDS},
    }


def _cut(runtime: Runtime, prompt: str, learned: LearnedEmbeddings | None) -> str:
    return runtime.base.check_prompt(prompt, learned).cut


def _require_photos(subject: Subject) -> None:
    if not subject.photo_count:
        raise MooringError(
            Reason.SUBJECT_HAS_NO_PHOTOS,
            f"Subject {subject.subject_id!r} has no photos.",
            remedy=f"Upload 1 to {MAX_PHOTOS} photos of it first.",
        )


def _within(field: str, check: Callable[[], T]) -> T:
    """Run a check of a nested message; its violations then name their whole path."""
    try:
        return check()
    except MooringError as error:
        nested = [
            violation
            if violation.field.startswith(f"{field}.")
            else FieldViolation(
                f"{field}.{_CONTRACT_NAMES.get(violation.field, violation.field)}", violation.description
            )
            for violation in error.fields
        ]
        raise MooringError(
            error.reason, error.message, remedy=error.remedy, metadata=error.metadata, fields=nested
        ) from None


def _note_step(runtime: Runtime, watch: Stopwatch, klass: TaskClass) -> None:
    waited = watch.step()
    if waited is not None:
        facts.add("queue_seconds", waited)
        runtime.metrics.queue_wait.labels(klass.name.lower()).observe(waited)


def _steps(prepared: Prepared) -> int:
    return prepared.request.steps * prepared.request.count


def _done(
    runtime: Runtime, prepared: Prepared, watch: Stopwatch, judged: Sequence[pb.SafetyVerdict]
) -> pb.GenerateDone:
    used = prepared.used()
    return pb.GenerateDone(
        images=prepared.request.count,
        adapter=used[0].adapter if used else "",
        adapter_digest=used[0].digest if used else "",
        more_adapters=used[1:],
        base_digest=runtime.base.digest,
        queue_time=_duration(watch.queued),
        total_time=_duration(watch.total),
        unknown_words=prepared.unknown_words,
        safety=judged,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    made = duration_pb2.Duration()
    made.FromMicroseconds(round(seconds * 1e6))
    return made


def _first(group: BaseExceptionGroup[BaseException], kind: type[Exception]) -> BaseException:
    """The first exception of a kind in a group of groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _first(error, kind)
        if isinstance(error, kind):
            return error
    return group


def _server_info(runtime: Runtime, tenant: str) -> pb.GetServerInfoResponse:
    base, settings = runtime.base, runtime.settings
    default = generation.DEFAULTS
    training = convert.training_config(TrainConfig().to_json())
    training.preset = training_pb2.DRIFT_PRESET_BALANCED
    return pb.GetServerInfoResponse(
        version=runtime.version,
        tenant=names.parent(tenant),
        base=pb.BaseModel(
            digest=base.digest,
            display_name=runtime.base_name,
            kind=base.kind,
            prediction_type=base.prediction_type,
            native_size=base.native_size,
            max_prompt_tokens=base.max_prompt_tokens,
        ),
        limits=pb.Limits(
            max_steps=min(MAX_STEPS, base.num_train_timesteps),
            max_images=MAX_COUNT,
            min_size=base.vae_scale_factor,
            max_size=base.native_size * MAX_SIZE_FACTOR,
            size_multiple=base.vae_scale_factor,
            max_rank=runtime.bank.rank,
            max_photos=MAX_PHOTOS,
            max_photo_bytes=min(MAX_PHOTO_BYTES, settings.max_photo_bytes),
            max_batch_in_flight=settings.max_batch_in_flight,
            max_batch_rows=settings.max_batch_rows,
            max_batch_bytes=settings.max_batch_bytes,
        ),
        methods=[training_pb2.TrainingMethod.Value(f"TRAINING_METHOD_{m.upper()}") for m in Method],
        presets=[
            pb.DriftPresetValue(
                preset=training_pb2.DriftPreset.Value(f"DRIFT_PRESET_{name.upper()}"), drift_budget=value
            )
            for name, value in PRESETS.items()
        ],
        training_defaults=training,
        generation_defaults=pb.GenerateRequest(
            adapter_scale=1.0,
            steps=default.steps,
            guidance_scale=default.guidance_scale,
            width=base.native_size,
            height=base.native_size,
            seed=default.seed,
            count=default.count,
            sampler=pb.SAMPLER_DDIM,
        ),
        evaluation_available=runtime.judges_available,
    )
