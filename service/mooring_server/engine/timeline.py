"""What happened to one request and when, told to whoever traces it.

The engine notes it while it works: a request waits, its adapter is copied into a slot, its prompts are
encoded, it takes part in passes of the UNet among other requests, its images are decoded. Times are of the
host's clock; on CUDA a pass or a copy is started within its time and may end on the device after it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import structlog

from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import GenerationRequest

_log = structlog.get_logger(__name__)

Value = str | int | float | bool


class RequestTrace(Protocol):
    """The trace of one request. Telemetry implements it; called on the engine thread, must not block."""

    def stage(self, name: str, began: int, ended: int, attributes: Mapping[str, Value]) -> None:
        """A stage of the request, in nanoseconds since the epoch."""

    def tick(self, others: Sequence[Any], began: int, ended: int, attributes: Mapping[str, Value]) -> None:
        """A pass of the UNet served this request and those of the other traces."""


class Timeline:
    """The stages of one request that is traced.

    Args:
        trace: where they go.
        request: what is made.
        klass: how urgent it is.
    """

    def __init__(self, trace: RequestTrace, request: GenerationRequest, klass: TaskClass) -> None:
        self.trace = trace
        self._request, self._class = request, klass.name.lower()
        self._queued = time.time_ns()
        self._waits = True
        self._began = self._ended = 0
        self._steps = self._rows = self._requests = 0
        self._pass_seconds = 0.0
        self._broken = False

    def started(self) -> None:
        """The request has its turn for the first time."""
        if self._waits:
            self._waits = False
            self._tell("queue", self._queued, time.time_ns(), {"class": self._class})

    def stage(self, name: str, seconds: float) -> None:
        """A stage of this request alone ended now."""
        ended = time.time_ns()
        attributes: dict[str, Value] = {"tier": "device"} if name == "adapter_load" else {}
        self._tell(name, ended - round(seconds * 1e9), ended, attributes)

    def step(self, began: int, ended: int, rows: int, requests: int) -> None:
        """A pass of so many rows, for so many requests, did one denoising step of this one."""
        self._began = self._began or began
        self._ended = ended
        self._steps += 1
        self._rows += rows
        self._requests += requests
        self._pass_seconds += (ended - began) / 1e9
        if self._steps == self._request.steps:  # of one group of its images
            self._tell_steps()

    def end(self) -> None:
        """The request has ended, in whatever way; tells what it had begun."""
        self.started()
        if self._steps:
            self._tell_steps()

    def _tell_steps(self) -> None:
        attributes: dict[str, Value] = {
            "class": self._class,
            "steps": self._steps,
            "scheduler": self._request.sampler,
            "guidance_scale": self._request.guidance_scale,
            "mean_batch_rows": round(self._rows / self._steps, 3),
            "mean_batch_requests": round(self._requests / self._steps, 3),
            "pass_seconds": round(self._pass_seconds, 6),
        }
        self._tell("denoise", self._began, self._ended, attributes)
        self._began = self._steps = self._rows = self._requests = 0
        self._pass_seconds = 0.0

    def _tell(self, name: str, began: int, ended: int, attributes: Mapping[str, Value]) -> None:
        if self._broken:
            return
        try:
            self.trace.stage(name, began, ended, attributes)
        except Exception as error:  # noqa: BLE001 - a trace never stops the work
            self._broken = True
            _log.warning("trace_failed", error=repr(error))


def tell_tick(timelines: Sequence[Timeline], began: int, ended: int, attributes: Mapping[str, Value]) -> None:
    """Tell of a pass that served these requests, at least one, and perhaps others that nobody traces."""
    first, *others = [timeline.trace for timeline in timelines]
    try:
        first.tick(others, began, ended, attributes)
    except Exception as error:  # noqa: BLE001 - a trace never stops the work
        _log.warning("trace_failed", error=repr(error))
