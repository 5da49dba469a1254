"""`mooring demo`: the whole job on photos that ship with Mooring, through the real server.

One held-out object, twelve photos. The untouched base is measured first; then an unprotected adapter (`none`)
and a moored one (`spectral`, drift budget `balanced`) learn the object; the same prompts are drawn with all
three and measured. What the table says in figures, grid.png must show by eye.

Everything goes over gRPC through the Python client, like any customer's program would do it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from mooring import BatchError, BatchImage
from mooring.errors import AlreadyExistsError
from rich.markup import escape
from rich.table import Table

from mooring_server import dinghy
from mooring_server.cli_output import duration, err, fail, job_progress, out, short

if TYPE_CHECKING:
    import mooring
    from mooring.v1 import evaluation_pb2, job_pb2

    from mooring_server.evaluation.result import EvaluationResult

SCENES = 12
GENERIC = 24
ARMS = ("base", "none", "moored")

ROWS = (
    ("dino", "likeness to the photos, DINO", "↑"),
    ("clip_i", "likeness to the photos, CLIP-I", "↑"),
    ("clip_t", "new scenes as prompted, CLIP-T", "↑"),
    ("generic_clip_t", "other prompts as prompted, CLIP-T", "↑"),
    ("generic_change", "other prompts' pictures changed", "↓"),
    ("drift", "drift from the base", "↓"),
)
"""Metrics of the table: name, what it means, which way is good."""


@dataclass(frozen=True)
class Arm:
    """One column of the comparison.

    Attributes:
        label: "base", "none" or "moored".
        adapter: adapter version, "" for the base.
        seconds: training time, 0 for the base.
        budget: drift budget of its training.
        job: the evaluation.
        evaluation: its figures.
    """

    label: str
    adapter: str
    seconds: float
    budget: float | None
    job: job_pb2.Job
    evaluation: evaluation_pb2.Evaluation

    def metric(self, name: str) -> float | None:
        """A figure by name; the base's drift and change are 0 by definition."""
        if name == "drift" and self.evaluation.HasField("drift"):
            return self.evaluation.drift.value
        if not self.adapter and name in {"drift", "generic_change"}:
            return 0.0
        return next((m.value for m in self.evaluation.metrics if m.name == name), None)


