"""The engine: one thread, one device, ticks.

A task is a generator; one `next()` is one tick. Between any two ticks the policy chooses anew, cancellations
take effect, and nothing else ever touches the device, so there are no shared-pipeline races to guard against.
A task that raises fails alone. Left out: batching rows of several requests together (the bank can already do
it).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import structlog
import torch
from torch import Tensor

from mooring_server.engine.bank import ZERO_SLOT, AdapterBank
from mooring_server.engine.model import BaseModel
from mooring_server.engine.policy import SchedulingPolicy, TaskClass, Ticket
from mooring_server.engine.requests import GenerationEvent, GenerationRequest, ImageReady, Progress, Queued
from mooring_server.engine.sampling import MAX_BATCH, SampleRow, sample
from mooring_server.errors import MooringError, Reason

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class EngineObserver(Protocol):
    """Receives the engine's numbers, on the engine thread; must not block. Telemetry implements it."""

    def tick(self, klass: TaskClass, seconds: float) -> None:
        """A tick of a class took so long."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage (text_encode, denoise, decode, encode, adapter_load) took so long."""

    def batch(self, size: int, adapters: int) -> None:
        """A batch of `size` UNet rows with so many distinct adapters ran."""

    def queue(self, klass: TaskClass, waiting: int, running: int) -> None:
        """A class's queue changed."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine.

    Args:
        waiting: tasks not yet started, by class.
        running: tasks started and not finished, by class.
        busy_seconds: device time used so far, by class.
        ticks: ticks so far, by class.
        draining: whether new tasks are refused.
    """

    waiting: dict[TaskClass, int]
    running: dict[TaskClass, int]
    busy_seconds: dict[TaskClass, float]
    ticks: dict[TaskClass, int]
    draining: bool


class TaskHandle(Generic[T]):
    """A submitted task, from outside. All methods are thread-safe."""

    def __init__(self, name: str, klass: TaskClass, wake: Callable[[], None]) -> None:
        self.name = name
        self.klass = klass
        self._future: Future[T] = Future()
        self._cancelled = threading.Event()
        self._wake = wake

    def cancel(self) -> None:
        """Stop the task before its next tick; `result` then raises CANCELLED. Nothing when it is done."""
        self._cancelled.set()
        self._wake()

    def done(self) -> bool:
        """Whether the task ended, in whatever way."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for what the generator returned.

        Raises:
            TimeoutError: after `timeout` seconds.
            MooringError: CANCELLED, DEADLINE_EXCEEDED, DRAINING, OUT_OF_MEMORY.
            Exception: whatever the task raised.
        """
        return self._future.result(timeout)

    def add_done_callback(self, callback: Callable[[TaskHandle[T]], None]) -> None:
        """Call `callback(handle)` when the task ends: on the engine thread, or at once when it has ended."""
        self._future.add_done_callback(lambda _future: callback(self))


@dataclass(eq=False, kw_only=True)
class _Task(Ticket):
    """A task, from inside; the policy knows the rest of it.

    Args:
        steps: the generator.
        handle: what the caller holds.
        ready: asked before the task starts; False leaves it waiting. None: it may start at any time.
        on_position: told the place in the queue whenever it changes.
    """

    steps: Generator[None, None, Any]
    handle: TaskHandle[Any]
    ready: Callable[[], bool] | None = None
    on_position: Callable[[int], None] | None = None
    position: int = -1


@dataclass(eq=False)
class _Lane:
    """The tasks of one class.

    Args:
        waiting: in order of arrival.
        running: in order of their start.
        busy_seconds: device time used so far.
        ticks: so far.
        moved: places in the queue have to be told anew.
    """

    waiting: deque[_Task] = field(default_factory=deque)
    running: list[_Task] = field(default_factory=list)
    moved: bool = False
    busy_seconds: float = 0.0
    ticks: int = 0


