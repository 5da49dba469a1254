"""How much open-loop load does an engine survive? `python -m benchmarks.load`.

Requests of one image each, of many customers: Poisson arrivals, adapters by Zipf's law, two sizes, several
step counts (`benchmarks.trace`); an arena of 32 slots; 64 and 2,000 adapters. The same requests go to

- ours: `Engine.generate`, in process, adapters decoded in host memory as its host tier holds them,
- hotswap: a lock around one diffusers pipeline, adapters hot-swapped from files on a local disk,
- batching: request-level batching by adapter on that pipeline.

Two things are measured, and both are printed:

1. Throughput at saturation: all requests of the trace wait from the start; images a second until the last.
2. Open loop: the load is raised in steps, as multiples of what hotswap makes at saturation, until a system no
   longer survives: a request is lost, p99 of the latency exceeds the bound, or what waits after the last
   arrival takes longer than it. Latency counts from when a request is due, so a late generator hides nothing.
   At the highest load that both survive the throughputs are equal by definition (both make what arrives), so
   there the latencies are compared; the loads that each survives are compared beside.

The gate: the same requests give the same images in all three.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mooring_server.engine.model import BaseModel

from benchmarks import bases
from benchmarks.common import Row, show
from benchmarks.engine_common import (
    GateError,
    Pixels,
    add_deterministic,
    apart,
    engine_on,
    gpu_note,
    largest_difference,
    not_measured,
    options_for,
    progress,
    random_adapter,
    require_device,
    result_name,
)
from benchmarks.load_systems import (
    Batching,
    Hotswap,
    Ours,
    Outcome,
    System,
    draw,
    drive,
    write_adapters,
)
from benchmarks.trace import Arrival, trace

SLOTS = 32
RANK = 4
STEPS = (8, 12, 20, 25)
LEVELS = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Offered load, as multiples of what hotswap makes at saturation."""
BOUND = 8.0
"""p99 that a system survives, in images' time of hotswap at saturation."""
STRETCH = 32
"""Images' time that a load is offered for: 4 bounds, so that a quarter too much load is seen."""
GOAL = 3.0
_CHOICES = {None: "the server's own choice (on for a CPU)", True: "on", False: "off"}
_SUFFIXES = {None: "", True: "-deterministic", False: "-batched"}


@dataclass
class Levels:
    """What a system did.

    Args:
        saturated: with all requests waiting from the start.
        tried: outcome by load level, up to the first that was not survived.
    """

    saturated: Outcome
    tried: dict[float, Outcome] = field(default_factory=dict)

    def survived(self, bound: float) -> list[float]:
        """The levels, rising."""
        return [level for level, outcome in self.tried.items() if outcome.survived(bound)]


Report = Callable[[str, int], Callable[[], None]]
"""Begins a stretch of so many images on the progress bar; returns what counts one."""


def main() -> None:
    """Run the benchmark."""
    options = _options()
    require_device(options)
    base = bases.load(options.base, device=options.device, dtype=options.dtype)
    rows: list[Row] = []
    summary: dict[str, float | str | None] = {}
    with progress() as bar:

        def report(what: str, images: int) -> Callable[[], None]:
            for task in bar.task_ids:
                bar.remove_task(task)
            task = bar.add_task(what, total=images)
            return lambda: bar.advance(task)

        for adapters in options.adapters:
            try:
                found = measure(base, adapters, options, report)
            except GateError as wrong:
                raise SystemExit(f"correctness gate: {wrong}; no throughput is printed") from wrong
            bound = BOUND / found["hotswap"].saturated.delivered
            rows += _rows(adapters, found, bound)
            summary |= _summary(adapters, found, bound)
    if options.device == "cpu":
        rows.append(not_measured())
    show(
        result_name("load" + _SUFFIXES[options.deterministic], options),
        f"Open-loop load on {options.base}, {options.device}, {options.dtype}",
        rows,
        notes=(*NOTES, gpu_note("load")),
        summary={"deterministic": _CHOICES[options.deterministic], **summary},
        options=options,
    )


