"""What does personalisation break that can be counted, and mooring keep? `python -m benchmarks.breakage`.

CLIP-T and drift are means over features; here the pictures are read. For held-out subjects × seeds: train
without protection, the same for three times as long, and moored for both lengths. The base's independent
classifier (`python -m mooring_server.dinghy ruler`, trained on true scenes alone, never a judge) then reads
whether pictures of the subject in new scenes show the scene that was asked for, and whether pictures of
prompts without the subject show the object.

Adapters and evaluations are those of `benchmarks.budget` where the lengths agree.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from mooring_server import dinghy
from mooring_server.dinghy import nouns, sources
from mooring_server.dinghy.classifier import Classifier, load_classifier, read
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.preset import SHIPPED
from mooring_server.evaluation.result import GENERIC, SUBJECT, EvaluationResult, ImagePair

from benchmarks.common import Row, show
from benchmarks.kept import (
    Subject,
    Tick,
    Unfinished,
    chosen,
    each_run,
    load_bench,
    measured,
    run_options,
    training,
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
    ruler = load_classifier(sources.cache_dir() / SHIPPED.version / "classifier", SHIPPED, choose("cpu"))
    bench = load_bench(dinghy.base_dir(), only_finished=options.finished)
    found: dict[str, list[dict[str, float]]] = {}
    missing: list[str] = []

    def work(subject: Subject, seed: int, tick: Tick) -> str:
        read_here: dict[str, dict[str, float]] = {}
        for arm in options.arms:
            config = training(
                options, seed, moored=arm.startswith("moored"), times=LONG if arm.endswith("long") else 1
            )
            try:
                _, _, result = measured(bench, subject, config, quick=options.quick, tick=tick)
            except Unfinished:
                missing.append(f"{subject.name} seed {seed} {arm}")
                continue
            if "base" not in read_here:  # the same pictures beside every arm
                read_here["base"] = shares(ruler, result, base=True)
            read_here[arm] = shares(ruler, result, base=False)
        for arm, figures in read_here.items():
            found.setdefault(arm, []).append(figures)
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
    "scene: share of right scenes on prompts of the subject in scenes that its photos do not show.",
    "DINO: likeness to the photos there. lowest: the worst of the runs' shares of right objects.",
)


def _options() -> argparse.Namespace:
    options = run_options(__doc__)
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="trainings to compare")
    return chosen(options)


def scene_of(prompt: str) -> str:
    """The key of the drawn scene that a prompt ends in."""
    return next(key for key, words in nouns.SCENES.items() if prompt.endswith(" " + words))


def object_of(prompt: str) -> str:
    """The noun of the world before the scene: "palm tree", where "tree" is one too."""
    thing = prompt.removesuffix(" " + nouns.SCENES[scene_of(prompt)])
    return max((noun for noun in SHIPPED.names if thing.endswith(" " + noun)), key=len)


def shares(ruler: Classifier, result: EvaluationResult, *, base: bool) -> dict[str, float]:
    """Scenes and objects right in an evaluation's pictures, and DINO: of the adapted model or the base."""

    def seen(pairs: Sequence[ImagePair]) -> list[tuple[ImagePair, str, str]]:
        pictures = np.stack([pair.base if base else pair.image for pair in pairs])
        readings = read(ruler, pictures)
        return [(pair, r.nouns[0], r.scene) for pair, r in zip(pairs, readings, strict=True)]

    scenes, things = seen(result.of_kind(SUBJECT)), seen(result.of_kind(GENERIC))
    return {
        "scene": statistics.mean(scene == scene_of(pair.base_prompt) for pair, _, scene in scenes),
        "object": statistics.mean(noun == object_of(pair.base_prompt) for pair, noun, _ in things),
        "DINO": result.metrics["base_dino" if base else "dino"],
        "pictures": len(scenes) + len(things),
    }


def rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """One row an arm, means over its runs."""

    def mean(arm: str, name: str) -> float:
        return statistics.mean(run[name] for run in found[arm])

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
                    "scene": mean(arm, "scene"),
                    "DINO": mean(arm, "DINO"),
                    "runs": float(len(found[arm])),
                    "pictures": sum(run["pictures"] for run in found[arm]),
                },
            )
        )
    return out


if __name__ == "__main__":
    main()
