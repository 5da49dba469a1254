"""The text-to-image trainer: a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from mooring_server.dinghy import sources
from mooring_server.dinghy.curves import draw, read_log
from mooring_server.dinghy.t2i import Settings, Trainer, branch
from mooring_server.dinghy.vae import fit_pca, save_pca
from mooring_server.dinghy.world import World
from PIL import Image


@pytest.fixture
def world(sprites, tmp_path, monkeypatch):
    monkeypatch.setenv("MOORING_DINGHY_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    save_pca(
        fit_pca(torch.rand(20, 3, 64, 64, generator=generator), 2), sources.cache_dir() / "pca-64px-v1.npz"
    )
    return World(seed=1, sprites=sprites)


def _trainer(world, name, **changes):
    return Trainer(sources.cache_dir() / name, Settings(batch=2, warmup_steps=2, **changes), world)


def _weights(trainer):
    return torch.cat([p.detach().flatten() for p in [*trainer.unet.parameters(), *trainer.average]])


def test_resumed_equals_uninterrupted(world):
    whole = _trainer(world, "whole")
    assert whole.resume().startswith("nothing")
    for _ in range(2):
        whole.train_step()
    first = _trainer(world, "parts")
    first.train_step()
    first.save()
    branch("parts", "copy")
    second = _trainer(world, "copy")
    assert second.resume() == "checkpoint at step 1"
    second.train_step()
    assert second.step == whole.step == 2
    assert torch.equal(_weights(whole), _weights(second))
    assert not list((sources.cache_dir() / "parts").glob("*.part"))


def test_decay_lowers_the_rate_and_stops(world):
    trainer = _trainer(world, "decay", decay_minutes=1e-4, sheet_minutes=1e9)
    trainer.step = 10
    assert trainer.rate() == 1.0
    trainer.decay_start = 0.0
    trainer.seconds = 0.5 * 60e-4
    assert trainer.rate() == pytest.approx(0.5)
    trainer.seconds = 1.0
    assert trainer.rate() == pytest.approx(0.03)


def test_committed_weights_are_a_starting_point(world, tmp_path):
    source = _trainer(world, "source")
    source.unet.save_pretrained(tmp_path / "base" / "unet")
    source.encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    torch.manual_seed(99)
    other = Trainer(sources.cache_dir() / "other", Settings(seed=2, batch=2), world)
    assert other.resume(tmp_path / "base") == "committed weights"
    assert torch.equal(_weights(source), _weights(other))


def test_curves_are_drawn_from_logs(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"samples": 48 * k, "loss": 1 / k}) + "\n" for k in range(1, 9)))
    draw({"run": read_log(log)}, tmp_path / "curve.png", "loss")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (640, 320)
        assert len(image.getcolors(100_000)) > 3
