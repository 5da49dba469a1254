"""Does the drift land on its budget, and what does the mooring keep? `python -m benchmarks.budget`.

For held-out subjects × seeds: train without protection (`none`) and moored (`spectral` with a drift budget),
then evaluate both beside the untouched base. The drift that is compared with the budget is measured on
prompts, noise and timesteps that the controller never saw; its own final figure stands beside it.

Runs on the engine library, without a server. Finished runs are kept in .cache/benchmarks, by everything that
decides them, so an interrupted benchmark goes on where it was and two processes may share the subjects.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from mooring_server import dinghy
from mooring_server.engine.adapters import AdapterWeights
from mooring_server.evaluation.probe import DriftFigure
from mooring_server.evaluation.result import EvaluationResult

from benchmarks.common import Row, show
from benchmarks.kept import (
    Bench,
    Subject,
    Tick,
    chosen,
    each_run,
    load_bench,
    measured,
    run_options,
    training,
    write_report,
)

TOLERANCE = 0.2
"""The goal: the held-out drift lies within this share of its budget."""

SETTLED = 20
"""Steps after which the controller is expected to hold the drift."""


def main() -> None:
    """Run the benchmark."""
    options = _options()
    torch.set_num_threads(options.threads)
    directory = Path(options.base) if options.base else dinghy.base_dir()
    bench = load_bench(directory, only_finished=options.finished)
    rows: list[Row] = []

    def work(subject: Subject, seed: int, tick: Tick) -> str:
        rows.append(_run(bench, subject, seed, options, tick))
        return _line(rows[-1])

    unfinished = each_run(options, work)
    show(
        "budget",
        f"Drift on its budget ρ = {options.budget:g}, and what is kept (spectral against none)",
        rows,
        notes=(*_NOTES, *([f"Not run: {', '.join(unfinished)}."] if unfinished else [])),
        summary=_summary(rows) if rows else {},
        options=options,
    )


FIGURES = {"DINO": "dino", "PRES": "pres", "CLIP-T": "clip_t", "generic CLIP-T": "generic_clip_t"}
"""Headings of the columns with figures of base / none / moored, and the figures' names in an evaluation."""

_NOTES = (
    "ours: drift of the moored adapter on held-out prompts, noise and timesteps; peer: the budget.",
    "95 %: its interval, prompts resampled. steered: the final figure on the controller's own probe.",
    f"highest: largest drift / budget that the controller measured after step {SETTLED}.",
    "DINO: likeness to the photos in new scenes. CLIP-T: agreement with the prompt, placeholder removed.",
    "PRES: likeness of the bare class to the photos (is every bird this duck now?); lower is better.",
    "generic: prompts without the subject. Columns of several figures: base / none / moored.",
)


def _options() -> argparse.Namespace:
    options = run_options(__doc__)
    options.add_argument("--base", help="directory of the base (default: the embedded one)")
    return chosen(options)


def _run(bench: Bench, subject: Subject, seed: int, options: argparse.Namespace, tick: Tick) -> Row:
    """Train and evaluate both arms of one subject and seed."""
    found: dict[str, tuple[AdapterWeights, EvaluationResult]] = {}
    history: list[dict[str, float]] = []
    for arm in ("none", "moored"):
        config = training(options, seed, moored=arm == "moored")
        weights, history, result = measured(bench, subject, config, quick=options.quick, tick=tick)
        found[arm] = weights, result
    write_report(options, subject, seed, {arm: result for arm, (_, result) in found.items()})
    return _row(subject, seed, options.budget, found, history)


def _row(
    subject: Subject,
    seed: int,
    budget: float,
    found: dict[str, tuple[AdapterWeights, EvaluationResult]],
    history: Sequence[dict[str, float]],
) -> Row:
    """`history` is the moored run's."""
    none, moored = found["none"][1].metrics, found["moored"][1].metrics
    figure = found["moored"][1].drift
    assert figure is not None
    steered = DriftFigure.from_json(json.loads(found["moored"][0].metadata["drift"]))
    ratio = figure.value / budget
    extra: dict[str, float | str | None] = {
        "95 %": f"{figure.low:.3f} to {figure.high:.3f}",
        "steered": steered.value,
        "highest": max((row["drift"] for row in history if row["step"] > SETTLED), default=0.0) / budget,
        "drift none": none["drift"],
    }
    for heading, name in FIGURES.items():
        values = (none[f"base_{name}"], none[name], moored[name])
        extra[heading] = " / ".join(f"{value:.3f}" for value in values)
    extra["change"] = f"{none['generic_change']:.3f} / {moored['generic_change']:.3f}"
    return Row(
        name=f"{subject.name} seed {seed}",
        ours=figure.value,
        peer=budget,
        ratio=ratio,
        goal=f"{1 - TOLERANCE:.2f}–{1 + TOLERANCE:.2f}",
        met=abs(ratio - 1) <= TOLERANCE,
        unit="drift",
        extra=extra,
    )


def _summary(rows: Sequence[Row]) -> dict[str, float | str | None]:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    summary: dict[str, float | str | None] = {
        "runs within ±20 % of the budget": f"{sum(bool(row.met) for row in rows)} of {len(rows)}",
        "drift / budget, mean": statistics.mean(ratios),
        "drift / budget, range": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "drift of none, mean": statistics.mean(float(row.extra["drift none"] or 0) for row in rows),
    }
    for heading in (*FIGURES, "change"):
        columns = [[float(x) for x in str(row.extra[heading]).split(" / ")] for row in rows]
        means = [f"{statistics.mean(column):.3f}" for column in zip(*columns, strict=True)]
        arms = "base / none / moored" if len(means) == 3 else "none / moored"
        summary[f"{heading} {arms}, mean"] = " / ".join(means)
    return summary


def _line(row: Row) -> str:
    extras = ", ".join(f"{heading} {value}" for heading, value in row.extra.items() if isinstance(value, str))
    return f"{row.name}: drift {row.ours:.4f} = {row.ratio:.2f} × budget; {extras}"


if __name__ == "__main__":
    main()
