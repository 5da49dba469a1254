"""Adapters and evaluations of the benchmarks that train, kept by everything that decides them.

In .cache/benchmarks, so an interrupted benchmark goes on where it was, two processes may share the subjects,
and two benchmarks the adapters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from mooring_server import dinghy
from mooring_server.engine.adapters import AdapterWeights, from_safetensors, to_safetensors
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel, load_base
from mooring_server.evaluation import report
from mooring_server.evaluation.base_samples import SampleCache
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.evaluate import EvaluationCache, evaluate
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.prompts import PROBE_GENERIC, PromptSets
from mooring_server.evaluation.result import EvaluationResult
from mooring_server.training import PRESETS, Method, TrainConfig, train
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import ROOT, parser

T = TypeVar("T")
Tick = Callable[[str, int, int], None]
"""What is being done, and how much of how much of it is done."""

SUBJECTS = ("duck", "robot", "rocket", "teapot")
"""Held-out subjects by default: drawn nowhere in the base's world, different in shape and colour."""


@dataclass(frozen=True)
class Bench:
    """The models, loaded once."""

    base: BaseModel
    bank: AdapterBank
    judges: Judges
    cache: EvaluationCache
    samples: SampleCache
    folder: Path
    only_finished: bool


@dataclass(frozen=True)
class Subject:
    """A held-out subject with its photos in memory."""

    name: str
    class_noun: str
    placeholder: str
    photos: tuple[Image.Image, ...]


class Unfinished(Exception):  # noqa: N818 - an answer to --finished, not a fault
    """A run is not among the kept ones."""


class FileCheckpoint:
    """Training's checkpoint as one file, so that an interrupted benchmark loses no training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> bytes | None:
        """The newest checkpoint."""
        return self.path.read_bytes() if self.path.is_file() else None

    def save(self, data: bytes) -> None:
        """Replace it atomically."""
        write(self.path, data)

    def wanted(self) -> bool:
        """Nothing asks for one out of turn."""
        return False


def run_options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that trains subjects × seeds."""
    options = parser(description)
    options.add_argument("--subjects", nargs="+", help=f"held-out subjects (default: {' '.join(SUBJECTS)})")
    options.add_argument("--seeds", type=int, help="training seeds for each subject (default: 2)")
    options.add_argument("--budget", type=float, default=PRESETS["balanced"], help="drift budget ρ")
    options.add_argument("--steps", type=int, help="training steps (default: 400)")
    options.add_argument("--threads", type=int, default=1, help="torch threads")
    options.add_argument("--report", type=Path, help="also write each run's report.html and grid.png here")
    options.add_argument("--finished", action="store_true", help="show the kept runs, start none")
    return options