class Engine:
    """Runs tasks on its own thread; see the module.

    Args:
        base: the base model; after this call only the engine thread may compute with it.
        bank: its bank.
        threads: torch CPU threads of the engine thread; None leaves torch's choice.
        training_share: least share of device time for training while it has work.
        max_queue: tasks of one class that may wait; one more is refused with QUEUE_FULL.
        max_running: tasks of one class that take turns; the others wait, so that each one's latency stays
            bounded. As many again may run while they are of tenants that have nothing running yet.
        tenant_weights: shares of tenants within a class relative to each other; those not named have 1.
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
        max_running: int = 4,
        tenant_weights: Mapping[str, float] | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        self.base = base
        self.bank = bank
        self.max_queue = max_queue
        self.max_running = max_running
        self._observers: list[EngineObserver] = [] if observer is None else [observer]
        self._faulty: set[str] = set()
        self._policy = SchedulingPolicy(training_share, weights=tenant_weights)
        self._steps_in_tick = 0
        self._lanes = {klass: _Lane() for klass in TaskClass}
        self._changed = threading.Condition()
        self._draining = False
        self._stopped = False
        self._threads = threads
        base.on_stage = bank.on_stage = lambda name, seconds: self._tell("stage", name, seconds)
        bank.on_batch = lambda size, adapters: self._tell("batch", size, adapters)
        self._thread = threading.Thread(target=self._run, name="mooring-engine", daemon=True)
        self._thread.start()

    def add_observer(self, observer: EngineObserver) -> None:
        """Send numbers to one more observer."""
        self._observers.append(observer)

    # ------------------------------------------------------------------ submitting

    def submit(
        self, steps: Generator[None, None, T], klass: TaskClass, name: str, *, tenant: str = ""
    ) -> TaskHandle[T]:
        """Queue a generator. It runs on the engine thread only, from its first line on.

        Args:
            steps: one `yield` per tick; its return value is the result. On cancellation it is closed: release
                what it holds in `finally`. It must not yield inside a `with torch.no_grad()` or `bank.rows`.
            klass: decides when it runs.
            name: for logs and errors.
            tenant: whose work it is.

        Raises:
            MooringError: QUEUE_FULL, DRAINING.
        """
        handle: TaskHandle[T] = TaskHandle(name, klass, self._wake)
        self._enqueue(_Task(steps=steps, handle=handle, klass=klass, tenant=tenant))
        return handle

    def generate(
        self,
        request: GenerationRequest,
        on_event: Callable[[GenerationEvent], None],
        *,
        klass: TaskClass = TaskClass.INTERACTIVE,
        tenant: str = "",
        deadline: float | None = None,
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

        Raises:
            MooringError: what `GenerationRequest.validate` raises, QUEUE_FULL, DRAINING.
        """
        request.validate(self.base)
        if request.adapter is not None:
            self.bank.require_fits(request.adapter)
        slots: list[int] = []

        def ready() -> bool:
            if request.adapter is None:
                slots.append(ZERO_SLOT)
                return True
            slot = self.bank.try_acquire(request.adapter)
            slots.extend([] if slot is None else [slot])
            return slot is not None

        handle: TaskHandle[None] = TaskHandle("generate", klass, self._wake)

        def release(_handle: TaskHandle[None]) -> None:
            for slot in slots:
                self.bank.release(slot)

        handle.add_done_callback(release)  # `ready` took the slot: it goes back however the task ends
        batch = min(request.count, MAX_BATCH)
        task = _Task(
            steps=self._generate(request, on_event, slots),
            handle=handle,
            ready=ready,
            on_position=lambda position: on_event(Queued(position)),
            klass=klass,
            tenant=tenant,
            deadline=deadline,
            adapter="" if request.adapter is None else request.adapter.digest,
            # what decides how long a step takes
            kind=(request.height, request.width, batch, request.guidance_scale > 1, request.adapter is None),
            steps_left=request.steps * math.ceil(request.count / MAX_BATCH),
        )
        self._enqueue(task)
        return handle

    def _generate(
        self, request: GenerationRequest, on_event: Callable[[GenerationEvent], None], slots: Sequence[int]
    ) -> Generator[None, None, None]:
        adapter = request.adapter
        rows = [
            SampleRow(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                slot=slots[0],
                scale=request.adapter_scale,
                seed=request.seed + index,
                embeddings=None if adapter is None else adapter.embeddings,
            )
            for index in range(request.count)
        ]
        groups = [rows[start : start + MAX_BATCH] for start in range(0, len(rows), MAX_BATCH)]
        total = request.steps * len(groups)
        for number, group in enumerate(groups):

            def report(step: int, clean: Tensor, before: int = number * request.steps) -> None:
                due = (
                    request.preview_interval and step % request.preview_interval == 0 and step < request.steps
                )
                preview = self.base.decode(clean[:1])[0].numpy() if due else None
                on_event(Progress(before + step, total, preview))
                self._steps_in_tick += 1

            images = yield from sample(
                self.base,
                self.bank,
                group,
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                sampler=request.sampler,
                on_step=report,
            )
            for offset, image in enumerate(images):
                index = number * MAX_BATCH + offset
                on_event(ImageReady(index, request.seed + index, image.numpy()))

    def _enqueue(self, task: _Task) -> None:
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
            task = self._policy.pick(started, time.monotonic())
            seconds = self._tick(task)
            self._policy.charge(task, seconds, time.monotonic(), steps=self._steps_in_tick)
        self._end_all()

    def _started(self) -> list[_Task]:
        return [task for lane in self._lanes.values() for task in lane.running]

    def _tick(self, task: _Task) -> float:
        klass, lane = task.klass, self._lanes[task.klass]
        self._steps_in_tick = 0
        started = time.perf_counter()
        finished: Callable[[], None] | None = None
        try:
            next(task.steps)
        except StopIteration as stop:
            value = stop.value
            finished = lambda: task.handle._future.set_result(value)  # noqa: E731, SLF001
        except BaseException as error:  # noqa: BLE001 - a failing task must fail alone, whatever it raises
            failure = _typed(error)
            finished = lambda: task.handle._future.set_exception(failure)  # noqa: E731, SLF001
        seconds = time.perf_counter() - started
        with self._changed:
            lane.busy_seconds += seconds
            lane.ticks += 1
            if finished is not None:
                lane.running.remove(task)
        self._tell("tick", klass, seconds)
        if finished is not None:
            self._queue_changed(klass)
            finished()
        return seconds

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

    def _start_next(self, lane: _Lane) -> bool:
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
            try:
                if task.ready is not None and not task.ready():
                    continue
                self._announce(task, 0)
            except BaseException as error:  # noqa: BLE001 - as in _tick
                failure = _typed(error)
            with self._changed:
                lane.waiting.remove(task)
                if failure is None:
                    lane.running.append(task)
            if failure is None:
                self._policy.start(task, waiting, now)
            else:
                self._close(task, failure)
            return True
        return False

    def _announce(self, task: _Task, position: int) -> None:
        if task.on_position is not None and task.position != position:
            task.position = position
            task.on_position(position)

    def _drop_ended(self) -> None:
        """End what was cancelled, and what cannot make its deadline any more."""
        for klass, lane in self._lanes.items():
            tasks = (*lane.waiting, *lane.running)
            ended: list[tuple[_Task, MooringError]] = [
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

    def _close(self, task: _Task, reason: BaseException) -> None:
        try:
            task.steps.close()
        except BaseException as error:  # noqa: BLE001 - its own clean-up failed; the others go on
            _log.warning("task_cleanup_failed", task=task.handle.name, error=repr(error))
        task.handle._future.set_exception(reason)  # noqa: SLF001

    def _queue_changed(self, klass: TaskClass) -> None:
        lane = self._lanes[klass]
        with self._changed:
            lane.moved = True
            waiting, running = len(lane.waiting), len(lane.running)
            self._changed.notify_all()
        self._tell("queue", klass, waiting, running)

    def _tell(self, method: str, *values: object) -> None:
        for observer in self._observers:
            try:
                getattr(observer, method)(*values)
            except Exception as error:  # noqa: BLE001 - numbers never stop the work
                kind = type(observer).__name__
                if kind not in self._faulty:  # once: it would fail at every tick
                    self._faulty.add(kind)
                    _log.warning("observer_failed", observer=kind, error=repr(error))


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


def _too_late(task: _Task, needed: float, now: float) -> MooringError:
    left = max(0.0, task.due - now)
    return MooringError(
        Reason.DEADLINE_EXCEEDED,
        f"{task.handle.name} cannot be done before its deadline: its steps take {needed:.2f} s or more, "
        f"and {left:.2f} s are left.",
        remedy="Allow more time, or ask for fewer steps or images.",
        metadata={"needed_seconds": f"{needed:.3f}", "left_seconds": f"{left:.3f}"},
    )
