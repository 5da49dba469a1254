"""Tasks of the engine: what a caller holds, what the engine knows of them, and who is told the numbers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from mooring_server.engine.policy import TaskClass, Ticket
from mooring_server.engine.ticks import Steps, UnetCall
from mooring_server.engine.timeline import Timeline

T = TypeVar("T")


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

    def used(self, klass: TaskClass, tenant: str, seconds: float) -> None:
        """A tenant's task used the device for so long; shares of a common UNet call are told apart."""

    def prompts(self, queries: int, hits: int, kept: int) -> None:
        """A prompt was looked up: look-ups and hits so far, and the bytes kept."""


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
class Task(Ticket):
    """A task, from inside; the policy knows the rest of it.

    Args:
        steps: the generator.
        handle: what the caller holds.
        ready: asked before the task starts; False leaves it waiting. None: it may start at any time.
        on_position: told the place in the queue whenever it changes.
        position: last told.
        call: what it wants of the UNet at its next tick; None: nothing, the tick is its own.
        timeline: where its stages are told; None: nobody traces it.
    """

    steps: Steps[Any] | Generator[None, None, Any]
    handle: TaskHandle[Any]
    ready: Callable[[], bool] | None = None
    on_position: Callable[[int], None] | None = None
    position: int = -1
    call: UnetCall | None = None
    timeline: Timeline | None = None


@dataclass(eq=False)
class Lane:
    """The tasks of one class.

    Args:
        waiting: in order of arrival.
        running: in order of their start.
        busy_seconds: device time used so far.
        ticks: so far.
        moved: places in the queue have to be told anew.
    """

    waiting: deque[Task] = field(default_factory=deque)
    running: list[Task] = field(default_factory=list)
    moved: bool = False
    busy_seconds: float = 0.0
    ticks: int = 0
