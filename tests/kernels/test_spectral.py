"""The batched op against its float64 reference, finite differences and the hard cases of the formula."""

from __future__ import annotations

import pytest
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import KINDS, add_gradient_, penalty, value
from mooring_kernels.spectral.reference import reference

MIXED = [(16, 24), (63, 31), (16, 24), (1, 5), (5, 1), (100, 16), (16, 24)]


def make(shapes=MIXED, rank=4, seed=0, dtype=torch.float32):
    layout = ArenaLayout([LayerShape(f"l{i}", o, n) for i, (o, n) in enumerate(shapes)], rank)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(layout.size, dtype=dtype)
    for a, b in layout.views(flat).values():
        a.normal_(generator=generator)
        b.normal_(generator=generator)
    return layout, flat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_reference(kind, rank, weighted):
    layout, flat = make(rank=rank)
    weights = torch.linspace(0.0, 2.0, len(layout.layers)) if weighted else None
    expected, gradient = reference(layout, flat, kind, weights)
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 0.7, kind=kind, weights=weights)
    assert value(layout, flat, kind, state, weights) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        grad.double(), 0.7 * gradient, rtol=2e-4, atol=2e-4 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_agrees_with_finite_differences(kind):
    layout, flat = make([(7, 9), (5, 12), (7, 9)], rank=3, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0])
    grad = torch.zeros_like(flat)
    add_gradient_(layout, flat, grad, 1.0, kind=kind, weights=weights)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(layout.size, dtype=torch.float64, generator=generator)
        h = 1e-6

        def at(sign, kind=kind, direction=direction, h=h):
            moved = flat + sign * h * direction
            return value(layout, moved, kind, penalty(layout, moved), weights)

        slope = (at(1) - at(-1)) / (2 * h)
        # padding elements of `direction` change nothing, and the gradient there is zero
        assert slope == pytest.approx(float(grad @ direction), rel=1e-5)


def test_norms_are_those_of_the_dense_product():
    layout, flat = make()
    state = penalty(layout, flat)
    for index, (a, b) in enumerate(layout.views(flat.double()).values()):
        delta = b @ a
        assert float(state.fro2[index]) == pytest.approx(float((delta**2).sum()), rel=1e-6)
        assert float(state.sigma2[index]) == pytest.approx(
            float(torch.linalg.matrix_norm(delta, 2) ** 2), rel=1e-6
        )


@pytest.mark.parametrize("kind", ["spectral", "l2"])
def test_zero_b_gives_exactly_zero(kind):
    layout, flat = make()
    for _, b in layout.views(flat).values():
        b.zero_()
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 1.0, kind=kind)
    assert not state.sigma2.any()
    assert not state.fro2.any()
    assert not grad.any()
    assert state.sigma_max == 0.0


def test_one_zero_layer_among_others_stays_zero():
    layout, flat = make()
    layout.views(flat)["l2"][1].zero_()
    grad = torch.zeros_like(flat)
    add_gradient_(layout, flat, grad, 1.0)
    assert torch.isfinite(grad).all()
    grad_a, grad_b = layout.views(grad)["l2"]
    assert not grad_a.any()
    assert not grad_b.any()
    assert layout.views(grad)["l0"][1].any()


def test_a_sixteenfold_tie_gives_a_subgradient_of_the_right_size():
    layout = ArenaLayout([LayerShape("tied", 32, 24)], 16)
    flat = torch.zeros(layout.size)
    a, b = layout.views(flat)["tied"]
    a.copy_(torch.eye(16, 24))
    b.copy_(3.0 * torch.eye(32, 16))
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 1.0)
    assert float(state.sigma2[0]) == pytest.approx(9.0, rel=1e-9)
    _, grad_b = layout.views(grad)["tied"]
    # any convex combination of 2σ·u_i·(A v_i)ᵀ has inner product 2σ² with B
    assert float((grad_b * b).sum()) == pytest.approx(18.0, rel=1e-5)
    assert float(torch.linalg.matrix_norm(grad_b, 2)) == pytest.approx(6.0, rel=1e-5)


