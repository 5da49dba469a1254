"""From a GenerateRequest to the engine and back: checks, and the engine thread's events on the event loop."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from mooring.v1 import personalization_pb2 as pb

from mooring_server.engine.model import SAMPLERS
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import (
    MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
    AdapterUse,
    GenerationEvent,
    GenerationRequest,
    Progress,
    require_within,
)
from mooring_server.engine.tasks import TaskHandle
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.provenance.marks import Origin
from mooring_server.rpc import facts, names
from mooring_server.rpc.edge import Context
from mooring_server.rpc.runtime import Runtime, find_adapter
from mooring_server.safety.policy import Verdict

MAX_PROMPT_CHARACTERS = 8192
"""Longer prompts are refused before they are tokenized: no text encoder takes a fraction of it."""

DEFAULTS = GenerationRequest(prompt="")

_ADAPTER_FIELD = re.compile(r"adapters\[(\d+)\](?:\.(scale))?")


@dataclass(frozen=True)
class Prepared:
    """A checked request, ready for the engine.

    Attributes:
        adapters: names of the adapter versions, in the order of the request's; empty for the base alone.
        unknown_words: words of both prompts that mean nothing to the base, in order.
        verdicts: what the content checks found of the prompt.
    """

    request: GenerationRequest
    adapters: tuple[str, ...] = ()
    unknown_words: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def used(self) -> list[pb.UsedAdapter]:
        """Name and digest of each adapter."""
        return [
            pb.UsedAdapter(adapter=name, digest=use.weights.digest)
            for name, use in zip(self.adapters, self.request.adapters, strict=True)
        ]

    def audited(self, decision: str) -> dict[str, Any]:
        """Its entry of the audit log."""
        return {
            "resource": ",".join(self.adapters),
            "decision": decision,
            "prompt_hash": facts.prompt_hash(self.request.prompt),
            "digests": [use.weights.digest for use in self.request.adapters],
        }

    def origin(self, base_digest: str) -> Origin:
        """What the mark of its images says."""
        return Origin(base_digest, tuple(use.weights.digest for use in self.request.adapters))


def prepare(runtime: Runtime, tenant: str, message: pb.GenerateRequest) -> Prepared:
    """Check a request and load its adapter. Blocking: call it off the event loop.

    Raises:
        MooringError: whatever is wrong with the request or its adapter; QUOTA_EXCEEDED for device time.
    """
    require_device_time(runtime, tenant)
    for field, text in (("prompt", message.prompt), ("negative_prompt", message.negative_prompt)):
        if len(text) > MAX_PROMPT_CHARACTERS:
            problem = f"has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are read"
            raise MooringError(
                Reason.PROMPT_TOO_LONG,
                f"{field} {problem}.",
                remedy="Say it in fewer words.",
                metadata={"cut": text[MAX_PROMPT_CHARACTERS:]},
                fields=[FieldViolation(field, problem)],
            )
    found = [
        _adapter(runtime, tenant, wanted.adapter, field, wanted.scale if wanted.HasField("scale") else 1.0)
        for field, wanted in _wanted(message)
    ]
    request = GenerationRequest(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        adapters=tuple(use for _, use in found),
        steps=message.steps if message.HasField("steps") else DEFAULTS.steps,
        guidance_scale=(
            message.guidance_scale if message.HasField("guidance_scale") else DEFAULTS.guidance_scale
        ),
        height=message.height or None,
        width=message.width or None,
        seed=message.seed if message.HasField("seed") else DEFAULTS.seed,
        count=message.count if message.HasField("count") else DEFAULTS.count,
        sampler=sampler_name(message.sampler),
        preview_interval=message.preview_interval,
    )
    try:
        request.validate(runtime.base)
        request.require_slots(runtime.bank.slots)
    except MooringError as error:
        error.fields = tuple(FieldViolation(_contract_name(f.field), f.description) for f in error.fields)
        raise
    texts = (request.prompt, request.negative_prompt)
    checks = [runtime.base.check_prompt(text, request.embeddings) for text in texts]
    facts.note_request(request.prompt, (use.weights.digest for use in request.adapters))
    unknown = dict.fromkeys(word for check in checks for word in check.unknown_words)
    prepared = Prepared(request, tuple(name for name, _ in found), tuple(unknown))
    try:
        verdicts = runtime.safety.require_prompts(tenant, [("prompt", request.prompt)])
    except MooringError:
        runtime.store.record_all(tenant, "Generate", [prepared.audited("refused")])
        raise
    return replace(prepared, verdicts=verdicts)


def _wanted(message: pb.GenerateRequest) -> list[tuple[str, pb.AdapterUse]]:
    """The adapters that a request names, each with the field that names it; their scales are checked."""
    if message.HasField("adapter_scale"):
        require_within("adapter_scale", message.adapter_scale, MAX_ADAPTER_SCALE)
    if len(message.more_adapters) >= MAX_ADAPTERS:
        problem = (
            f"takes up to {MAX_ADAPTERS - 1} adapters besides `adapter`, not {len(message.more_adapters)}"
        )
        raise _invalid("more_adapters", problem)
    more = [(f"more_adapters[{index}]", use) for index, use in enumerate(message.more_adapters)]
    for field, use in more:
        require_within(f"{field}.scale", use.scale if use.HasField("scale") else 1.0, MAX_ADAPTER_SCALE)
    if not message.adapter:
        if more:
            raise _invalid("more_adapters", "needs `adapter` for the first one")
        return []
    scale = {"scale": message.adapter_scale} if message.HasField("adapter_scale") else {}
    first = pb.AdapterUse(adapter=message.adapter, **scale)
    return [("adapter", first), *((f"{field}.adapter", use) for field, use in more)]


def _contract_name(field: str) -> str:
    """The engine numbers a request's adapters from 0; the contract has the first one in fields of its own."""
    match = _ADAPTER_FIELD.fullmatch(field)
    if match is None:
        return field
    index, scale = int(match[1]), match[2]
    if index == 0:
        return "adapter_scale" if scale else "adapter"
    return f"more_adapters[{index - 1}].{scale or 'adapter'}"


