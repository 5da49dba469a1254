"""What the demo makes of its figures; the run itself is `make demo`."""

from __future__ import annotations

import pytest
import typer
from mooring.v1 import evaluation_pb2, job_pb2
from mooring_server import demo, dinghy
from rich.console import Console


def arm(label: str, *, budget: float | None = None, drift: float | None = None, **metrics: float) -> demo.Arm:
    evaluation = evaluation_pb2.Evaluation(
        metrics=[evaluation_pb2.Metric(name=name, value=value) for name, value in metrics.items()]
    )
    if drift is not None:
        evaluation.drift.value = drift
    adapter = "" if label == "base" else f"tenants/local/adapters/duck-{label}@1"
    return demo.Arm(label, adapter, 75.0, budget, job_pb2.Job(), evaluation)


ARMS = [
    arm("base", clip_t=0.30, dino=0.40, generic_clip_t=0.29),
    arm("none", drift=0.60, clip_t=0.22, dino=0.62, generic_clip_t=0.20),
    arm("moored", drift=0.11, budget=0.12, clip_t=0.29, dino=0.60, generic_clip_t=0.28),
]


def test_the_verdict_is_made_of_the_figures() -> None:
    assert demo.verdict(ARMS) == [
        "moored drifted 5.5 times less than none",
        "its drift is -8 % off its budget",
        "CLIP-T on new scenes, against the base: none -0.080, moored -0.010",
        "CLIP-T on other prompts, against the base: none -0.090, moored -0.010",
        "likeness (DINO): moored -0.020 against none",
    ]


def test_the_verdict_leaves_out_what_was_not_measured() -> None:
    assert demo.verdict([arm("base"), arm("none"), arm("moored", budget=0.12)]) == []


def test_the_table_has_every_figure_and_leaves_unmeasured_ones_out() -> None:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(demo.figures_table(ARMS))
    said = capture.get()
    drift = next(line for line in said.splitlines() if line.startswith("drift from"))
    assert drift.split()[-3:] == ["0.000", "0.600", "0.110"]
    assert "CLIP-I" not in said
    assert next(line for line in said.splitlines() if line.startswith("drift budget")).split()[-1] == "0.120"


def test_twelve_new_scenes_are_drawn_for_every_shipped_subject() -> None:
    for subject in dinghy.held_out_subjects():
        prompts = dinghy.new_scene_prompts(subject.class_noun, subject.placeholder)[: demo.SCENES]
        assert len(set(prompts)) == demo.SCENES == 12
        assert len(subject.photos) == 12


def test_an_unknown_subject_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        demo.choose_subject("unicorn")
    assert "duck" in capsys.readouterr().err
