"""The engine: one thread, one device, ticks.

A task is a generator; between any two ticks the policy chooses anew, cancellations take effect, and nothing
else ever touches the device, so there are no shared-pipeline races to guard against. A task that needs the
UNet yields a call for it (`ticks`), and the engine answers the calls of several tasks with one pass: tasks
join and leave at every step, whatever their adapters, timesteps, samplers and guidance scales. How many rows
a pass takes is read from a table of measured costs (`costs`). A task that raises fails alone.

Left out: splitting a task's own rows over several passes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor

from mooring_server.engine.bank import AdapterBank, Mix
from mooring_server.engine.costs import CostTable
from mooring_server.engine.model import BaseModel
from mooring_server.engine.policy import SchedulingPolicy, TaskClass
from mooring_server.engine.prompt_cache import PromptCache
from mooring_server.engine.requests import GenerationEvent, GenerationRequest, ImageReady, Progress, Queued
from mooring_server.engine.sampling import MAX_BATCH, SampleRow, draw
from mooring_server.engine.tasks import EngineObserver, EngineStats, Lane, Task, TaskHandle
from mooring_server.engine.ticks import Prepared, Steps, answer, by_itself
from mooring_server.engine.timeline import RequestTrace, Timeline, Value, tell_tick
from mooring_server.errors import MooringError, Reason

T = TypeVar("T")
_log = structlog.get_logger(__name__)

RIDE_SLOWDOWN = 1.25
"""How much longer a pass may take because rows of less urgent classes ride along."""
PROMPT_CACHE_BYTES = 64 * 2**20
_GUESS = {1: 0.01, 16: 0.05}
"""Seconds by rows of a pass before any was measured."""


class Engine:
    """Runs tasks on its own thread; see the module.

    Args:
        base: the base model; after this call only the engine thread may compute with it.
        bank: its bank.
        threads: torch CPU threads of the engine thread; None leaves torch's choice.
        training_share: least share of device time for training while it has work.
        max_queue: tasks of one class that may wait; one more is refused with QUEUE_FULL.
        max_running: tasks of one class that take turns; the others wait, so that each one's latency stays
            bounded. As many again may run while they are of tenants that have nothing running yet. None: as
            many guided images as one pass of the UNet takes, at least 4.
        tenant_weights: shares of tenants within a class relative to each other; those not named have 1.
        costs: what passes of the UNet cost; None starts with a guess that the passes then correct.
        deterministic: an image's bits do not depend on what it was batched with. On the CPU passes are
            computed row by row (`row_wise`); elsewhere requests are not batched with each other.
        prepared: compiled or captured passes to use where one fits.
        prompt_cache_bytes: for encoded prompts.
        observer: receives numbers.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: AdapterBank,
        *,
        threads: int | None = None,
        training_share: float = 0.2,
        max_queue: int = 64,
        max_running: int | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        costs: CostTable | None = None,
        deterministic: bool = True,
        prepared: Prepared | None = None,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        observer: EngineObserver | None = None,
    ) -> None:
        self.base = base
        self.bank = bank
        self.max_queue = max_queue
        native = base.native_size // base.vae_scale_factor
        self.costs = costs or CostTable((native, native), _GUESS, max_step_seconds=math.inf)
        self.max_running = max_running or max(4, self.costs.limit((native, native)) // 2)
        self.deterministic = deterministic
        self._row_wise = deterministic and base.device.type == "cpu"
        self._prepared = prepared
        self._prompts = PromptCache(prompt_cache_bytes)
        self._observers: list[EngineObserver] = [] if observer is None else [observer]
        self._faulty: set[str] = set()
        self._policy = SchedulingPolicy(training_share, weights=tenant_weights)
        self._lanes = {klass: Lane() for klass in TaskClass}
        self._changed = threading.Condition()
        self._draining = False
        self._stopped = False
        self._threads = threads
        self._at_work: Timeline | None = None
        base.on_stage = bank.on_stage = self._stage
        bank.on_batch = lambda size, adapters: self._tell("batch", size, adapters)
        self._thread = threading.Thread(target=self._run, name="mooring-engine", daemon=True)
        self._thread.start()

    def add_observer(self, observer: EngineObserver) -> None:
        """Send numbers to one more observer."""
        self._observers.append(observer)

    # ------------------------------------------------------------------ submitting

    def submit(
        self, steps: Steps[T] | Generator[None, None, T], klass: TaskClass, name: str, *, tenant: str = ""
    ) -> TaskHandle[T]:
        """Queue a generator. It runs on the engine thread only, from its first line on.

        Args:
            steps: one `yield` per tick (see `ticks`); its return value is the result. On cancellation it is
                closed: release what it holds in `finally`. It must not yield inside a `with torch.no_grad()`
                or `bank.rows`.
            klass: decides when it runs.
            name: for logs and errors.
            tenant: whose work it is.

        Raises:
            MooringError: QUEUE_FULL, DRAINING.
        """
        handle: TaskHandle[T] = TaskHandle(name, klass, self._wake)
        self._enqueue(Task(steps=steps, handle=handle, klass=klass, tenant=tenant))
        return handle

    def generate(
        self,
        request: GenerationRequest,
        on_event: Callable[[GenerationEvent], None],
        *,
        klass: TaskClass = TaskClass.INTERACTIVE,
        tenant: str = "",
        deadline: float | None = None,
        trace: RequestTrace | None = None,
    ) -> TaskHandle[None]:
        """Make images; events arrive on the engine thread, in order: Queued…, Progress…, ImageReady….

        An exception of `on_event` ends this request and no other.

        Args:
            request: what to make.
            on_event: must not block.
            klass: INTERACTIVE, or BATCH for work nobody waits at.
            tenant: whose request it is.
            deadline: when it must be done, on the clock of `time.monotonic`; the task ends with
                DEADLINE_EXCEEDED as soon as it is certain that it cannot be. None: it may take its time.
            trace: where its stages are told; None for nowhere.

        Raises:
            MooringError: what `GenerationRequest.validate` raises, QUEUE_FULL, DRAINING.
        """
        request.validate(self.base)
        request.require_slots(self.bank.slots)
        for use in request.adapters:
            self.bank.require_fits(use.weights)
        slots: list[int] = []
        handle: TaskHandle[None] = TaskHandle("generate", klass, self._wake)

        def release(_handle: TaskHandle[None]) -> None:
            while slots:
                self.bank.release(slots.pop())

        handle.add_done_callback(release)  # `ready` took the slots: they go back however the task ends
        digests = [use.weights.digest for use in request.adapters]
        timeline = None if trace is None else Timeline(trace, request, klass)
        task = Task(
            steps=self._generate(request, on_event, slots, timeline),
            handle=handle,
            ready=lambda: self._take_slots(request, slots),
            on_position=lambda position: on_event(Queued(position)),
            klass=klass,
            tenant=tenant,
            deadline=deadline,
            adapter=digests[0] if digests else "",
            # what decides how long a step takes
            kind=(
                request.height,
                request.width,
                min(request.count, MAX_BATCH),
                request.guidance_scale > 1,
                len(digests),
            ),
            steps_left=request.steps * math.ceil(request.count / MAX_BATCH),
            timeline=timeline,
        )
        self._enqueue(task)
        return handle

    def _take_slots(self, request: GenerationRequest, slots: list[int]) -> bool:
        """Pin a slot for each adapter, or none of them."""
        for use in request.adapters:
            slot = self.bank.try_acquire(use.weights)
            if slot is None:
                while slots:  # two requests that hold one slot each and want another would wait for ever
                    self.bank.release(slots.pop())
                return False
            slots.append(slot)
        return True

    def _generate(
        self,
        request: GenerationRequest,
        on_event: Callable[[GenerationEvent], None],
        slots: Sequence[int],
        timeline: Timeline | None,
    ) -> Steps[None]:
        mix: Mix = [(slot, use.scale) for slot, use in zip(slots, request.adapters, strict=True)]
        rows = [
            SampleRow(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                mix=mix,
                seed=request.seed + index,
                embeddings=request.embeddings,
                text_key=_text_key(request),
            )
            for index in range(request.count)
        ]
        groups = [rows[start : start + MAX_BATCH] for start in range(0, len(rows), MAX_BATCH)]
        total = request.steps * len(groups)
        for number, group in enumerate(groups):

            def report(
                step: int, clean: Tensor, before: int = number * request.steps
            ) -> Generator[None, Any, None]:
                preview = None
                if request.preview_interval and step % request.preview_interval == 0 and step < request.steps:
                    yield None  # a tick of its own, as every decode
                    preview = self.base.decode(clean[:1])[0].numpy()
                on_event(Progress(before + step, total, preview))

            drawn: Steps[Tensor] = draw(
                self.base,
                self.bank,
                group,
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                sampler=request.sampler,
                on_step=report,
                prompts=self._prompts,
            )
            # elsewhere than on the CPU a batch decides about bits: then nobody else's rows are in it
            apart = self.deterministic and not self._row_wise
            if apart:
                told = None if timeline is None else _passes_of(timeline)
                images = yield from by_itself(
                    self.base, self.bank, drawn, prepared=self._prepared, on_pass=told
                )
            else:
                images = yield from drawn
            if number == 0:
                self._tell("prompts", self._prompts.queries, self._prompts.hits, self._prompts.bytes)
            for offset, image in enumerate(images):
                index = number * MAX_BATCH + offset
                on_event(ImageReady(index, request.seed + index, image.numpy()))

    def _enqueue(self, task: Task) -> None:
        with self._changed:
            if self._draining:
                raise MooringError(Reason.DRAINING, "The server is shutting down.", remedy="Try another one.")
            lane = self._lanes[task.klass]
            if len(lane.waiting) >= self.max_queue:
                raise MooringError(
                    Reason.QUEUE_FULL,
                    f"{len(lane.waiting)} {task.klass.name.lower()} tasks are waiting already.",
                    remedy="Try again in a moment.",
                    metadata={"limit": str(self.max_queue)},
                )
            lane.waiting.append(task)
            lane.moved = True
            self._changed.notify_all()

    # ------------------------------------------------------------------ watching and ending

    def stats(self) -> EngineStats:
        """A snapshot; safe on any thread."""
        with self._changed:
            return EngineStats(
                waiting={klass: len(lane.waiting) for klass, lane in self._lanes.items()},
                running={klass: len(lane.running) for klass, lane in self._lanes.items()},
                busy_seconds={klass: lane.busy_seconds for klass, lane in self._lanes.items()},
                ticks={klass: lane.ticks for klass, lane in self._lanes.items()},
                draining=self._draining,
            )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new tasks, let those at hand finish for a while, cancel the rest, end the thread.

        Args:
            drain_seconds: how long tasks may still run. Long jobs should be cancelled by their owner first.
        """
        with self._changed:
            self._draining = True
            self._changed.wait_for(self._idle, timeout=drain_seconds)
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _idle(self) -> bool:
        return not any(lane.waiting or lane.running for lane in self._lanes.values())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ the engine thread

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._idle())
                if self._stopped:
                    break
            self._drop_ended()
            self._admit()
            started = self._started()
            if not started:
                # every task that waits wants a slot that someone outside the engine holds
                with self._changed:
                    self._changed.wait(timeout=0.05)
                continue
            self._tick(self._policy.pick(started, time.monotonic()), started)
        self._end_all()

    def _started(self) -> list[Task]:
        return [task for lane in self._lanes.values() for task in lane.running]

    def _tick(self, leader: Task, started: Sequence[Task]) -> None:
        """Run the task that was picked, and with it those whose UNet calls fit into the same pass."""
        began = time.perf_counter()
        members = [leader] if leader.call is None else self._together(leader, started)
        sizes = [1 if task.call is None else task.call.rows for task in members]
        answers = [None] if leader.call is None else self._answer(members)
        common = time.perf_counter() - began
        if leader.call is not None and any(task.timeline is not None for task in members):
            _trace_pass(leader, members, answers, common)
        for task, size, sent in zip(members, sizes, answers, strict=True):
            steps = int(task.call is not None and task.steps_left > 0)
            own, finish = self._advance(task, sent)
            part = common * size / sum(sizes) + own
            lane = self._lanes[task.klass]
            self._policy.charge(task, part, time.monotonic(), steps=steps, wall=common + own)
            with self._changed:
                lane.busy_seconds += part
                lane.ticks += task is leader
                if finish is not None:
                    lane.running.remove(task)
            self._tell("used", task.klass, task.tenant, part)
            if finish is not None:
                self._queue_changed(task.klass)
                if task.timeline is not None:
                    task.timeline.end()
                finish()
        self._tell("tick", leader.klass, time.perf_counter() - began)

    def _together(self, leader: Task, started: Sequence[Task]) -> list[Task]:
        """The leader and those that ride along.

        Of the leader's class (and of more urgent ones) as many as make the best pass; of others, who have
        their own guaranteed share, as many as slow the pass down a little only.
        """
        call = leader.call
        assert call is not None
        members, rows = [leader], call.rows
        others = [
            task for task in started if task is not leader and task.call and task.call.shape == call.shape
        ]
        limit, urgent = self.costs.limit(call.shape), rows
        for task in self._policy.companions(others):
            more = task.call.rows if task.call else 0
            if rows + more > limit:
                continue
            if task.klass > leader.klass:
                bearable = RIDE_SLOWDOWN * self.costs.seconds(call.shape, urgent)
                if self.costs.seconds(call.shape, rows + more) > bearable:
                    continue
            else:
                urgent += more
            members.append(task)
            rows += more
        return members

    def _answer(self, members: Sequence[Task]) -> list[Tensor | BaseException]:
        """The predictions; where the common pass fails, each task by itself, so that it fails alone."""
        calls = [task.call for task in members if task.call is not None]
        began = time.perf_counter()
        try:
            found: list[Tensor | BaseException] = [
                *answer(self.base, self.bank, calls, row_wise=self._row_wise, prepared=self._prepared)
            ]
        except BaseException as error:  # noqa: BLE001 - handed to the task it belongs to
            if len(members) == 1:
                return [error]
            return [one for task in members for one in self._answer([task])]
        rows = sum(call.rows for call in calls)
        self.costs.observe(calls[0].shape, rows, time.perf_counter() - began)
        return [*found]

    def _advance(
        self, task: Task, sent: Tensor | BaseException | None
    ) -> tuple[float, Callable[[], None] | None]:
        """Run a task up to what it wants next; its seconds, and what to call once it has ended."""
        began = time.perf_counter()
        finish: Callable[[], None] | None = None
        future = task.handle._future  # noqa: SLF001 - one class in two parts
        task.call = None
        self._at_work = task.timeline
        try:
            if isinstance(sent, BaseException):
                task.call = task.steps.throw(sent)
            else:
                task.call = task.steps.send(sent)  # type: ignore[arg-type] # None unless it asked
        except StopIteration as stop:
            value = stop.value
            finish = lambda: future.set_result(value)  # noqa: E731
        except BaseException as error:  # noqa: BLE001 - a failing task must fail alone, whatever it raises
            failure = _typed(error)
            finish = lambda: future.set_exception(failure)  # noqa: E731
        finally:
            self._at_work = None
        return time.perf_counter() - began, finish

    def _admit(self) -> None:
        """Start waiting tasks, as far as places and slots allow; tell the others where they stand."""
        for klass, lane in self._lanes.items():
            changed = False
            while lane.waiting and self._start_next(lane):
                changed = True
            if changed:
                self._queue_changed(klass)
            with self._changed:
                moved, lane.moved = lane.moved, False
                waiting = list(lane.waiting) if moved else []
            for position, task in enumerate(self._policy.order(waiting, lane.running)):
                try:
                    self._announce(task, position)
                except BaseException as error:  # noqa: BLE001 - as in _tick
                    with self._changed:
                        lane.waiting.remove(task)
                    self._close(task, _typed(error))
                    self._queue_changed(klass)

    def _start_next(self, lane: Lane) -> bool:
        """Start one task of a class, or end it where starting fails. False: none can start now."""
        now = time.monotonic()
        waiting = list(lane.waiting)  # others may be appended meanwhile
        for task in self._policy.starts(
            waiting,
            lane.running,
            now,
            max_running=self.max_running,
            resident=frozenset(running.adapter for running in self._started()),
        ):
            failure: BaseException | None = None
            self._at_work = task.timeline
            try:
                if task.ready is not None and not task.ready():
                    continue
                self._announce(task, 0)
            except BaseException as error:  # noqa: BLE001 - as in _tick
                failure = _typed(error)
            finally:
                self._at_work = None
            with self._changed:
                lane.waiting.remove(task)
                if failure is None:
                    lane.running.append(task)
            if failure is None:
                self._policy.start(task, waiting, now)
                if task.timeline is not None:
                    task.timeline.started()
            else:
                self._close(task, failure)
            return True
        return False

    def _announce(self, task: Task, position: int) -> None:
        if task.on_position is not None and task.position != position:
            task.position = position
            task.on_position(position)

    def _drop_ended(self) -> None:
        """End what was cancelled, and what cannot make its deadline any more."""
        for klass, lane in self._lanes.items():
            tasks = (*lane.waiting, *lane.running)
            ended: list[tuple[Task, MooringError]] = [
                (task, MooringError(Reason.CANCELLED, f"{task.handle.name} was cancelled."))
                for task in tasks
                if task.handle._cancelled.is_set()  # noqa: SLF001
            ]
            now = time.monotonic()
            cancelled = {id(task) for task, _ in ended}
            ended += [
                (task, _too_late(task, self._policy.needs(task), now))
                for task in self._policy.hopeless(tasks, now)
                if id(task) not in cancelled
            ]
            for task, reason in ended:
                with self._changed:
                    (lane.running if task in lane.running else lane.waiting).remove(task)
                self._close(task, reason)
            if ended:
                self._queue_changed(klass)

    def _end_all(self) -> None:
        for lane in self._lanes.values():
            for task in (*lane.running, *lane.waiting):
                message = f"{task.handle.name} was stopped: the server is shutting down."
                self._close(task, MooringError(Reason.DRAINING, message, remedy="Try again later."))
            lane.running.clear()
            lane.waiting.clear()

    def _close(self, task: Task, reason: BaseException) -> None:
        try:
            task.steps.close()
        except BaseException as error:  # noqa: BLE001 - its own clean-up failed; the others go on
            _log.warning("task_cleanup_failed", task=task.handle.name, error=repr(error))
        if task.timeline is not None:
            task.timeline.end()
        task.handle._future.set_exception(reason)  # noqa: SLF001

    def _queue_changed(self, klass: TaskClass) -> None:
        lane = self._lanes[klass]
        with self._changed:
            lane.moved = True
            waiting, running = len(lane.waiting), len(lane.running)
            self._changed.notify_all()
        self._tell("queue", klass, waiting, running)

    def _stage(self, name: str, seconds: float) -> None:
        """A stage ended. It is of the task at work, but for passes, which `_tick` tells of."""
        self._tell("stage", name, seconds)
        if self._at_work is not None and name != "denoise":
            self._at_work.stage(name, seconds)

    def _tell(self, method: str, *values: object) -> None:
        for observer in self._observers:
            try:
                getattr(observer, method)(*values)
            except Exception as error:  # noqa: BLE001 - numbers never stop the work
                kind = type(observer).__name__
                if kind not in self._faulty:  # once: it would fail at every tick
                    self._faulty.add(kind)
                    _log.warning("observer_failed", observer=kind, error=repr(error))


def _trace_pass(
    leader: Task, members: Sequence[Task], answers: Sequence[Tensor | BaseException | None], seconds: float
) -> None:
    """Tell the traced members of a pass about it, those that it failed not."""
    ended = time.time_ns()
    began = ended - round(seconds * 1e9)
    calls = [task.call for task in members if task.call is not None]
    rows = sum(call.rows for call in calls)
    served = [
        task.timeline
        for task, sent in zip(members, answers, strict=True)
        if task.timeline is not None and isinstance(sent, Tensor)
    ]
    for timeline in served:
        timeline.step(began, ended, rows, len(members))
    if served:
        adapters = {slot for call in calls for mix in call.mixes for slot, _ in mix}
        attributes: dict[str, Value] = {
            "class": leader.klass.name.lower(),
            "rows": rows,
            "requests": len(members),
            "adapters": len(adapters),
        }
        tell_tick(served, began, ended, attributes)


def _passes_of(timeline: Timeline) -> Callable[[int, int, int], None]:
    """Tells a request about passes that it has to itself."""

    def told(began: int, ended: int, rows: int) -> None:
        timeline.step(began, ended, rows, 1)
        tell_tick([timeline], began, ended, {"rows": rows, "requests": 1})

    return told


def _typed(error: BaseException) -> BaseException:
    """Out-of-memory errors of any origin as one typed error; others as they are."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text:
        return MooringError(
            Reason.OUT_OF_MEMORY,
            "The device has not enough memory for this request.",
            remedy="Ask for fewer or smaller images.",
        )
    return error


def _text_key(request: GenerationRequest) -> Hashable:
    """Everything about the adapters that changes how a prompt is encoded."""
    return tuple(
        (use.weights.text_digest, use.scale if use.weights.has_text_layers else 1.0)
        for use in request.adapters
        if use.weights.text_digest
    )


def _too_late(task: Task, needed: float, now: float) -> MooringError:
    left = max(0.0, task.due - now)
    return MooringError(
        Reason.DEADLINE_EXCEEDED,
        f"{task.handle.name} cannot be done before its deadline: its steps take {needed:.2f} s or more, "
        f"and {left:.2f} s are left.",
        remedy="Allow more time, or ask for fewer steps or images.",
        metadata={"needed_seconds": f"{needed:.3f}", "left_seconds": f"{left:.3f}"},
    )
