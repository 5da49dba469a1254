"""The codec's encoder is exactly the PCA, at every patch size; the loop resumes where it stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mooring_server.dinghy.loop import Loop, Optimisers, Plan
from mooring_server.dinghy.vae import (
    VAE_STD,
    build_vae,
    decoder_loss,
    fit_pca,
    from_features,
    load_pca,
    psnr,
    save_pca,
    to_features,
)
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


def test_pca_is_orthonormal_and_its_inverse_is_the_best_linear_one(tmp_path):
    pixels = _pictures()
    pca = fit_pca(pixels, 2)
    assert np.allclose(pca.basis @ pca.basis.T, np.eye(12), atol=1e-9)
    features = to_features(pixels, 2)
    restored = pca.decode(pca.encode(features))
    error = (restored - features).square().mean()
    total = (features - features.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error / total) < 0.05
    save_pca(pca, tmp_path / "pca.npz")
    assert np.array_equal(load_pca(tmp_path / "pca.npz").basis, pca.basis)


def test_features_are_a_permutation_of_pixels():
    pixels = _pictures(2)
    assert torch.equal(from_features(to_features(pixels, 2), 2), pixels)


def test_full_pca_restores_everything():
    pixels = _pictures(8)
    pca = fit_pca(pixels, 1, channels=12)
    restored = from_features(pca.decode(pca.encode(to_features(pixels, 1))), 1)
    torch.testing.assert_close(restored, pixels, atol=1e-4, rtol=0)


def _loop(folder, minutes=60.0):
    torch.manual_seed(0)
    vae = build_vae(fit_pca(_pictures(), 2), decoder_blocks=(0, 0, 1), decoder_width=32)
    plan = Plan(minutes=minutes, muon_lr=0.01, adam_lr=1e-3, warmup_steps=1)
    return vae, Loop(folder, {"vae": vae}, Optimisers([vae.decoder], [], 0.01, 1e-3), plan, 4)


def test_decoder_learns_and_resumes(tmp_path):
    pixels = _pictures(8)
    vae, loop = _loop(tmp_path)
    loss = lambda step: decoder_loss(vae, pixels, torch.zeros(8, 12, 16, 16))  # noqa: E731
    before = psnr(vae, pixels)
    for _ in range(25):
        loop.run(loss, minutes=1e-9)  # one step a call
        if loop.step >= 25:
            break
    assert loop.step == 25
    assert psnr(vae, pixels) > before + 3
    again, resumed = _loop(tmp_path)
    assert resumed.step == 25
    for a, b in zip(vae.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))
    resumed.use_average()
    assert psnr(again, pixels) > before


def test_encoder_never_trains():
    vae = build_vae(fit_pca(_pictures(), 2), decoder_blocks=(0, 0, 1), decoder_width=32)
    assert not any(p.requires_grad for p in vae.encoder.parameters())
    assert all(p.requires_grad for p in vae.decoder.parameters())
