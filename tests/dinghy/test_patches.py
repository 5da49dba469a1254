"""The codec: its encoder is exactly the PCA, at every patch size, and never trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mooring_server.dinghy.codec import encode, encoder, psnr
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.patches import (
    VAE_STD,
    build_vae,
    channel_weights,
    fit_codec,
    fit_pca,
    from_features,
    read_pca,
    to_features,
    train_decoder,
)
from mooring_server.dinghy.preset import SMALL
from mooring_server.dinghy.render import Renderer, lay_out
from mooring_server.dinghy.world import World
from torch import nn


def _pictures(count: int = 40, px: int = 64) -> torch.Tensor:
    """Smooth random pictures in [0, 1]: neighbouring pixels are alike, as in the world."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, px // 8, px // 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=px, mode="bicubic").clamp(0, 1)
    return (smooth + 0.03 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(("stages", "channels"), [(2, 12), (3, 16)])
def test_encoder_equals_pca(stages, channels):
    pixels = _pictures()
    pca = fit_pca(pixels, stages, channels)
    vae = build_vae(pca, decoder_blocks=(0,) * stages + (1,), decoder_width=8)
    expected = pca.encode(to_features(pixels, stages))
    actual = vae.encode(pixels * 2 - 1).latents
    assert actual.shape == (40, channels, 64 // 2**stages, 64 // 2**stages)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert float(actual.square().mean().sqrt()) == pytest.approx(VAE_STD, rel=1e-3)
    assert vae.config.scaling_factor == pytest.approx(1 / VAE_STD)


def test_pca_is_orthonormal_and_its_inverse_is_the_best_linear_one():
    pixels = _pictures()
    pca = fit_pca(pixels, 2, 12)
    assert np.allclose(pca.basis @ pca.basis.T, np.eye(12), atol=1e-9)
    features = to_features(pixels, 2)
    restored = pca.decode(pca.encode(features))
    error = (restored - features).square().mean()
    total = (features - features.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error / total) < 0.05


def test_an_error_in_a_channel_costs_its_weight_in_pixels():
    pixels = _pictures()
    pca = fit_pca(pixels, 2, 12)
    weights = channel_weights(build_vae(pca, decoder_blocks=(0, 0, 1), decoder_width=8))
    latents = pca.encode(to_features(pixels, 2))
    restored = pca.decode(latents)
    costs = []
    for channel in range(12):
        moved = latents.clone()
        moved[:, channel] += 0.01
        costs.append((pca.decode(moved) - restored).square().mean())
    cost = torch.stack(costs)
    torch.testing.assert_close(weights, cost / cost.mean(), rtol=1e-3, atol=1e-4)


def test_features_are_a_permutation_of_pixels():
    pixels = _pictures(2)
    assert torch.equal(from_features(to_features(pixels, 2), 2), pixels)


def test_full_pca_restores_everything():
    pixels = _pictures(8)
    pca = fit_pca(pixels, 1, channels=12)
    restored = from_features(pca.decode(pca.encode(to_features(pixels, 1))), 1)
    torch.testing.assert_close(restored, pixels, atol=1e-4, rtol=0)


def test_encoder_never_trains_and_the_decoder_learns(sprites, tmp_path):
    world, renderer = World(SMALL, 2, sprites), Renderer(sprites, 32)
    pixels = renderer.draw(lay_out([world.sample(i) for i in range(8)]))

    def train(steps):
        plan = Plan(steps=steps, batch=2, warmup_steps=1, decay=1e-9 if steps == 1 else 1.0)
        codec = fit_codec(world, renderer)
        kept = train_decoder(
            tmp_path, codec, world, renderer, choose("cpu"), plan, lambda latents, *_: latents
        )
        return kept[0]

    first = train(1)
    before, encoder = psnr(first, pixels), [p.clone() for p in first.encoder.parameters()]
    after = train(25)
    assert psnr(after, pixels) > before + 3
    assert not any(p.requires_grad for p in after.encoder.parameters())
    for a, b in zip(encoder, after.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_pca_is_read_back_from_the_encoder():
    pixels = _pictures()
    pca = fit_pca(pixels, 3, 20)
    read = read_pca(build_vae(pca, decoder_blocks=(0, 0, 0, 1), decoder_width=8))
    assert read.stages == 3
    features = to_features(pixels, 3)
    torch.testing.assert_close(read.encode(features), pca.encode(features), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_quick_encoder_gives_what_the_codec_gives():
    pixels = _pictures()
    codec = build_vae(fit_pca(pixels, 3, 20), decoder_blocks=(0, 0, 0, 1), decoder_width=8)
    quick = encoder(codec)(pixels)
    torch.testing.assert_close(quick, encode(codec, pixels), atol=2e-3, rtol=1e-3)
