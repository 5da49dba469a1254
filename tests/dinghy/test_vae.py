"""The codec halves three times, learns, and its loop resumes where it stopped, bit for bit."""

from __future__ import annotations

import pytest
import torch
from mooring_server.dinghy import codec as either
from mooring_server.dinghy import vae as codec
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.preset import LARGE
from mooring_server.dinghy.render import Renderer, lay_out
from mooring_server.dinghy.world import World

CPU = choose("cpu")


def test_latents_are_an_eighth_of_the_side():
    vae = codec.build_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(2, 3, 128, 128)).latent_dist.mean
        assert latents.shape == (2, codec.LATENT_CHANNELS, 16, 16)
        assert vae.decode(latents).sample.shape == (2, 3, 128, 128)


def _train(folder, sprites, steps):
    plan = Plan(steps=steps, batch=2, warmup_steps=1, decay=1e-9)
    return codec.train_codec(folder, World(LARGE, 2, sprites), Renderer(sprites, 32), CPU, plan)


@pytest.fixture
def small(monkeypatch):
    """A codec of a tenth of the width, so that a step takes milliseconds."""
    from diffusers import AutoencoderKL

    monkeypatch.setattr(
        codec, "build_vae", lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 32), latent_channels=4, norm_num_groups=8,
        ),
    )  # fmt: skip
    monkeypatch.setattr(codec, "set_scale", lambda vae, *_: vae.register_to_config(scaling_factor=1.0))


def test_codec_learns_and_a_resumed_run_is_the_uninterrupted_one(small, sprites, tmp_path):
    del small
    renderer = Renderer(sprites, 32)
    world = World(LARGE, 2, sprites)
    pixels = renderer.draw(lay_out([world.sample(i) for i in range(8)]))
    whole = _train(tmp_path / "whole", sprites, 12)
    torch.manual_seed(2)
    assert either.psnr(whole, pixels) > either.psnr(codec.build_vae().eval(), pixels) + 1
    _train(tmp_path / "parts", sprites, 6)
    resumed = _train(tmp_path / "parts", sprites, 12)
    assert not list((tmp_path / "parts").glob("*.part"))
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