def chosen(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's choices; what was not chosen depends on ``--quick``."""
    found = options.parse_args()
    if found.quick:
        defaults = {"subjects": list(SUBJECTS[:1]), "seeds": 1, "steps": 40}
    else:
        defaults = {"subjects": list(SUBJECTS), "seeds": 2, "steps": TrainConfig().steps}
    for name, value in defaults.items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found


def training(options: argparse.Namespace, seed: int, *, moored: bool, times: int = 1) -> TrainConfig:
    """The training without protection or moored to the budget, ``times`` as long as was chosen."""
    return TrainConfig(
        method=Method.SPECTRAL if moored else Method.NONE,
        budget=options.budget if moored else None,
        steps=times * options.steps,
        seed=seed,
        preview_every=0,
    )


def each_run(options: argparse.Namespace, work: Callable[[Subject, int, Tick], str]) -> list[str]:
    """Do ``work`` for every subject and seed, under a progress bar; it returns the line to print.

    Returns the names of the runs for which it raised :class:`Unfinished`.
    """
    subjects = [held_out(name) for name in options.subjects]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    unfinished: list[str] = []
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("runs", total=len(subjects) * options.seeds)
        inner = progress.add_task("", total=None)
        for subject in subjects:
            for seed in range(options.seeds):
                label = f"{subject.name} seed {seed}"

                def tick(what: str, done: int, total: int, label: str = label) -> None:
                    progress.update(inner, description=f"  {label}: {what}", completed=done, total=total)

                try:
                    console.print(work(subject, seed, tick), highlight=False)
                except Unfinished:
                    unfinished.append(label)
                progress.advance(overall)
    return unfinished


def load_bench(directory: Path, *, only_finished: bool) -> Bench:
    """The base in ``directory``, its judges, and where finished work is kept."""
    base = load_base(directory)
    return Bench(
        base=base,
        bank=AdapterBank(base, slots=3, rank=TrainConfig().rank),
        judges=Judges.load(dinghy.clip_dir(), dinghy.dino_dir()),
        cache=EvaluationCache(),
        samples=SampleCache(),
        folder=ROOT / ".cache" / "benchmarks" / "budget",
        only_finished=only_finished,
    )


def held_out(name: str) -> Subject:
    """The shipped subject of this name, or an exit that lists them."""
    known = {subject.name: subject for subject in dinghy.held_out_subjects()}
    if name not in known:
        raise SystemExit(f"no held-out subject {name!r}; there are {', '.join(sorted(known))}")
    found = known[name]
    photos = tuple(Image.open(path).convert("RGB") for path in found.photos)
    return Subject(name, found.class_noun, found.placeholder, photos)


def prompt_sets(*, quick: bool) -> PromptSets:
    """The subject in every scene that its photos do not show, and things that the base knows."""
    places = [dinghy.nouns.SCENES[scene] for scene in dinghy.NEW_SCENES]
    return PromptSets.of(
        [f"{dinghy.photo_prompt('{}')} {place}" for place in (places[:3] if quick else places)],
        dinghy.generic_prompts(48 if quick else 2 * PROBE_GENERIC),
    )


def measured(
    bench: Bench,
    subject: Subject,
    config: TrainConfig,
    *,
    quick: bool,
    tick: Tick,
    generic: Sequence[str] = (),
) -> tuple[AdapterWeights, list[dict[str, float]], EvaluationResult]:
    """An adapter of this training, the training's history, and its evaluation beside the base.

    ``generic`` are the prompts without the subject to draw, by default those of the product.
    """
    sets, arm = prompt_sets(quick=quick), f"{config.method} {config.steps}"
    weights, history = trained(bench, subject, config, sets.steering, partial(tick, f"train {arm}"))
    evaluation = EvaluationConfig(
        prompts=sets.scenes,
        generic_prompts=tuple(generic) or (sets.generic[:8] if quick else sets.generic),
        probe_prompts=sets.held_out,
        class_noun=subject.class_noun,
        placeholder=subject.placeholder,
        steps=8 if quick else 25,
        class_samples=0 if quick else 4,
        probe_points=36 if quick else 288,
        budget=config.target_drift,
    )
    return weights, history, evaluated(bench, subject, weights, evaluation, partial(tick, f"evaluate {arm}"))


def trained(
    bench: Bench,
    subject: Subject,
    config: TrainConfig,
    generic: Sequence[str],
    tick: Callable[[int, int], None],
) -> tuple[AdapterWeights, list[dict[str, float]]]:
    """The adapter of a training and the training's history.

    Raises:
        Unfinished: it is not among the kept ones, and none is to be started.
    """
    key = digest_of("adapter", bench.base.digest, config.digest, subject, list(generic))
    file = bench.folder / f"{subject.name}-{config.method}-{config.seed}-{key}.safetensors"
    history = file.with_suffix(".history.json")
    if file.is_file():
        return from_safetensors(file.read_bytes(), bench.base), json.loads(history.read_text())
    if bench.only_finished:
        raise Unfinished
    checkpoint = FileCheckpoint(file.with_suffix(".checkpoint"))

    result = finish(
        train(
            bench.base,
            bench.bank,
            subject.photos,
            config,
            class_noun=subject.class_noun,
            placeholder=subject.placeholder,
            generic_prompts=generic,
            checkpoint=checkpoint,
            on_progress=lambda now: tick(now.step, now.steps),
            samples=bench.samples,
        )
    )
    write(history, json.dumps(result.history).encode())
    write(file, to_safetensors(result.weights))
    checkpoint.path.unlink(missing_ok=True)
    return result.weights, result.history


def evaluated(
    bench: Bench,
    subject: Subject,
    weights: AdapterWeights,
    config: EvaluationConfig,
    tick: Callable[[int, int], None],
) -> EvaluationResult:
    """An adapter's evaluation beside the base.

    Raises:
        Unfinished: as for :func:`trained`.
    """
    key = digest_of("evaluation", weights.digest, bench.judges.digest, config.to_json(), subject)
    file = bench.folder / f"{subject.name}-{key}.json"
    if file.is_file():
        return EvaluationResult.from_json(json.loads(file.read_text()))
    if bench.only_finished:
        raise Unfinished

    result = finish(
        evaluate(
            bench.base,
            bench.bank,
            bench.judges,
            weights,
            subject.photos,
            config,
            on_progress=lambda now: tick(now.step, now.steps),
            cache=bench.cache,
        )
    )
    write(file, json.dumps(result.to_json()).encode())
    return result


def write_report(
    options: argparse.Namespace, subject: Subject, seed: int, found: Mapping[str, EvaluationResult]
) -> None:
    """The product's report and grid of a run's arms, where they are wanted."""
    if not (options.report and found):
        return
    folder, arms = options.report / f"{subject.name}-{seed}", list(found.items())
    title = f"{subject.name}: {subject.placeholder} {subject.class_noun}"
    write(folder / "report.html", report.render(arms, photos=subject.photos, title=title).encode())
    report.grid(arms, photos=subject.photos, generic_prompts=12).save(folder / "grid.png")


def finish(steps: Generator[None, None, T]) -> T:
    """What a task in ticks returns, run to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


def digest_of(*parts: object) -> str:
    """Digest of everything that decides a piece of work."""
    content = hashlib.sha256()
    for part in parts:
        if isinstance(part, Subject):
            text = json.dumps([part.name, part.class_noun, part.placeholder])
            content.update(text.encode() + b"".join(photo.tobytes() for photo in part.photos))
        else:
            content.update(json.dumps(part).encode())
    return content.hexdigest()[:16]


def write(path: Path, data: bytes) -> None:
    """Write a file by a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
