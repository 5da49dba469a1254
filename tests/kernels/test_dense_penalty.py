"""Penalties of full fine-tuning against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from mooring_kernels.dense import DensePenalty, decay_to_
from mooring_kernels.dense.reference import reference

SHAPES = [(300, 40), (17, 63), (8, 4, 3, 3), (1, 5)]


def make(size=1.0, dtype=torch.float32, seed=0):
    """Base weights and weights a little away from them, with a leading direction."""
    generator = torch.Generator().manual_seed(seed)
    base = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    moved = []
    for start in base:
        update = torch.randn(start.shape, generator=generator).flatten(1)
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        s = s * 0.7 ** torch.arange(len(s))
        moved.append((start.float() + size * ((u * s) @ vh).view_as(start)).to(dtype))
    return base, moved


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_sigma_and_gradient_converge_to_the_reference(size):
    base, weights = make(size)
    gains = torch.tensor([0.5, 1.0, 2.0, 1.0])
    value, expected = reference(weights, base, "spectral", gains.tolist())
    dense = DensePenalty(base)
    gradients = [torch.ones_like(t) for t in weights]
    before = [g.clone() for g in gradients]
    dense.step(weights, sweeps=60)
    sigma = dense.add_gradient_(weights, gradients, torch.tensor(0.7), gains=gains)
    assert float((gains * sigma.square()).sum()) == pytest.approx(value, rel=1e-5)
    for found, start, want in zip(gradients, before, expected, strict=True):
        share = (found - start).double()
        scale = float(want.abs().max())
        torch.testing.assert_close(share, 0.7 * want, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_one_sweep_per_step_follows_a_moving_update():
    base, weights = make()
    dense = DensePenalty(base)
    dense.step(weights, sweeps=10)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        for theta in weights:
            theta.add_(torch.randn(theta.shape, generator=generator), alpha=1e-3)
        sigma = dense.step(weights)
    exact = [torch.linalg.matrix_norm((t - b).flatten(1), 2) for t, b in zip(weights, base, strict=True)]
    torch.testing.assert_close(sigma, torch.stack(exact), rtol=1e-3, atol=0)
    assert (sigma <= torch.stack(exact) * (1 + 1e-5)).all(), "power iteration never exceeds the norm"


def test_a_zero_update_is_zero_and_recovers():
    base, weights = make()
    dense = DensePenalty(base)
    gradients = [torch.zeros_like(t) for t in base]
    assert not dense.add_gradient_(base, gradients, 1.0).any()
    assert not any(bool(g.any()) for g in gradients)
    assert (dense.step(weights, sweeps=20) > 0).all()


def test_small_updates_of_bfloat16_weights_keep_their_digits():
    base, weights = make(0.1, torch.bfloat16)
    sigma = DensePenalty(base).step(weights, sweeps=60)
    exact = [
        torch.linalg.matrix_norm((t.double() - b.double()).flatten(1), 2)
        for t, b in zip(weights, base, strict=True)
    ]
    torch.testing.assert_close(sigma.double(), torch.stack(exact), rtol=1e-4, atol=0)


def test_descent_on_the_penalty_returns_to_the_base():
    base, weights = make()
    dense = DensePenalty(base)
    dense.step(weights, sweeps=20)
    start = float(dense.sigma.max())
    for _ in range(200):
        gradients = [torch.zeros_like(t) for t in weights]
        dense.add_gradient_(weights, gradients, 1.0)
        for theta, gradient in zip(weights, gradients, strict=True):
            theta.sub_(gradient, alpha=0.05)
    assert float(dense.sigma.max()) < 0.2 * start


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)])
def test_decay_is_a_gradient_step_on_the_l2_penalty(rate):
    base, weights = make()
    _, gradients = reference(weights, base, "l2")
    # rate = 2·lr·λ, and the gradient of λ‖θ − θ₀‖² holds the 2
    expected = [t.double() - 0.125 * g for t, g in zip(weights, gradients, strict=True)]
    decay_to_(weights, base, rate)
    for found, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)


def test_foreign_shapes_are_refused():
    base, weights = make()
    dense = DensePenalty(base)
    with pytest.raises(ValueError, match="layer 1 of 4"):
        dense.step([weights[0], weights[1].mT, *weights[2:]])
    with pytest.raises(ValueError, match="layer 3 of 4"):
        dense.step(weights[:3])
    with pytest.raises(ValueError, match="at least one layer"):
        DensePenalty([])
