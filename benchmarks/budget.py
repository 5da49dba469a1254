"""Does the drift land on its budget, and what does the mooring keep? `python -m benchmarks.budget`.

For held-out subjects × seeds: train without protection (`none`) and moored (`spectral` with a drift budget),
then evaluate both beside the untouched base. The drift that is compared with the budget is measured on
prompts, noise and timesteps that the controller never saw; its own final figure stands beside it.

Runs on the engine library, without a server. Finished runs are kept in .cache/benchmarks, by everything that
decides them, so an interrupted benchmark goes on where it was and two processes may share the subjects.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from mooring_server import dinghy
from mooring_server.engine.adapters import AdapterWeights, from_safetensors, to_safetensors
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel, load_base
from mooring_server.evaluation import report
from mooring_server.evaluation.base_samples import SampleCache
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.evaluate import EvaluationCache, evaluate
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.probe import DriftFigure
from mooring_server.evaluation.prompts import PROBE_GENERIC, PromptSets
from mooring_server.evaluation.result import EvaluationResult
from mooring_server.training import PRESETS, Method, TrainConfig, train
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import ROOT, Row, parser, show

T = TypeVar("T")

SUBJECTS = ("duck", "robot", "rocket", "teapot")
"""Held-out subjects by default: drawn nowhere in the base's world, different in shape and colour."""

TOLERANCE = 0.2
"""The goal: the held-out drift lies within this share of its budget."""

SETTLED = 20
"""Steps after which the controller is expected to hold the drift."""

Tick = Callable[[str, int, int], None]


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
        _write(self.path, data)

    def wanted(self) -> bool:
        """Nothing asks for one out of turn."""
        return False