def _invalid(field: str, problem: str) -> MooringError:
    return MooringError(Reason.INVALID_FIELD, f"{field} {problem}.", fields=[FieldViolation(field, problem)])


def _adapter(runtime: Runtime, tenant: str, name: str, field: str, scale: float) -> tuple[str, AdapterUse]:
    where = names.resolve_adapter(tenant, name, field)
    adapter = find_adapter(runtime, where)
    trace, began = runtime.tracing.current(), time.time_ns()
    with runtime.adapters.lease(adapter) as lease:
        weights = lease.wait()
        if trace is not None and lease.tier != "host":  # else nothing was loaded
            load = {"tier": lease.tier, "adapter_digest": weights.digest}
            trace.stage("adapter_load", began, time.time_ns(), load)
    return names.adapter(tenant, adapter.name), AdapterUse(weights, scale)


def sampler_name(value: int) -> str:
    """The engine's name of a sampler. Raises INVALID_FIELD for a number that is none."""
    if value == pb.SAMPLER_UNSPECIFIED:
        return SAMPLERS[0]
    known: dict[int, str] = {pb.Sampler.Value(f"SAMPLER_{name.upper()}"): name for name in SAMPLERS}
    if value not in known:
        raise _invalid("sampler", f"must be one of {', '.join(SAMPLERS)}, not {value}")
    return known[value]


def deadline_of(context: Context) -> float | None:
    """When the caller gives up, on the clock of `time.monotonic`; None when it never does."""
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left


