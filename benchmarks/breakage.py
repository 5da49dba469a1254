"""What does personalisation break that can be counted, and mooring keep? `python -m benchmarks.breakage`.

CLIP-T and drift are means over features; here the pictures are read. For held-out subjects × seeds: train
without protection, the same for three times as long, and moored for both lengths. The base's independent
classifier (`python -m mooring_server.dinghy ruler`, trained on true scenes alone, never a judge) then reads
whether pictures of the subject in new scenes show the scene that was asked for, and whether pictures of
prompts without the subject show the object that was (`benchmarks.asked`: any object, those of the subject's
kind, two or three of one, two different ones).

Adapters are those of `benchmarks.budget` where the lengths agree.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from mooring_server import dinghy
from mooring_server.dinghy.classifier import Classifier, Reading, load_ruler, read
from mooring_server.dinghy.figures import Ask
from mooring_server.dinghy.preset import SHIPPED
from mooring_server.evaluation.result import GENERIC, SUBJECT, EvaluationResult, ImagePair

from benchmarks.asked import KINDS, generic_asks, right_by_kind
from benchmarks.common import Row, show
from benchmarks.kept import (
    Subject,
    Tick,
    Unfinished,
    chosen,
    each_run,
    load_bench,
    measured,
    prompt_sets,
    run_options,
    training,
    write_report,
)

LONG = 3
"""Times the usual number of steps."""
ARMS = ("none", "moored", "none long", "moored long")
"""Trainings that are compared, in the order in which they run."""
KEPT = 0.95
"""Goal: the share of the base's right objects that a moored model keeps."""


def main() -> None:
    """Run the benchmark."""
    options = _options()
    torch.set_num_threads(options.threads)
    ruler = load_ruler(dinghy.ruler_dir(), SHIPPED)
    bench = load_bench(dinghy.base_dir(), only_finished=options.finished)
    found: dict[str, list[dict[str, float]]] = {}
    missing: list[str] = []

    def work(subject: Subject, seed: int, tick: Tick) -> str:
        drawn: dict[str, EvaluationResult] = {}
        steered = prompt_sets(quick=options.quick).steering
        asks = generic_asks(subject.class_noun, avoid=steered, quick=options.quick)
        generic = [ask.prompt for ask in asks]
        for arm in options.arms:
            config = training(
                options, seed, moored=arm.startswith("moored"), times=LONG if arm.endswith("long") else 1
            )
            try:
                _, _, drawn[arm] = measured(
                    bench, subject, config, quick=options.quick, tick=tick, generic=generic
                )
            except Unfinished:
                missing.append(f"{subject.name} seed {seed} {arm}")
        read_here: dict[str, dict[str, float]] = {}
        for arm, result in drawn.items():
            if not read_here:  # the base's pictures are the same beside every arm
                read_here["base"] = shares(ruler, result, subject.class_noun, asks, base=True)
            read_here[arm] = shares(ruler, result, subject.class_noun, asks, base=False)
        for arm, figures in read_here.items():
            found.setdefault(arm, []).append(figures)
        write_report(options, subject, seed, drawn)
        right = ", ".join(f"{arm} {figures['object']:.3f}" for arm, figures in read_here.items())
        return f"{subject.name} seed {seed}: objects right {right or 'not run'}"

    each_run(options, work)
    show(
        "breakage",
        "What is read in the pictures: scenes of the subject's prompts, objects of the others",
        rows(found),
        notes=(*_NOTES, *([f"Not run: {', '.join(missing)}."] if missing else [])),
        options=options,
    )


_NOTES = (
    "ours: share of right objects on prompts without the subject; peer: the untouched base's, same seeds.",
    "Its parts: any object; one of the subject's kind (class noun); two or three of one; two different ones.",
    "scene: share of right scenes on prompts of the subject in scenes that its photos do not show.",
    "DINO: likeness to the photos there. PRES: likeness of the bare class to them; lower is better.",
    "lowest: the worst of the runs' shares of right objects.",
)


def _options() -> argparse.Namespace:
    options = run_options(__doc__)
    options.add_argument(
        "--arms", nargs="+", choices=ARMS, help="trainings to compare (default: all; --quick: none moored)"
    )
    found = chosen(options)
    found.arms = found.arms or list(ARMS[:2] if found.quick else ARMS)
    return found


def shares(
    ruler: Classifier, result: EvaluationResult, class_noun: str, asks: Sequence[Ask], *, base: bool
) -> dict[str, float]:
    """Shares right of an evaluation's pictures, DINO and PRES: of the adapted model or of the base.

    "object" is the share over all prompts without the subject, ``asks``; ``asked.KINDS`` are its parts.
    """

    def seen(pairs: Sequence[ImagePair]) -> list[Reading]:
        return read(ruler, np.stack([pair.base if base else pair.image for pair in pairs]))

    scenes, things = result.of_kind(SUBJECT), result.of_kind(GENERIC)
    scene_of = dict(zip(dinghy.new_scene_prompts(class_noun), dinghy.NEW_SCENES, strict=True))
    right = right_by_kind(asks, seen(things), class_noun)
    prefix = "base_" if base else ""
    return {
        "scene": statistics.mean(
            reading.scene == scene_of[pair.base_prompt]
            for pair, reading in zip(scenes, seen(scenes), strict=True)
        ),
        "object": statistics.mean(one for kind in right.values() for one in kind),
        **{kind: statistics.mean(found) for kind, found in right.items() if found},
        "DINO": result.metrics[f"{prefix}dino"],
        **({"PRES": result.metrics[f"{prefix}pres"]} if f"{prefix}pres" in result.metrics else {}),
        "pictures": len(scenes) + len(things),
    }


def rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """One row an arm, means over its runs."""

    def mean(arm: str, name: str) -> float:
        return statistics.mean(run[name] for run in found[arm] if name in run)

    out = []
    for arm in ("base", *ARMS):
        if arm not in found:
            continue
        ours, peer = mean(arm, "object"), mean("base", "object")
        moored = arm.startswith("moored")
        out.append(
            Row(
                arm,
                ours,
                peer,
                ours / peer if peer else None,
                goal=f"≥ {KEPT}" if moored else "",
                met=ours >= KEPT * peer if moored else None,
                unit="objects right",
                extra={
                    "lowest": min(run["object"] for run in found[arm]),
                    **{
                        name: mean(arm, name)
                        for name in (*KINDS, "scene", "DINO", "PRES")
                        if any(name in run for run in found[arm])
                    },
                    "runs": float(len(found[arm])),
                    "pictures": sum(run["pictures"] for run in found[arm]),
                },
            )
        )
    return out


if __name__ == "__main__":
    main()