NOTES = (
    "ratio: ours / peer. images/s: larger is better; seconds: smaller.",
    "rows: mean of a UNet call, ours / peer; a guided image has two.",
    "load: the highest level survived, in images/s; levels are multiples of hotswap's saturation.",
    "both: the highest load that ours and the peer survive; none when the peer survives no level.",
    f"arena: {SLOTS} slots; rank {RANK}; guidance on; every system has the same number of torch threads.",
)


def _options() -> argparse.Namespace:
    options = options_for(__doc__)
    options.add_argument("--adapters", type=int, nargs="+", help="how many there are (default: 64 2000)")
    options.add_argument("--steps", type=int, nargs="+", help=f"step counts (default: {STEPS})")
    options.add_argument("--levels", type=float, nargs="+", help="multiples of hotswap's saturation")
    options.add_argument("--stretch", type=int, help="images' time that each load is offered for")
    add_deterministic(options)
    chosen = options.parse_args()
    quick = {"adapters": [64], "steps": [3, 6], "levels": [0.5, 1.0, 2.0], "stretch": 10}
    full = {"adapters": [64, 2000], "steps": list(STEPS), "levels": list(LEVELS), "stretch": STRETCH}
    for name, value in (quick if chosen.quick else full).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def measure(base: BaseModel, adapters: int, options: argparse.Namespace, report: Report) -> dict[str, Levels]:
    """All systems on one trace.

    Raises:
        GateError: a peer's image is not ours.
    """
    prompts = bases.prompts(base)
    arrivals = trace(
        int(options.stretch * max(1.0, *options.levels)),
        adapters=adapters,
        sizes=[base.native_size, base.native_size * 3 // 4],
        steps=options.steps,
        prompts=len(prompts),
    )
    # adapters that nobody asks for would change nothing but the time this takes to set up
    weights = {number: random_adapter(base, number, RANK) for number in {a.adapter for a in arrivals}}
    for adapter in weights.values():
        _ = adapter.digest
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_adapters(weights, folder)
        engine, _, watch = stack.enter_context(
            engine_on(
                base,
                slots=SLOTS,
                rank=RANK,
                threads=options.threads,
                deterministic=options.deterministic,
            )
        )
        systems: list[System] = [
            Hotswap(base, folder, prompts, rank=RANK, threads=options.threads),
            Batching(base, folder, prompts, rank=RANK, threads=options.threads),
            Ours(engine, watch, weights, prompts),
        ]
        for system in systems:
            stack.callback(system.close)
        gate(systems, arrivals, largest_difference(options.dtype))
        head = arrivals[: options.stretch]
        found = {}
        for system in systems:
            counted = report(f"{adapters} adapters, {system.name} saturated", len(head))
            found[system.name] = Levels(drive(system, head, None, on_image=counted))
        one = 1.0 / found["hotswap"].saturated.delivered
        _raise_load(systems, found, arrivals, one, options, lambda what, n: report(f"{adapters} {what}", n))
    return found


def _raise_load(
    systems: Sequence[System],
    found: Mapping[str, Levels],
    arrivals: Sequence[Arrival],
    one: float,
    options: argparse.Namespace,
    report: Report,
) -> None:
    """Offer every level to every system in turn that has survived all levels before; `one` is in seconds."""
    bound = BOUND * one
    for level in sorted(options.levels):
        part = arrivals[: max(2, int(options.stretch * level))]
        for system in systems:
            levels = found[system.name]
            if len(levels.survived(bound)) == len(levels.tried):
                counted = report(f"adapters, {system.name} at {level:g}×", len(part))
                levels.tried[level] = drive(system, part, level / one, patience=1.5 * bound, on_image=counted)


def gate(systems: Sequence[System], arrivals: Sequence[Arrival], largest: float) -> float:
    """Compare all systems' images of a few requests, two of them alike but for prompt and seed.

    Returns:
        The largest mean difference in grey levels.

    Raises:
        GateError: it exceeds `largest`, or adapters do not show.
    """
    first = arrivals[0]
    other = next(a for a in arrivals if a.adapter != first.adapter)
    alike = {"adapter": first.adapter, "size": first.size, "steps": first.steps}
    chosen = [
        first,
        Arrival(**{**other.__dict__, **alike, "index": -1}),
        other,
        Arrival(**{**first.__dict__, "adapter": other.adapter, "index": -2}),
    ]
    images: dict[str, list[Pixels]] = {system.name: draw(system, chosen) for system in systems}
    worst = 0.0
    for name, found in images.items():
        for arrival, image, ours in zip(chosen, found, images["ours"], strict=True):
            difference = apart(ours, image)
            if difference > largest:
                what = f"{name}'s image of adapter {arrival.adapter}"
                raise GateError(f"{what} differs from ours by {difference:.3g} grey levels")
            worst = max(worst, difference)
    if apart(images["ours"][0], images["ours"][3]) <= 2 * largest:
        raise GateError("another adapter gives the same image")
    return worst


def _rows(adapters: int, found: Mapping[str, Levels], bound: float) -> Iterator[Row]:
    ours = found["ours"]
    for peer in ("hotswap", "batching"):
        theirs = found[peer]
        goal = GOAL if peer == "hotswap" else None
        name = f"{adapters} adapters, {peer}"
        mine, other = ours.saturated, theirs.saturated
        yield _row(f"{name}: saturated", mine.delivered, other.delivered, goal, "images/s", (mine, other))
        survived = [levels.survived(bound) for levels in (ours, theirs)]
        loads = [max(levels, default=0.0) / bound * BOUND for levels in survived]
        yield _row(f"{name}: load", loads[0], loads[1] or None, goal, "images/s")
        both = max(set(survived[0]) & set(survived[1]), default=None)
        for share, what in ((0.5, "p50"), (0.99, "p99")):
            pair = None if both is None else (ours.tried[both], theirs.tried[both])
            yield _row(
                f"{name}: {what} at both",
                None if pair is None else pair[0].latency(share),
                None if pair is None else pair[1].latency(share),
                1 / goal if goal and share == 0.99 else None,
                "s",
                pair,
                offered="none" if both is None else f"{both / bound * BOUND:.3g}",
            )


def _row(
    name: str,
    ours: float | None,
    peer: float | None,
    goal: float | None,
    unit: str,
    outcomes: tuple[Outcome, Outcome] | None = None,
    **extra: float | str,
) -> Row:
    ratio = ours / peer if ours is not None and peer else None
    met = None
    if goal is not None and ratio is not None:
        met = ratio >= goal if goal > 1 else ratio <= goal
    columns: dict[str, float | str | None] = {"unit": unit, **extra}
    if outcomes is not None:
        columns["rows"] = " / ".join("–" if o.mean_rows is None else f"{o.mean_rows:.1f}" for o in outcomes)
    words = "" if goal is None else f"≥ {goal:g}×" if goal > 1 else f"≤ {goal:.2f}×"
    return Row(name, ours, peer, ratio, words, met, extra=columns)


def _summary(adapters: int, found: Mapping[str, Levels], bound: float) -> dict[str, float | str | None]:
    """Every level of every system, so that the step at which one gave up can be seen."""
    summary: dict[str, float | str | None] = {f"{adapters} adapters, bound on p99 [s]": bound}
    for name, levels in found.items():
        tried = [
            f"{level:g}×: {outcome.delivered:.2f}/s, p50 {outcome.latency(0.5):.2f} s, "
            f"p99 {outcome.latency(0.99):.2f} s{'' if outcome.survived(bound) else ' (not survived)'}"
            for level, outcome in levels.tried.items()
        ]
        summary[f"{adapters} adapters, {name}"] = "; ".join(tried)
    return summary


if __name__ == "__main__":
    main()