def test_rank_one_update_in_a_rank_eight_arena():
    layout, flat = make([(20, 30)], rank=8)
    a, b = layout.views(flat)["l0"]
    a[1:] = 0.0
    b[:, 1:] = 0.0
    state = penalty(layout, flat)
    expected = float(a[0].double().norm() ** 2 * b[:, 0].double().norm() ** 2)
    assert float(state.sigma2[0]) == pytest.approx(expected, rel=1e-5)
    assert float(state.fro2[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_scale_of_the_factors_does_not_matter(scale):
    layout, flat = make(rank=8)
    for _, b in layout.views(flat).values():
        b.mul_(scale)
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 1.0)
    expected, gradient = reference(layout, flat, "spectral")
    assert value(layout, flat, "spectral", state) == pytest.approx(expected, rel=1e-5)
    for name, (grad_a, grad_b) in layout.views(grad).items():
        ref_a, ref_b = layout.views(gradient)[name]
        torch.testing.assert_close(grad_a.double(), ref_a, rtol=1e-3, atol=1e-3 * ref_a.abs().max().item())
        torch.testing.assert_close(grad_b.double(), ref_b, rtol=1e-3, atol=1e-3 * ref_b.abs().max().item())


def test_gradient_is_added_and_padding_untouched():
    layout, flat = make([(3, 5)], rank=1)
    grad = torch.full_like(flat, torch.nan)
    for a, b in layout.views(grad).values():
        a.fill_(1.0)
        b.fill_(1.0)
    add_gradient_(layout, flat, grad, 0.0)
    a, b = layout.views(grad)["l0"]
    assert (a == 1.0).all()
    assert (b == 1.0).all()
    add_gradient_(layout, flat, grad, 0.5)
    expected = 0.5 * reference(layout, flat, "spectral")[1]
    ref_a, ref_b = layout.views(expected)["l0"]
    torch.testing.assert_close(a.double() - 1.0, ref_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.double() - 1.0, ref_b, rtol=1e-4, atol=1e-5)
    assert torch.isnan(grad).any(), "padding must not be written"


def test_descent_reaches_zero_smoothly():
    layout, flat = make(rank=4)
    before = penalty(layout, flat).sigma_max
    for _ in range(300):
        grad = torch.zeros_like(flat)
        add_gradient_(layout, flat, grad, 1.0)
        flat -= 2e-3 * grad
    assert penalty(layout, flat).sigma_max < 0.2 * before


def test_repeated_calls_are_bitwise_equal():
    layout, flat = make(rank=8)
    one, two = torch.zeros_like(flat), torch.zeros_like(flat)
    add_gradient_(layout, flat, one, 1.0)
    add_gradient_(layout, flat, two, 1.0)
    assert torch.equal(one, two)


def test_unknown_kind_is_refused():
    layout, flat = make()
    with pytest.raises(ValueError, match="spectral, l2, factor_decay"):
        add_gradient_(layout, flat, torch.zeros_like(flat), 1.0, kind="nuclear")


@pytest.mark.parametrize("rank", [16, 64])
def test_factors_that_nearly_cancel_stay_finite(rank):
    # B is huge where A is zero but for rounding: the trace of the rounded G_B·G_A may come out negative
    for seed in range(4):
        layout, flat = make([(300, 400)] * 3, rank, seed)
        generator = torch.Generator().manual_seed(seed)
        for a, b in layout.views(flat).values():
            lost = torch.nn.functional.normalize(torch.randn(rank, 1, generator=generator), dim=0)
            a.sub_(lost @ (lost.mT @ a))
            b.add_(torch.randn(300, 1, generator=generator) @ lost.mT, alpha=1e5)
        grad = torch.zeros_like(flat)
        state = add_gradient_(layout, flat, grad, 1.0)
        assert torch.isfinite(state.sigma2).all()
        assert torch.isfinite(grad).all()
