"""The Triton kernels against the float64 reference: on a CUDA device, or in Triton's interpreter.

Not collected by name: `test_spectral_triton.py` runs it in processes of its own. By hand, also where the
project's pytest plug-ins are missing:

    PYTHONPATH=kernels python -m pytest -c /dev/null --noconftest tests/kernels/spectral_cases.py

The interpreter takes 6 to 30 ms for a program, so the networks are small. It computes tf32x3 as float32.
"""

from __future__ import annotations

import os

import pytest
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import KINDS, add_gradient_, decay_, penalty, spectral_cap_, spectral_penalty
from mooring_kernels.spectral.reference import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

SLOT = 1
# relative to the norm of a factor's gradient; bfloat16 rounds where the gradient is stored, not the sums
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 5e-3}
SHAPES = [(63, 31), (16, 1000), (1, 5), (48, 24)]


def make(shapes=SHAPES, rank=4, dtype=torch.float32, seed=0, scale=1.0):
    """A bank of three slots: slot 1 holds factors, all else and the padding are NaN."""
    layout = ArenaLayout([LayerShape(f"l{i}", *shape) for i, shape in enumerate(shapes)], rank)
    generator = torch.Generator().manual_seed(seed)
    bank = torch.full((3, layout.size), torch.nan, dtype=dtype)
    for a, b in layout.views(bank[SLOT]).values():
        a.copy_(torch.randn(a.shape, generator=generator))
        # singular values spread as training spreads them
        b.copy_(scale * torch.randn(b.shape, generator=generator) * 0.9 ** torch.arange(b.shape[1]))
    return layout, bank.to(DEVICE)


def added(layout, bank, lam=1.0, dtype=torch.float32, **options):
    """Gradient `[size]` and norms of the occupied slot, by Triton; padding of the gradient is NaN."""
    grad = torch.full((1, layout.size), torch.nan, dtype=dtype, device=DEVICE)
    for a, b in layout.views(grad).values():
        a.zero_()
        b.zero_()
    state = add_gradient_(layout, bank, grad, lam, slots=[SLOT], backend="triton", **options)
    return grad[0], state


def worst(layout, found, expected):
    """Largest relative error of any factor's gradient."""
    pairs = zip(layout.views(found.double().cpu()).values(), layout.views(expected).values(), strict=True)
    return max(
        float((x - y).norm() / y.norm().clamp_min(1e-200))
        for ours, theirs in pairs
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [1, 4, 16, 20, 64, 128])
def test_matches_the_reference_and_the_pytorch_path(rank, dtype, kind):
    layout, bank = make(SHAPES if rank < 64 else SHAPES[:2], rank, dtype)
    weights = torch.linspace(0.5, 2.0, len(layout.layers))
    lam = torch.tensor(0.7, device=DEVICE)
    grad, state = added(layout, bank, lam, dtype, kind=kind, weights=weights.to(DEVICE))
    exact = bank[SLOT].cpu()
    value, gradient = reference(layout, exact, kind, weights)
    assert worst(layout, grad, 0.7 * gradient) < TOLERANCE[dtype]
    norms = penalty(layout, exact.double(), backend="torch")
    torch.testing.assert_close(state.fro2[0].double().cpu(), norms.fro2, rtol=5e-6, atol=0)
    torch.testing.assert_close(state.sigma2[0].double().cpu(), norms.sigma2, rtol=5e-6, atol=0)
    if kind == "spectral":
        assert float(weights.double() @ state.sigma2[0].double().cpu()) == pytest.approx(value, rel=1e-5)
    found, other = torch.zeros(1, layout.size, device=DEVICE), bank.float()
    add_gradient_(
        layout, other, found, lam, kind=kind, weights=weights.to(DEVICE), slots=[SLOT], backend="torch"
    )
    assert worst(layout, found[0], 0.7 * gradient) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rank", [4, 128])
def test_two_runs_are_equal_bit_for_bit(rank):
    layout, bank = make(SHAPES[:2], rank)
    found = []
    for _ in range(2):
        layout.cache.clear()
        grad, state = added(layout, bank)
        found.append((torch.cat([t.flatten() for pair in layout.views(grad).values() for t in pair]), state))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].sigma2, found[1][1].sigma2)
    assert torch.equal(found[0][1].fro2, found[1][1].fro2)


@pytest.mark.parametrize("rank", [8, 128])
def test_zero_b_gives_exactly_zero_and_recovers(rank):
    layout, bank = make(SHAPES[:1], rank)
    factors = {name: b.clone() for name, (_, b) in layout.views(bank[SLOT]).items()}
    for _, b in layout.views(bank[SLOT]).values():
        b.zero_()
    for _ in range(2):
        grad, state = added(layout, bank)
        assert not grad.nan_to_num().any()
        assert not state.sigma2.any()
        assert not state.fro2.any()
    for name, (_, b) in layout.views(bank[SLOT]).items():
        b.copy_(factors[name])
    for _ in range(1 if rank < 65 else 4):
        _, state = added(layout, bank)
    exact = penalty(layout, bank[SLOT].double(), backend="torch").sigma2
    torch.testing.assert_close(state.sigma2[0].double(), exact, rtol=1e-3, atol=0)


def test_a_warm_start_follows_moving_factors():
    layout, bank = make(SHAPES[:1], 128)
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        for a, b in layout.views(bank[SLOT]).values():
            for t in (a, b):
                t.add_(torch.randn(t.shape, generator=generator).to(DEVICE), alpha=1e-3)
        grad, state = added(layout, bank)
    _, gradient = reference(layout, bank[SLOT].cpu(), "spectral")
    assert worst(layout, grad, gradient) < 1e-2
    exact = penalty(layout, bank[SLOT].double(), backend="torch").sigma2
    torch.testing.assert_close(state.sigma2[0].double(), exact, rtol=1e-4, atol=0)


