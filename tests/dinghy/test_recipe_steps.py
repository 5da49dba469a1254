"""The recipe's steps, each for a step or two: what they write, and what they leave alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from mooring_server import dinghy
from mooring_server.dinghy import classifier, patches, recipe, render, sources, t2i, world
from mooring_server.dinghy.classifier import classifier_loop, load_ruler
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.preset import SHIPPED, SMALL
from mooring_server.dinghy.recipe import Recipe


@pytest.fixture
def empty(sprites, monkeypatch, tmp_path):
    """No weights and no cache, stand-in artwork, few backgrounds."""
    monkeypatch.setattr(sources, "load_sprites", lambda: sprites)
    monkeypatch.setenv("MOORING_DINGHY_CACHE", str(tmp_path / "cache"))
    for module in (dinghy, recipe):
        monkeypatch.setattr(module, "weights_dir", lambda: tmp_path / "weights")
    for module in (world, render):
        monkeypatch.setattr(module, "VARIANTS", 2)
    fitting = patches.fitting_pictures
    monkeypatch.setattr(patches, "fitting_pictures", lambda *drawn: fitting(*drawn, count=50))
    (tmp_path / "weights").mkdir()
    return tmp_path


def _steps() -> Recipe:
    return Recipe(SMALL, "cpu", scale=1e-6, batch=2)


def _tensors(part) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in part.state_dict().items()}


def test_a_base_from_nothing_then_its_decoder(empty):
    _steps().base()
    folder = dinghy.base_dir(SMALL.version)
    before = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    unet, vae = _tensors(before.unet), _tensors(before.vae)
    _steps().decoder()
    after = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert all(torch.equal(value, unet[name]) for name, value in after.unet.state_dict().items())
    changed = {name for name, value in after.vae.state_dict().items() if not torch.equal(value, vae[name])}
    assert changed
    assert not [name for name in changed if name.startswith("encoder")]
    manifest = json.loads((empty / "weights" / "MANIFEST.json").read_text())
    assert manifest["version"] == SHIPPED.version
    for part in ("base", "decoder"):
        trained = manifest["figures"][SMALL.version]["training"][part]
        assert (trained["steps"], trained["samples"]) == (1, 2)
    assert f"{SMALL.version}/unet/diffusion_pytorch_model.safetensors" in manifest["files"]


def test_a_run_that_goes_on_keeps_its_latents(empty, monkeypatch):
    first = _steps().codec()
    monkeypatch.setattr(patches, "fit_pca", lambda *_: pytest.fail("fitted anew"))
    again = _steps().codec()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_ruler_is_exported_and_gone_on_with(empty):
    _steps().ruler()
    folder = dinghy.ruler_dir(SMALL.version)
    first = _tensors(load_ruler(folder, SMALL))
    shutil.rmtree(empty / "cache")
    model, loop = classifier_loop(empty / "run", SMALL, choose("cpu"), classifier.PLAN, folder)
    assert loop.step == 0
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert _steps().bench().ruler.names == SMALL.names


def test_a_decoder_needs_a_base(empty):
    with pytest.raises(typer.BadParameter, match="dinghy-1 has no base yet"):
        _steps().decoder()


def test_plans_on_a_cpu_take_its_own_batch_and_steps(empty):
    whole = Recipe(SMALL, "cpu").plan(t2i.PLAN)
    assert (whole.steps, whole.batch) == (t2i.PLAN.cpu_steps, t2i.PLAN.cpu_batch)
    part = Recipe(SMALL, "cpu", scale=0.01, batch=7).plan(patches.PLAN)
    assert (part.steps, part.batch, part.warmup_steps) == (patches.PLAN.steps // 100, 7, 3)