async def draw(
    runtime: Runtime,
    prepared: Prepared,
    klass: TaskClass = TaskClass.INTERACTIVE,
    *,
    tenant: str = "",
    deadline: float | None = None,
) -> AsyncIterator[GenerationEvent]:
    """Run a prepared request, and audit it; its events as they come.

    Closing the iterator, or cancelling the task that reads it, cancels the engine's task at its next tick.

    Args:
        runtime: the server's parts.
        prepared: what to run.
        klass: how urgent it is.
        tenant: whose time is used.
        deadline: see `deadline_of`.

    Raises:
        MooringError: QUEUE_FULL, QUOTA_EXCEEDED for the tenant's queue depth, DRAINING, DEADLINE_EXCEEDED, or
            what the engine's task failed with.
    """
    inbox = _Inbox()
    with runtime.quotas.queued(tenant):
        # Tokenizing for the engine's own check takes milliseconds: off the event loop with it.
        entering = asyncio.ensure_future(
            asyncio.to_thread(
                runtime.engine.generate,
                prepared.request,
                inbox.post_from_thread,
                klass=klass,
                tenant=tenant,
                deadline=deadline,
                trace=runtime.tracing.current(),
            )
        )
        try:
            handle = await asyncio.shield(entering)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: the engine takes the task, and would run it for nobody.
            entering.add_done_callback(_cancel_entered)
            raise
        handle.add_done_callback(inbox.end_from_thread)
        try:
            # once the engine has taken it, so that what is refused for want of room is not told as allowed
            entries = [prepared.audited("allowed")]
            await asyncio.to_thread(runtime.store.record_all, tenant, "Generate", entries)
            async for event in inbox.events():
                yield event
            handle.result(0)
        finally:
            handle.cancel()


def _cancel_entered(entering: asyncio.Future[TaskHandle[None]]) -> None:
    if not entering.cancelled() and entering.exception() is None:
        entering.result().cancel()


def require_device_time(runtime: Runtime, tenant: str) -> None:
    """Refuse new device work of a tenant whose day is used up. Blocks. Raises QUOTA_EXCEEDED."""
    runtime.device_time.require(tenant, runtime.settings.quota_of(tenant).device_seconds_per_day)


class _Inbox:
    """Events that cross from the engine thread to the event loop, at bounded memory.

    A caller that reads slowly never slows the engine: progress that was not sent yet is replaced by newer
    progress, and images are at most as many as were asked for.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[GenerationEvent] = deque()
        self._news = asyncio.Event()
        self._ended = False

    def post_from_thread(self, event: GenerationEvent) -> None:
        """Deliver an event; on any thread."""
        self._loop.call_soon_threadsafe(self._post, event)

    def end_from_thread(self, _handle: TaskHandle[None]) -> None:
        """Say that no event follows; on any thread."""
        self._loop.call_soon_threadsafe(self._end)

    async def events(self) -> AsyncIterator[GenerationEvent]:
        """The events, in order, until the end."""
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            if self._ended:
                return
            await self._news.wait()
            self._news.clear()

    def _post(self, event: GenerationEvent) -> None:
        last = self._waiting[-1] if self._waiting else None
        if isinstance(event, Progress) and isinstance(last, Progress):
            shown = event.preview if event.preview is not None else last.preview
            self._waiting[-1] = Progress(event.step, event.steps, shown)
        else:
            self._waiting.append(event)
        self._news.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()


@dataclass
class Stopwatch:
    """When a request arrived and when its first step was done."""

    arrived: float
    first_step: float | None = None

    @staticmethod
    def start() -> Stopwatch:
        """A request arrives now."""
        return Stopwatch(time.perf_counter())

    def step(self) -> float | None:
        """A step was done; seconds since arrival when it was the first."""
        if self.first_step is not None:
            return None
        self.first_step = time.perf_counter()
        return self.first_step - self.arrived

    @property
    def queued(self) -> float:
        """Seconds from arrival to the first step; 0 when there was none."""
        return 0.0 if self.first_step is None else self.first_step - self.arrived

    @property
    def total(self) -> float:
        """Seconds since arrival."""
        return time.perf_counter() - self.arrived