def test_a_sixteenfold_tie_keeps_the_size_of_the_subgradient():
    layout = ArenaLayout([LayerShape("tied", 32, 24)], 16)
    flat = torch.zeros(layout.size, device=DEVICE)
    a, b = layout.views(flat)["tied"]
    a.copy_(torch.eye(16, 24))
    b.copy_(3.0 * torch.eye(32, 16))
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 1.0, backend="triton")
    assert float(state.sigma2[0]) == pytest.approx(9.0, rel=1e-5)
    assert float((layout.views(grad)["tied"][1] * b).sum()) == pytest.approx(18.0, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_scale_of_the_factors_does_not_matter(scale):
    layout, bank = make(SHAPES[:2], scale=scale)
    grad, _ = added(layout, bank)
    _, gradient = reference(layout, bank[SLOT].cpu(), "spectral")
    assert worst(layout, grad, gradient) < TOLERANCE[torch.float32]


def test_decay_moves_the_parameters_and_nothing_else():
    layout, bank = make([(63, 31), (5, 9)], rank=3)
    before = bank.clone()
    decay_(layout, bank, 0.1, torch.tensor(0.01, device=DEVICE), slots=[SLOT], backend="triton")
    changed = ~torch.eq(bank, before) & ~(torch.isnan(bank) & torch.isnan(before))
    assert not changed[0].any()
    assert not changed[2].any()
    assert torch.isnan(bank[SLOT]).equal(torch.isnan(before[SLOT])), "padding must not be written"
    _, gradient = reference(layout, before[SLOT].cpu(), "spectral")
    moved = (before[SLOT] - bank[SLOT]).double().cpu()
    for pair, expected in zip(layout.views(moved).values(), layout.views(gradient).values(), strict=True):
        for ours, theirs in zip(pair, expected, strict=True):
            torch.testing.assert_close(ours, 1e-3 * theirs, rtol=1e-3, atol=1e-5)


def test_several_slots_have_strengths_of_their_own():
    layout, bank = make(SHAPES[:2])
    bank[2] = 0.5 * bank[SLOT]
    strengths = torch.tensor([2.0, 0.25], device=DEVICE)
    grad = torch.zeros(2, layout.size, device=DEVICE)
    slots = torch.tensor([2, SLOT], device=DEVICE)
    state = add_gradient_(layout, bank, grad, strengths, slots=slots, backend="triton")
    for row, (slot, lam) in enumerate([(2, 2.0), (SLOT, 0.25)]):
        _, gradient = reference(layout, bank[slot].cpu(), "spectral")
        assert worst(layout, grad[row], lam * gradient) < TOLERANCE[torch.float32]
    torch.testing.assert_close(state.sigma2[0], state.sigma2[1] / 16, rtol=1e-5, atol=0)


def test_layers_of_several_ranks_and_a_layer_that_is_not_finite():
    layout, bank = make([(20, 32, 16), (64, 32, 8), (33, 64, 40), (64, 63, 1)], rank=64)
    layout.views(bank[SLOT])["l1"][0][0, 0] = torch.nan
    grad, state = added(layout, bank)
    assert torch.isnan(state.sigma2[0]).tolist() == [False, True, False, False]
    sound = bank[SLOT].cpu().nan_to_num()
    _, gradient = reference(layout, sound, "spectral")
    for name, pair in layout.views(grad.cpu().double()).items():
        for ours, theirs in zip(pair, layout.views(gradient)[name], strict=True):
            if name == "l1":
                assert torch.isnan(ours).any()
            else:
                assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE[torch.float32]


def test_autograd_gives_the_same_gradient():
    layout, bank = make(SHAPES[:2])
    flat = bank[SLOT].nan_to_num().clone().requires_grad_()
    lam = torch.tensor(0.5, device=DEVICE)
    (3.0 * spectral_penalty(layout, flat, lam=lam, backend="triton")).backward()
    value, gradient = reference(layout, flat.detach().cpu(), "spectral")
    assert worst(layout, flat.grad, 1.5 * gradient) < TOLERANCE[torch.float32]
    found = spectral_penalty(layout, flat.detach(), backend="triton")
    assert float(found) == pytest.approx(value, rel=1e-5)


def test_cap_from_norms_of_the_kernels():
    layout, bank = make(SHAPES[:2])
    spectral_cap_(layout, bank, 0.5, slots=[SLOT], backend="triton")
    for a, b in layout.views(bank[SLOT]).values():
        assert float(torch.linalg.matrix_norm(b.double() @ a.double(), 2)) <= 0.5 * (1 + 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
def test_the_step_can_be_captured_with_the_strength_in_device_memory():
    layout, bank = make(rank=16)
    strength = torch.tensor(1.0, device=DEVICE)
    grad = torch.zeros(1, layout.size, device=DEVICE)
    slots = torch.tensor([SLOT], dtype=torch.int32, device=DEVICE)
    add_gradient_(layout, bank, grad, strength, slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_gradient_(layout, bank, grad, strength, slots=slots)
    grad.zero_()
    graph.replay()
    once = grad.clone()
    grad.zero_()
    strength.fill_(2.0)
    graph.replay()
    torch.testing.assert_close(grad, 2.0 * once, rtol=1e-6, atol=0)