def main() -> None:
    """Run the benchmark."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = _load(Path(options.base) if options.base else dinghy.base_dir(), only_finished=options.finished)
    subjects = [_subject(name) for name in options.subjects]
    seeds = range(options.seeds)
    console = Console(stderr=True)
    rows: list[Row] = []
    unfinished: list[str] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        overall = progress.add_task("runs", total=len(subjects) * len(seeds))
        inner = progress.add_task("", total=None)
        for subject in subjects:
            for seed in seeds:

                def tick(
                    what: str, done: int, total: int, label: str = f"{subject.name} seed {seed}"
                ) -> None:
                    progress.update(inner, description=f"  {label}: {what}", completed=done, total=total)

                try:
                    rows.append(_run(bench, subject, seed, options, tick))
                    console.print(_line(rows[-1]), highlight=False)
                except Unfinished:
                    unfinished.append(f"{subject.name} seed {seed}")
                progress.advance(overall)
    show(
        "budget",
        f"Drift on its budget ρ = {options.budget:g}, and what is kept (spectral against none)",
        rows,
        notes=(*_NOTES, *([f"Not run: {', '.join(unfinished)}."] if unfinished else [])),
        summary=_summary(rows) if rows else {},
        options=options,
    )


_NOTES = (
    "ours: drift of the moored adapter on held-out prompts, noise and timesteps; peer: the budget.",
    "95 %: its interval, prompts resampled. steered: the final figure on the controller's own probe.",
    f"highest: largest drift / budget that the controller measured after step {SETTLED}.",
    "DINO: likeness to the photos in new scenes. CLIP-T: agreement with the prompt, placeholder removed.",
    "generic: prompts without the subject. Columns of several figures: base / none / moored.",
)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--subjects", nargs="+", help=f"held-out subjects (default: {' '.join(SUBJECTS)})")
    options.add_argument("--seeds", type=int, help="training seeds for each subject (default: 2)")
    options.add_argument("--budget", type=float, default=PRESETS["balanced"], help="drift budget ρ")
    options.add_argument("--steps", type=int, help="training steps (default: 400)")
    options.add_argument("--threads", type=int, default=1, help="torch threads")
    options.add_argument("--base", help="directory of the base (default: the embedded one)")
    options.add_argument("--finished", action="store_true", help="show the kept runs, start none")
    options.add_argument("--report", type=Path, help="also write each run's report.html and grid.png here")
    chosen = options.parse_args()
    if chosen.quick:
        defaults = {"subjects": list(SUBJECTS[:1]), "seeds": 1, "steps": 40}
    else:
        defaults = {"subjects": list(SUBJECTS), "seeds": 2, "steps": TrainConfig().steps}
    for name, value in defaults.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def _load(directory: Path, *, only_finished: bool) -> Bench:
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


def _subject(name: str) -> Subject:
    known = {subject.name: subject for subject in dinghy.held_out_subjects()}
    if name not in known:
        raise SystemExit(f"no held-out subject {name!r}; there are {', '.join(sorted(known))}")
    found = known[name]
    photos = tuple(Image.open(path).convert("RGB") for path in found.photos)
    return Subject(name, found.class_noun, found.placeholder, photos)


def _run(bench: Bench, subject: Subject, seed: int, options: argparse.Namespace, tick: Tick) -> Row:
    """Train and evaluate both arms of one subject and seed."""
    sets = PromptSets.of(
        [f"{dinghy.photo_prompt('{}')} {place}" for place in _places(quick=options.quick)],
        dinghy.generic_prompts(48 if options.quick else 2 * PROBE_GENERIC),
    )
    moored_config = TrainConfig(
        method=Method.SPECTRAL, budget=options.budget, steps=options.steps, seed=seed, preview_every=0
    )
    none_config = TrainConfig(method=Method.NONE, steps=options.steps, seed=seed, preview_every=0)
    found: dict[str, tuple[AdapterWeights, EvaluationResult]] = {}
    history: list[dict[str, float]] = []
    for arm, train_config in (("none", none_config), ("moored", moored_config)):
        weights, history = _trained(
            bench, subject, train_config, sets.steering, partial(tick, f"train {arm}")
        )
        evaluation = EvaluationConfig(
            prompts=sets.scenes,
            generic_prompts=sets.generic[:8] if options.quick else sets.generic,
            probe_prompts=sets.held_out,
            class_noun=subject.class_noun,
            placeholder=subject.placeholder,
            steps=8 if options.quick else 25,
            class_samples=0 if options.quick else 4,
            probe_points=36 if options.quick else 288,
            budget=train_config.target_drift,
        )
        result = _evaluated(bench, subject, weights, evaluation, partial(tick, f"evaluate {arm}"))
        found[arm] = weights, result
    if options.report:
        _write_report(options.report / f"{subject.name}-{seed}", subject, found)
    return _row(subject, seed, options.budget, found, history)


def _places(*, quick: bool) -> Sequence[str]:
    from mooring_server.dinghy import nouns

    places = [nouns.SCENES[scene] for scene in dinghy.NEW_SCENES]
    return places[:3] if quick else places


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
    for heading, name in (("DINO", "dino"), ("CLIP-T", "clip_t"), ("generic CLIP-T", "generic_clip_t")):
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
    for heading in ("DINO", "CLIP-T", "generic CLIP-T", "change"):
        columns = [[float(x) for x in str(row.extra[heading]).split(" / ")] for row in rows]
        means = [f"{statistics.mean(column):.3f}" for column in zip(*columns, strict=True)]
        arms = "base / none / moored" if len(means) == 3 else "none / moored"
        summary[f"{heading} {arms}, mean"] = " / ".join(means)
    return summary


def _line(row: Row) -> str:
    extras = ", ".join(f"{heading} {value}" for heading, value in row.extra.items() if isinstance(value, str))
    return f"{row.name}: drift {row.ours:.4f} = {row.ratio:.2f} × budget; {extras}"


# ---------------------------------------------------------------------- finished work, kept


def _trained(
    bench: Bench,
    subject: Subject,
    config: TrainConfig,
    generic: Sequence[str],
    tick: Callable[[int, int], None],
) -> tuple[AdapterWeights, list[dict[str, float]]]:
    key = _key("adapter", bench.base.digest, config.digest, subject, list(generic))
    file = bench.folder / f"{subject.name}-{config.method}-{config.seed}-{key}.safetensors"
    history = file.with_suffix(".history.json")
    if file.is_file():
        return from_safetensors(file.read_bytes(), bench.base), json.loads(history.read_text())
    if bench.only_finished:
        raise Unfinished
    checkpoint = FileCheckpoint(file.with_suffix(".checkpoint"))

    result = _finish(
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
    _write(history, json.dumps(result.history).encode())
    _write(file, to_safetensors(result.weights))
    checkpoint.path.unlink(missing_ok=True)
    return result.weights, result.history


def _evaluated(
    bench: Bench,
    subject: Subject,
    weights: AdapterWeights,
    config: EvaluationConfig,
    tick: Callable[[int, int], None],
) -> EvaluationResult:
    key = _key("evaluation", weights.digest, bench.judges.digest, config.to_json(), subject)
    file = bench.folder / f"{subject.name}-{key}.json"
    if file.is_file():
        return EvaluationResult.from_json(json.loads(file.read_text()))
    if bench.only_finished:
        raise Unfinished

    result = _finish(
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
    _write(file, json.dumps(result.to_json()).encode())
    return result


def _finish(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


def _key(*parts: object) -> str:
    """Digest of everything that decides a piece of work."""
    content = hashlib.sha256()
    for part in parts:
        if isinstance(part, Subject):
            text = json.dumps([part.name, part.class_noun, part.placeholder])
            content.update(text.encode() + b"".join(photo.tobytes() for photo in part.photos))
        else:
            content.update(json.dumps(part).encode())
    return content.hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _write_report(
    folder: Path, subject: Subject, found: dict[str, tuple[AdapterWeights, EvaluationResult]]
) -> None:
    arms = [(arm, result) for arm, (_, result) in found.items()]
    title = f"{subject.name}: {subject.placeholder} {subject.class_noun}"
    _write(folder / "report.html", report.render(arms, photos=subject.photos, title=title).encode())
    report.grid(arms, photos=subject.photos).save(folder / "grid.png")


if __name__ == "__main__":
    main()
