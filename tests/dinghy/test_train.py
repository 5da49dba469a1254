"""The text-to-image trainer: a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from mooring_server.dinghy.curves import draw, read_log
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.preset import SHIPPED, SMALL
from mooring_server.dinghy.t2i import Trainer
from PIL import Image

PLAN = Plan(steps=2, batch=2, warmup_steps=2, decay=1e-9)
CPU = choose("cpu")


def _run(trainer, upto):
    """Steps on fixed latents: the loop's own resuming is what is under test."""

    def loss(step, _):
        latents = torch.randn(2, SHIPPED.channels, 16, 16, generator=torch.Generator().manual_seed(step))
        return trainer.loss(step, latents, trainer.empty.expand(2, -1))

    trainer.loop.run(iter(lambda: 0, 1), loss, stop_after=upto - trainer.loop.step)
    return trainer


def _weights(trainer):
    return torch.cat([p.detach().flatten() for p in [*trainer.unet.parameters(), *trainer.loop.average]])


def test_resumed_equals_uninterrupted(tmp_path):
    whole = _run(Trainer(tmp_path / "whole", CPU, PLAN), 2)
    assert whole.started.startswith("nothing")
    _run(Trainer(tmp_path / "parts", CPU, PLAN), 1)
    second = Trainer(tmp_path / "parts", CPU, PLAN)
    assert second.started == "checkpoint at step 1"
    _run(second, 2)
    assert second.loop.step == whole.loop.step == 2
    assert torch.equal(_weights(whole), _weights(second))
    assert not list((tmp_path / "parts").glob("*.part"))
    lines = [json.loads(x) for x in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2


def test_the_rate_warms_up_stays_and_falls_to_three_percent():
    plan = Plan(steps=1000, batch=1, warmup_steps=10, decay=0.5)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(400) == 1.0
    assert plan.rate(750) == pytest.approx(0.5)
    assert plan.rate(999) == pytest.approx(0.03)


def test_the_small_preset_builds_and_takes_a_step(tmp_path):
    trainer = Trainer(tmp_path / "small", CPU, PLAN, preset=SMALL)
    latents = torch.randn(2, SMALL.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(trainer.loss(0, latents, trainer.empty.expand(2, -1)))


def test_what_objects_cover_counts_more_until_the_rate_has_fallen(tmp_path):
    plan = Plan(steps=1000, batch=2, warmup_steps=1, decay=0.5)
    trainer = Trainer(tmp_path / "run", CPU, plan)
    latents = torch.randn(2, SHIPPED.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = trainer.empty.expand(2, -1)
    half = torch.zeros(2, 1, 16, 16)
    half[..., :8] = 1
    with torch.no_grad():
        early, late = (
            [float(trainer.loss(step, latents, ids, cover)) for cover in (None, half, 1 - half)]
            for step in (100, 999)
        )
    # the two halves' weights are 1.5 and 0.5 of the mean at the peak, nearly one at the end
    assert early[1] + early[2] == pytest.approx(2 * early[0], rel=1e-5)
    assert abs(late[1] - late[0]) < 0.1 * abs(early[1] - early[0])


def test_committed_weights_are_a_starting_point(tmp_path):
    source = Trainer(tmp_path / "source", CPU, PLAN)
    with torch.no_grad():
        next(source.unet.parameters()).add_(1.0)
    source.unet.save_pretrained(tmp_path / "base" / "unet")
    source.encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    other = Trainer(tmp_path / "other", CPU, replace(PLAN, steps=3), tmp_path / "base")
    assert other.started == "committed weights"
    for a, b in zip(source.unet.parameters(), other.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_diverges_says_so(tmp_path):
    trainer = Trainer(tmp_path / "run", CPU, PLAN)
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.loop.run(iter(lambda: 0, 1), lambda *_: sum(p.sum() for p in trainer.loop.average) * 0
                         + next(trainer.unet.parameters()).sum() * float("nan"))  # fmt: skip


def test_curves_are_drawn_from_logs(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"samples": 48 * k, "loss": 1 / k}) + "\n" for k in range(1, 9)))
    draw({"run": read_log(log)}, tmp_path / "curve.png", "loss")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (640, 320)
        assert len(image.getcolors(100_000)) > 3
