"""The systems that `benchmarks.load` puts the same requests to, and the clock that does it.

- `Ours`: the engine, in process.
- `Hotswap`: a lock around one diffusers pipeline, adapters loaded with `load_lora_weights(hotswap=True)`: one
  request at a time, in order of arrival. It does not load an adapter that is in place already.
- `Batching`: the same pipeline with request-level batching: the oldest request waits a moment for others of
  the same adapter, size and steps, and they run as one call of the pipeline.

The peers work on a thread of their own, as a server's worker would, with the engine's number of threads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from mooring_server.engine.adapters import LORA_FILE, AdapterWeights, export_diffusers
from mooring_server.engine.engine import Engine
from mooring_server.engine.model import BaseModel
from mooring_server.engine.requests import GenerationEvent, ImageReady
from mooring_server.engine.tasks import TaskHandle

from benchmarks import bases
from benchmarks.engine_common import GUIDANCE, BatchWatch, Pixels, quantile, request
from benchmarks.trace import Arrival

BATCH = 8
"""Most requests that `Batching` runs as one call."""
WINDOW = 0.05
"""Seconds that it waits for more."""

Done = Callable[[Pixels | None], None]
"""Gets the image, or None when the request was dropped; on any thread."""


class System(Protocol):
    """What serves requests."""

    name: str

    def submit(self, arrival: Arrival, done: Done) -> None:
        """Take a request; returns at once."""

    def drop(self) -> None:
        """Forget every request that has not begun, and end those that have where that is possible."""

    def reset(self) -> None:
        """Count rows and swaps anew."""

    def mean_rows(self) -> float | None:
        """Mean rows of a UNet call since `reset`; a guided image has two."""

    def close(self) -> None:
        """End the threads."""


class Ours:
    """The engine.

    Args:
        engine: with slots for fewer adapters than are asked for.
        watch: its observer.
        adapters: decoded, in host memory, by number.
        prompts: by number.
    """

    name = "ours"

    def __init__(
        self,
        engine: Engine,
        watch: BatchWatch,
        adapters: Mapping[int, AdapterWeights],
        prompts: Sequence[str],
    ) -> None:
        self._engine, self._watch, self._adapters, self._prompts = engine, watch, adapters, prompts
        self._handles: set[TaskHandle[None]] = set()

    def submit(self, arrival: Arrival, done: Done) -> None:
        """See `System`."""
        images: list[Pixels] = []

        def on_event(event: GenerationEvent) -> None:
            if isinstance(event, ImageReady):
                images.append(event.image)

        def ended(handle: TaskHandle[None]) -> None:
            self._handles.discard(handle)
            done(images[0] if images else None)

        handle = self._engine.generate(
            request(
                self._prompts[arrival.prompt],
                self._adapters[arrival.adapter],
                seed=arrival.seed,
                steps=arrival.steps,
                size=arrival.size,
            ),
            on_event,
        )
        self._handles.add(handle)
        handle.add_done_callback(ended)

    def drop(self) -> None:
        """See `System`."""
        for handle in tuple(self._handles):
            handle.cancel()

    def reset(self) -> None:
        """See `System`."""
        self._watch.reset()

    def mean_rows(self) -> float | None:
        """See `System`."""
        return self._watch.mean_rows

    def close(self) -> None:
        """The engine is closed by whoever made it."""


class Hotswap:
    """A lock around a diffusers pipeline.

    Args:
        base: its weights are shared.
        folder: where the adapters' files are, made by `write_adapters`.
        prompts: by number.
        rank: largest rank of the adapters.
        threads: torch threads of its worker.
    """

    name = "hotswap"

    def __init__(
        self, base: BaseModel, folder: Path, prompts: Sequence[str], *, rank: int, threads: int
    ) -> None:
        self._pipeline = bases.pipeline(base)
        self._pipeline.enable_lora_hotswap(target_rank=rank)
        self._folder, self._prompts, self._threads = folder, prompts, threads
        self._loaded: int | None = None
        self._waiting: deque[tuple[float, Arrival, Done]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._calls = self._images = 0
        self.swaps = 0
        self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._worker.start()

    def submit(self, arrival: Arrival, done: Done) -> None:
        """See `System`."""
        with self._changed:
            self._waiting.append((time.perf_counter(), arrival, done))
            self._changed.notify_all()

    def drop(self) -> None:
        """See `System`; the call that runs ends by itself."""
        with self._changed:
            dropped = list(self._waiting)
            self._waiting.clear()
        for _, _, done in dropped:
            done(None)

    def reset(self) -> None:
        """See `System`."""
        self._calls = self._images = self.swaps = 0

    def mean_rows(self) -> float | None:
        """See `System`."""
        return 2 * self._images / self._calls if self._calls else None

    def close(self) -> None:
        """See `System`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                group = self._next()
            images: Sequence[Pixels | None]
            try:
                images = self._draw([arrival for arrival, _ in group])
            except Exception as error:  # noqa: BLE001 - a lost request: no load with one is survived
                sys.stderr.write(f"{self.name}: {error!r}\n")
                images = [None] * len(group)
            for (_, done), image in zip(group, images, strict=True):
                done(image)

    def _next(self) -> list[tuple[Arrival, Done]]:
        """What to run as one call; called with the lock, and something waits."""
        _, arrival, done = self._waiting.popleft()
        return [(arrival, done)]

    def _draw(self, arrivals: Sequence[Arrival]) -> list[Pixels]:
        """One call of the pipeline for requests of equal adapter, size and steps."""
        first = arrivals[0]
        if self._loaded != first.adapter:
            self._pipeline.load_lora_weights(
                self._folder / str(first.adapter),
                weight_name=LORA_FILE,
                adapter_name="live",
                hotswap=self._loaded is not None,
            )
            self._loaded = first.adapter
            self.swaps += 1
        found: Any = self._pipeline(
            [self._prompts[arrival.prompt] for arrival in arrivals],
            num_inference_steps=first.steps,
            guidance_scale=GUIDANCE,
            height=first.size,
            width=first.size,
            generator=[torch.Generator().manual_seed(arrival.seed) for arrival in arrivals],
            output_type="np",
        ).images
        self._calls += first.steps
        self._images += first.steps * len(arrivals)
        return [(image * 255).round().astype("uint8") for image in found]


