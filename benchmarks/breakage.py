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
from mooring_server.training import PRESETS, Method, TrainConfig
from rich.console import Console

from benchmarks.common import Row, parser, show
from benchmarks.kept import SUBJECTS, Unfinished, held_out, load_bench, measured

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
    console = Console(stderr=True)
    found: dict[str, list[dict[str, float]]] = {}
    missing = 0
    for name in options.subjects:
        for seed in range(options.seeds):
            for arm, config in arms(options.steps, options.budget, seed).items():
                if arm not in options.arms:
                    continue

                def tick(what: str, done: int, total: int, label: str = f"{name} seed {seed}") -> None:
                    if done == total:
                        console.print(f"{label}: {what}", highlight=False)

                try:
                    _, _, result = measured(bench, held_out(name), config, quick=options.quick, tick=tick)
                except Unfinished:
                    missing += 1
                    continue
                found.setdefault(arm, []).append(shares(ruler, result, base=False))
                if arm == ARMS[0]:
                    found.setdefault("base", []).append(shares(ruler, result, base=True))
    show(
        "breakage",
        "What is read in the pictures: scenes of the subject's prompts, objects of the others",
        rows(found),
        notes=(*_NOTES, *([f"Not run: {missing} trainings."] if missing else [])),
        options=options,
    )


_NOTES = (
    "ours: share of right objects on prompts without the subject; peer: the untouched base's, same seeds.",
    "scene: share of right scenes on prompts of the subject in scenes that its photos do not show.",
    "DINO: likeness to the photos there. lowest: the worst of the runs' shares of right objects.",
)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--subjects", nargs="+", default=list(SUBJECTS), help="held-out subjects")
    options.add_argument("--seeds", type=int, default=2, help="training seeds for each subject")
    options.add_argument("--budget", type=float, default=PRESETS["balanced"], help="drift budget ρ")
    options.add_argument("--steps", type=int, default=TrainConfig().steps, help="training steps")
    options.add_argument("--threads", type=int, default=1, help="torch threads")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="trainings to compare")
    options.add_argument("--finished", action="store_true", help="show the kept runs, start none")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.subjects, chosen.seeds, chosen.steps = chosen.subjects[:1], 1, 40
    return chosen


def arms(steps: int, budget: float, seed: int) -> dict[str, TrainConfig]:
    """The trainings that are compared, by name."""
    found = {}
    for arm in ARMS:
        moored = arm.startswith("moored")
        found[arm] = TrainConfig(
            method=Method.SPECTRAL if moored else Method.NONE,
            budget=budget if moored else None,
            steps=steps * (LONG if arm.endswith("long") else 1),
            seed=seed,
            preview_every=0,
        )
    return found


def scene_of(prompt: str) -> str:
    """The key of the drawn scene that a prompt ends in."""
    return next(key for key, words in nouns.SCENES.items() if prompt.endswith(" " + words))


def object_of(prompt: str) -> str:
    """The noun of the world before the scene."""
    thing = prompt.removesuffix(" " + nouns.SCENES[scene_of(prompt)])
    return next(noun for noun in SHIPPED.names if thing.endswith(" " + noun))


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
        if arm not in found or "base" not in found:
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
