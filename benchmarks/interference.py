"""What does a training job do to interactive requests, and they to it? `python -m benchmarks.interference`.

A real server on dinghy. Interactive requests of one guided image each (`Engine.generate`, in process) meet a
training job of a shipped subject, or none:

- at half load: Poisson arrivals at half the rate that the server makes without a job; latency p50 and p99,
- saturated: all requests wait from the start; images a second.

Beside them the training job's share of the device's time. Training is never idle, so at half load it takes
what interactive work leaves; saturated it must still get its guaranteed share (MOORING_TRAINING_SHARE).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mooring
from mooring_server import dinghy
from mooring_server.config import Settings
from mooring_server.engine.policy import TaskClass
from mooring_server.rpc.runtime import Runtime
from mooring_server.server import EmbeddedServer

from benchmarks import bases
from benchmarks.common import Row, show
from benchmarks.engine_common import (
    BatchWatch,
    gpu_note,
    not_measured,
    options_for,
    progress,
    random_adapter,
    require_device,
    result_name,
)
from benchmarks.load_systems import Ours, Outcome, drive
from benchmarks.trace import Arrival, trace

ADAPTERS = 4
RANK = 16
SHARE = 0.2
"""Of training, as the server's default."""
LOAD = 0.5

NOTES = (
    "ours: with the training job; peer: without it; ratio: ours / peer. Of few requests p99 is the largest.",
    "share: of the device's busy time that training got; goal: its guaranteed share, less 5 %.",
    "requests and job are of different tenants; the job is a real one, with its checkpoints, at rank 16.",
)


@dataclass(frozen=True)
class Stretch:
    """How requests did for a while.

    Args:
        outcome: latencies and throughput.
        share: training's part of the device's busy time.
        busy: the device's busy time over wall time.
    """

    outcome: Outcome
    share: float
    busy: float


def main() -> None:
    """Run the benchmark."""
    options = _options()
    require_device(options)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            base="" if options.base == "dinghy" else options.base,
            state_dir=Path(folder),
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            slots=ADAPTERS + 2,
            rank=RANK,
            targets="attention",
            training_share=SHARE,
            max_queue=10_000,
        )
        with EmbeddedServer(settings) as server, mooring.Client(server.target) as client:
            without, with_job = measure(server.server.runtime, client, options)
    rows = list(_rows(without, with_job))
    if options.device == "cpu":
        rows.append(not_measured())
    show(
        result_name("interference", options),
        f"Interactive requests beside a training job on {options.base}, {options.device}, {options.dtype}",
        rows,
        notes=(*NOTES, gpu_note("interference", "dinghy")),
        summary={
            "offered at half load [images/s]": without["half load"].outcome.offered,
            "device busy at half load, without / with": (
                f"{without['half load'].busy:.2f} / {with_job['half load'].busy:.2f}"
            ),
            "images of a stretch": options.images,
            "steps": options.steps,
        },
        options=options,
    )


def _options() -> argparse.Namespace:
    options = options_for(__doc__)
    options.add_argument("--images", type=int, help="of a stretch (default: 48; quick: 6)")
    options.add_argument("--steps", type=int, help="denoising steps (default: 20; quick: 4)")
    chosen = options.parse_args()
    chosen.images = chosen.images or (6 if chosen.quick else 48)
    chosen.steps = chosen.steps or (4 if chosen.quick else 20)
    return chosen


def measure(
    runtime: Runtime, client: mooring.Client, options: argparse.Namespace
) -> tuple[dict[str, Stretch], dict[str, Stretch]]:
    """Stretches by name, without and with the job."""
    base, watch = runtime.base, BatchWatch()
    observer: Any = watch
    runtime.engine.add_observer(observer)
    prompts = bases.prompts(base)
    weights = {number: runtime.bank.pack(random_adapter(base, number, RANK)) for number in range(ADAPTERS)}
    system = Ours(runtime.engine, watch, weights, prompts)
    arrivals = trace(
        options.images,
        adapters=ADAPTERS,
        sizes=[base.native_size],
        steps=[options.steps],
        prompts=len(prompts),
    )
    found: list[dict[str, Stretch]] = []
    job = None
    with progress() as bar:
        task = bar.add_task("", total=5)

        def stretch(what: str, part: Sequence[Arrival], rate: float | None) -> Stretch:
            bar.update(task, description=what)
            result = _stretch(runtime, system, part, rate)
            bar.advance(task)
            return result

        stretch("warming up", arrivals[: max(2, len(arrivals) // 10)], None)
        rate = None
        for training in (False, True):
            if training:
                job = _start_job(client)
            saturated = stretch("saturated", arrivals, None)
            rate = rate or LOAD * saturated.outcome.delivered
            found.append({"saturated": saturated, "half load": stretch("half load", arrivals, rate)})
    assert job is not None
    client.cancel_job(job)
    return found[0], found[1]


def _start_job(client: mooring.Client) -> Any:
    """A job that outlasts the benchmark, taken to its first training step."""
    subject = dinghy.held_out_subjects()[0]
    client.create_subject("bench", class_noun=subject.class_noun, rights="owned", photos=subject.photos)
    # a fixed strength: no probes, which would be steps of another cost in between
    job = client.train("bench", method="spectral", fixed_strength=0.01, steps=20_000)
    for event in client.watch(job):
        if event.job is not None and event.job.HasField("error"):
            raise RuntimeError(f"the training job failed: {event.job.error.message}")
        if event.loss is not None:
            return job
    raise RuntimeError("the training job ended before its first step")


def _stretch(runtime: Runtime, system: Ours, arrivals: Sequence[Arrival], rate: float | None) -> Stretch:
    before, began = runtime.engine.stats().busy_seconds, time.perf_counter()
    outcome = drive(system, arrivals, rate)
    after, wall = runtime.engine.stats().busy_seconds, time.perf_counter() - began
    used = {klass: after[klass] - before[klass] for klass in TaskClass}
    busy = sum(used.values())
    return Stretch(outcome, used[TaskClass.TRAINING] / busy, busy / wall)


def _rows(without: dict[str, Stretch], with_job: dict[str, Stretch]) -> list[Row]:
    rows = []
    for share, what in ((0.5, "p50"), (0.99, "p99")):
        ours, peer = (found["half load"].outcome.latency(share) for found in (with_job, without))
        rows.append(Row(f"half load: {what}", ours, peer, ours / peer, extra={"unit": "s"}))
    half = with_job["half load"].share
    rows.append(Row("half load: training's share", half, None, None, extra={"unit": "of busy time"}))
    ours, peer = (found["saturated"].outcome.delivered for found in (with_job, without))
    rows.append(Row("saturated: throughput", ours, peer, ours / peer, extra={"unit": "images/s"}))
    full = with_job["saturated"].share
    goal = 0.95 * SHARE
    rows.append(
        Row(
            "saturated: training's share",
            full,
            SHARE,
            full / SHARE,
            f"≥ {goal:.2f}",
            full >= goal,
            extra={"unit": "of busy time"},
        )
    )
    return rows


if __name__ == "__main__":
    main()