class Batching(Hotswap):
    """Request-level batching by adapter; see the module."""

    name = "batching"

    def _next(self) -> list[tuple[Arrival, Done]]:
        came, first, _ = self._waiting[0]

        def alike() -> list[tuple[float, Arrival, Done]]:
            key = (first.adapter, first.size, first.steps)
            found = [item for item in self._waiting if (item[1].adapter, item[1].size, item[1].steps) == key]
            return found[:BATCH]

        left = came + WINDOW - time.perf_counter()
        if left > 0:
            self._changed.wait_for(lambda: self._closed or len(alike()) == BATCH, left)
        group = alike()  # none when they were dropped meanwhile
        for item in group:
            self._waiting.remove(item)
        return [(arrival, done) for _, arrival, done in group]

    def _draw(self, arrivals: Sequence[Arrival]) -> list[Pixels]:
        return super()._draw(arrivals) if arrivals else []


def write_adapters(adapters: Mapping[int, AdapterWeights], folder: Path) -> None:
    """Files for `load_lora_weights`, a folder for each."""
    for number, weights in adapters.items():
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / LORA_FILE).write_bytes(export_diffusers(weights)[LORA_FILE])


# ---------------------------------------------------------------------- the clock


@dataclass(frozen=True)
class Outcome:
    """How a system did on a stretch of the trace.

    Args:
        offered: images a second that arrived; None when all waited from the start.
        delivered: images a second, from the start to the last one.
        latencies: seconds from when a request was due to arrive to its image, of those that were finished.
        lost: requests without an image.
        seconds_after: from the last arrival to the last image.
        mean_rows: rows of a UNet call.
    """

    offered: float | None
    delivered: float
    latencies: tuple[float, ...]
    lost: int
    seconds_after: float
    mean_rows: float | None

    def latency(self, share: float) -> float:
        """The latency that `share` of the requests did not exceed."""
        return quantile(self.latencies, share) if self.latencies else float("inf")

    def survived(self, bound: float) -> bool:
        """Nothing lost, p99 within `bound` seconds, and what waited at the end done within it too."""
        return not self.lost and self.latency(0.99) <= bound and self.seconds_after <= bound