class Demo:
    """One run of the demo.

    Args:
        client: of a server with the shipped base.
        subject: which held-out subject to learn.
        folder: where pictures and report go.
        steps: training steps of both adapters.
        seed: of training and pictures.
    """

    def __init__(
        self,
        client: mooring.Client,
        subject: dinghy.HeldOutSubject,
        folder: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        self._client, self._subject, self._folder = client, subject, folder
        self._steps, self._seed = steps, seed
        self._began = time.monotonic()

    def run(self) -> list[Arm]:
        """All of it; returns the arms in the order of `ARMS`."""
        with self._step(f"a subject from {len(self._subject.photos)} photos of {self._subject.name}"):
            self._create_subject()
        with self._step("the untouched base, measured first"):
            base = self._evaluate("base", "", 0.0, None)
        arms = [base]
        for label, method, preset in (("none", "none", ""), ("moored", "spectral", "balanced")):
            what = "unprotected (method none)" if label == "none" else "moored (method spectral, balanced)"
            with self._step(f"an adapter, {what}"):
                trained, budget = self._train(label, method, preset)
            with self._step(f"the same measurements, {label}"):
                arms.append(self._evaluate(label, trained.adapter, _seconds(trained), budget))
        with self._step(f"the same {SCENES} prompts drawn with base, none and moored"):
            self._draw(arms)
        with self._step("report and picture"):
            write_report(self._client, self._subject, arms, self._folder)
        return arms

    @property
    def seconds(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._began

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        err.print(f"[dim]{duration(self.seconds):>5}[/]  {escape(what)}")
        yield

    def _create_subject(self) -> None:
        subject = self._subject
        with suppress(AlreadyExistsError):  # of an earlier run on this state directory
            self._client.create_subject(
                subject.name,
                class_noun=subject.class_noun,
                placeholder=subject.placeholder,
                rights="licensed",
                statement=f"{subject.source}; {subject.licence}",
            )
        self._client.upload_photos(subject.name, subject.photos)

    def _train(self, label: str, method: str, preset: str) -> tuple[job_pb2.Job, float | None]:
        job = self._client.train(
            self._subject.name,
            adapter_id=f"{self._subject.name}-{label}",
            method=method,
            preset=preset,
            steps=self._steps,
            seed=self._seed,
            preview_every=0,
        )
        with job_progress(f"      {label}") as show:
            done = self._client.wait(job, on_event=show)
        adapter = self._client.get_adapter(done.adapter)
        return done, adapter.drift_budget if adapter.HasField("drift_budget") else None

    def _evaluate(self, label: str, adapter: str, seconds: float, budget: float | None) -> Arm:
        job = self._client.evaluate(
            adapter,
            subject=self._subject.name,
            prompts=dinghy.new_scene_prompts("{}")[:SCENES],
            generic_prompts=dinghy.generic_prompts(2 * GENERIC)[1::2],
            seeds=[self._seed],
            class_samples=0,
        )
        with job_progress(f"      {label}") as show:
            done = self._client.wait(job, on_event=show)
        return Arm(label, adapter, seconds, budget, done, self._client.get_evaluation(done))

    def _draw(self, arms: Sequence[Arm]) -> None:
        """Draw the prompts with every arm in one stream; the server mixes them as it likes."""
        noun, token = self._subject.class_noun, self._subject.placeholder
        requests = []
        for arm in arms:
            words = dinghy.new_scene_prompts(noun, token if arm.adapter else "")[:SCENES]
            requests += [
                (f"{arm.label}-{i:02}", {"prompt": prompt, "adapter": arm.adapter, "seed": self._seed})
                for i, prompt in enumerate(words)
            ]
        folder = self._folder / "images"
        folder.mkdir(parents=True, exist_ok=True)
        with err.status("") if err.is_terminal else _nothing() as status:
            drawn = 0
            for event in self._client.generate_batch(requests):
                if isinstance(event, BatchError):
                    raise event.error
                if isinstance(event, BatchImage):
                    drawn += 1
                    event.image.save(folder / f"{event.id}.png")
                    if status:
                        status.update(f"      {drawn} of {len(requests)} pictures")


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _seconds(job: job_pb2.Job) -> float:
    return float((job.end_time.ToDatetime() - job.start_time.ToDatetime()).total_seconds())


def choose_subject(name: str) -> dinghy.HeldOutSubject:
    """A shipped held-out subject by name.

    Raises:
        typer.Exit: there is none of that name; says which there are.
    """
    subjects = {subject.name: subject for subject in dinghy.held_out_subjects()}
    if name not in subjects:
        raise fail(f"There is no shipped subject {name!r}.", f"Choose one of {', '.join(subjects)}.", code=2)
    return subjects[name]


def figures_table(arms: Sequence[Arm]) -> Table:
    """The comparison as a table for the terminal; arrows say which way is good."""
    grid = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    grid.add_column("")
    for arm in arms:
        grid.add_column(arm.label, justify="right")
    for name, meaning, way in ROWS:
        values = [arm.metric(name) for arm in arms]
        if all(value is None for value in values):
            continue
        grid.add_row(f"{meaning} {way}", *("" if value is None else f"{value:.3f}" for value in values))
    grid.add_row("drift budget", *("" if arm.budget is None else f"{arm.budget:.3f}" for arm in arms))
    grid.add_row("training time", *(duration(arm.seconds) if arm.adapter else "" for arm in arms))
    return grid


def verdict(arms: Sequence[Arm]) -> list[str]:
    """What the figures say, in sentences made of the figures alone."""
    by = {arm.label: arm for arm in arms}
    base, none, moored = by["base"], by["none"], by["moored"]
    said = []
    drifts = none.metric("drift"), moored.metric("drift")
    if drifts[0] and drifts[1]:
        said.append(f"moored drifted {drifts[0] / drifts[1]:.1f} times less than none")
    if moored.budget and drifts[1]:
        said.append(f"its drift is {100 * (drifts[1] / moored.budget - 1):+.0f} % off its budget")
    for name, what in (("clip_t", "new scenes"), ("generic_clip_t", "other prompts")):
        kept = [arm.metric(name) for arm in (base, none, moored)]
        if None not in kept:
            reference, loose, tight = (value or 0.0 for value in kept)
            said.append(
                f"CLIP-T on {what}, against the base: none {loose - reference:+.3f}, "
                f"moored {tight - reference:+.3f}"
            )
    likeness = none.metric("dino"), moored.metric("dino")
    if likeness[0] is not None and likeness[1] is not None:
        said.append(f"likeness (DINO): moored {likeness[1] - likeness[0]:+.3f} against none")
    return said


def evaluation_result(client: mooring.Client, job: job_pb2.Job) -> EvaluationResult:
    """An evaluation with its pictures, put together from the job's artifacts."""
    from mooring_server.evaluation.result import EvaluationResult

    content: dict[str, Any] = json.loads(client.download_artifact(job, "evaluation.json"))
    for pair in content["pairs"]:
        for field, target in (("base_image", "base"), ("image", "adapted")):
            filename = pair.pop(field, "")
            picture = client.download_artifact(job, filename) if filename else None
            pair[target] = None if picture is None else base64.b64encode(picture).decode()
    return EvaluationResult.from_json(content)


def write_report(
    client: mooring.Client, subject: dinghy.HeldOutSubject, arms: Sequence[Arm], folder: Path
) -> None:
    """Write report.html, grid.png and figures.json."""
    from PIL import Image

    from mooring_server.evaluation import report

    results = [(arm.label, evaluation_result(client, arm.job)) for arm in arms]
    photos = [Image.open(path).convert("RGB") for path in subject.photos]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(
        report.render(results, photos=photos, title=f"Mooring demo: {subject.name}"), encoding="utf-8"
    )
    report.grid(results, photos=photos).save(folder / "grid.png")
    figures = {
        arm.label: {
            "adapter": short(arm.adapter),
            "budget": arm.budget,
            "training_seconds": arm.seconds,
            **{name: arm.metric(name) for name, _, _ in ROWS},
        }
        for arm in arms
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_outcome(
    demo: Demo, arms: Sequence[Arm], subject: dinghy.HeldOutSubject, folder: Path, state: str
) -> None:
    """The table, where everything lies, and what to try next."""
    out.print()
    out.print(figures_table(arms))
    out.print()
    for line in verdict(arms):
        out.print(f"  {line}")
    out.print(f"\nin {duration(demo.seconds)}:")
    for name, what in (
        ("grid.png", "what the table says, to look at"),
        ("report.html", "every prompt, picture and figure, the certificates"),
        ("images/", "what each adapter drew"),
    ):
        out.print(f"  {escape(str(folder / name)):<28} {what}", soft_wrap=True)
    moored = short(arms[-1].adapter)
    example = dinghy.photo_prompt(subject.class_noun, subject.placeholder)
    # without an activated environment the plain name would not be found
    mooring = "mooring" if which("mooring") else os.path.relpath(sys.argv[0])
    out.print("\ntry next:")
    for command in (
        f'{mooring} generate "{example} on the grass" --adapter {moored} --count 4 {state}',
        f"{mooring} adapters publish {moored} {state}",
        f"{mooring} adapters show {moored} {state}",
        f"{mooring} train {subject.name} --preset conservative {state}",
        f"{mooring} subjects create rex ./your-photos --class dog --rights owned",
    ):
        out.print(f"  {escape(command)}", style="cyan", soft_wrap=True)