@dataclass
class _Tally:
    """What has ended so far; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    latencies: dict[int, float] = field(default_factory=dict)
    images: dict[int, Pixels] = field(default_factory=dict)
    lost: int = 0

    @property
    def ended(self) -> int:
        return len(self.latencies) + self.lost


def drive(
    system: System,
    arrivals: Sequence[Arrival],
    rate: float | None,
    *,
    patience: float = float("inf"),
    on_image: Callable[[], None] = lambda: None,
) -> Outcome:
    """Put requests to a system as they are due, and wait for the last one.

    Args:
        system: idle.
        arrivals: a beginning of a trace.
        rate: requests a second; None lets all of them arrive at once.
        patience: seconds that a request may wait; once one has waited longer, the rest is dropped.
        on_image: called for every finished one, on any thread.
    """
    outcome, _ = _drive(system, arrivals, rate, patience, on_image)
    return outcome


def draw(system: System, arrivals: Sequence[Arrival]) -> list[Pixels]:
    """The images of some requests that arrive at once.

    Raises:
        RuntimeError: one of them failed.
    """
    outcome, images = _drive(system, arrivals, None, float("inf"), lambda: None)
    if outcome.lost:
        raise RuntimeError(f"{system.name} made no image for {outcome.lost} requests")
    return [images[arrival.index] for arrival in arrivals]


def _drive(
    system: System,
    arrivals: Sequence[Arrival],
    rate: float | None,
    patience: float,
    on_image: Callable[[], None],
) -> tuple[Outcome, dict[int, Pixels]]:
    system.reset()
    tally = _Tally()
    begin = time.perf_counter()
    due = {arrival.index: begin + (arrival.at / rate if rate else 0.0) for arrival in arrivals}

    def ending(arrival: Arrival) -> Done:
        def done(image: Pixels | None) -> None:
            now = time.perf_counter()
            with tally.changed:
                if image is None:
                    tally.lost += 1
                else:
                    tally.latencies[arrival.index] = now - due[arrival.index]
                    tally.images[arrival.index] = image
                tally.changed.notify_all()
            if image is not None:
                on_image()

        return done

    def overdue(sent: int) -> float:
        """Seconds until the oldest request that waits has waited too long."""
        with tally.changed:
            waiting = [due[a.index] for a in arrivals[:sent] if a.index not in tally.latencies]
        return min(waiting, default=float("inf")) + patience - time.perf_counter()

    sent = 0
    for arrival in arrivals:
        while (left := due[arrival.index] - time.perf_counter()) > 0:
            time.sleep(min(left, 0.5))
        if overdue(sent) <= 0:
            break
        system.submit(arrival, ending(arrival))
        sent += 1
    with tally.changed:
        while tally.ended < sent and sent == len(arrivals) and overdue(sent) > 0:
            tally.changed.wait(min(1.0, max(0.001, overdue(sent))))
        given_up = tally.ended < len(arrivals)
    if given_up:
        system.drop()
        with tally.changed:
            tally.changed.wait_for(lambda: tally.ended == sent)
    end = max((due[index] + seconds for index, seconds in tally.latencies.items()), default=begin)
    outcome = Outcome(
        offered=len(arrivals) / (due[arrivals[-1].index] - begin) if rate else None,
        delivered=len(tally.latencies) / max(end - begin, 1e-9),
        latencies=tuple(tally.latencies.values()),
        lost=len(arrivals) - len(tally.latencies),
        seconds_after=max(0.0, end - due[arrivals[-1].index]),
        mean_rows=system.mean_rows(),
    )
    return outcome, tally.images
