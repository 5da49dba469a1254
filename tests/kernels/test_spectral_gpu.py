"""The compiled kernels on a CUDA device against the float64 reference, and their speed when it is asked for.

Needs torch, triton, pytest and mooring_kernels only:
    PYTHONPATH=kernels python -m pytest tests/kernels/test_spectral_gpu.py -p no:cacheprovider
"""

from __future__ import annotations

import pytest
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import add_gradient_, decay_, spectral_penalty
from mooring_kernels.spectral.reference import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ALIGNED = [(320, 320), (320, 768), (1280, 1280), (1280, 2048), (3072, 3072)]
SMALL = [(320, 320), (320, 768), (640, 128), (63, 31), (1, 5)]
MIXED = [*ALIGNED, (63, 31), (1000, 1000), (1, 5)]
RANKS = [1, 4, 12, 16, 32, 64, 100, 128]
SLOT = 1
# relative to the norm of a factor's gradient; bfloat16 rounds the storage of the gradient, not the sums
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 5e-3}
WARM_CALLS = 40


def make(shapes=SMALL, rank=16, dtype=torch.float32, seed=0, scale=1.0):
    """A bank of three slots on the device: slot 1 holds factors, all else is NaN."""
    layout = ArenaLayout([LayerShape(f"l{i}", *shape) for i, shape in enumerate(shapes)], rank)
    generator = torch.Generator().manual_seed(seed)
    bank = torch.full((3, layout.size), torch.nan, dtype=dtype)
    for a, b in layout.views(bank[SLOT]).values():
        a.copy_(torch.randn(a.shape, generator=generator))
        # a spread of singular values, as training gives; random factors have their largest close together
        b.copy_(scale * torch.randn(b.shape, generator=generator) * 0.9 ** torch.arange(b.shape[1]))
    return layout, bank.cuda()


def worst(layout, found, expected):
    """Largest relative error of any factor's gradient."""
    pairs = zip(layout.views(found.double().cpu()).values(), layout.views(expected).values(), strict=True)
    return max(
        float((x - y).norm() / y.norm().clamp_min(1e-30))
        for ours, theirs in pairs
        for x, y in zip(ours, theirs, strict=True)
    )


CASES = [(rank, torch.float32, "spectral") for rank in RANKS]
CASES += [(rank, torch.bfloat16, "spectral") for rank in (4, 16, 64, 128)]
CASES += [(rank, dtype, kind) for rank in (4, 64) for dtype in TOLERANCE for kind in ("l2", "factor_decay")]


@pytest.mark.parametrize(("rank", "dtype", "kind"), CASES)
def test_compiled_kernels_match_float64(rank, dtype, kind):
    layout, bank = make(MIXED if rank < 32 else ALIGNED, rank, dtype)
    weights = torch.linspace(0.5, 2.0, len(layout.layers))
    strength = torch.tensor(0.7, device="cuda")
    calls = WARM_CALLS if rank > 64 and kind == "spectral" else 1
    for _ in range(calls):  # a warm-started solve converges over calls
        grad = torch.zeros(1, layout.size, dtype=dtype, device="cuda")
        state = add_gradient_(layout, bank, grad, strength, kind=kind, weights=weights.cuda(), slots=[SLOT])
    # the float64 PyTorch path; other tests hold it against the dense reference
    exact = bank[SLOT].double().cpu()
    gradient = torch.zeros_like(exact)
    norms = add_gradient_(layout, exact, gradient, 0.7, kind=kind, weights=weights)
    error = worst(layout, grad[0], gradient)
    off = (state.sigma2[0].double().cpu() / norms.sigma2 - 1.0).abs().max()
    print(f"rank {rank} {dtype} {kind}: gradient error {error:.1e}, sigma² {float(off):.1e}")  # noqa: T201 - read in CI's log
    assert error < TOLERANCE[dtype]
    torch.testing.assert_close(state.fro2[0].double().cpu(), norms.fro2, rtol=5e-6, atol=0)
    if kind == "spectral":
        torch.testing.assert_close(state.sigma2[0].double().cpu(), norms.sigma2, rtol=5e-6, atol=0)


@pytest.mark.parametrize("rank", [16, 64, 128])
def test_two_runs_are_equal_bit_for_bit(rank):
    layout, bank = make(rank=rank)
    found = []
    for _ in range(2):
        layout.cache.clear()
        grad = torch.zeros(1, layout.size, device="cuda")
        state = add_gradient_(layout, bank, grad, 1.0, slots=[SLOT])
        found.append((grad, state.sigma2, state.fro2))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rank", [8, 64, 128])
def test_zero_b_gives_exactly_zero(rank):
    layout, bank = make(rank=rank)
    for _, b in layout.views(bank[SLOT]).values():
        b.zero_()
    grad = torch.zeros(1, layout.size, device="cuda")
    for _ in range(2):
        state = add_gradient_(layout, bank, grad, 1.0, slots=[SLOT])
    assert not grad.any()
    assert not state.sigma2.any()
    assert not state.fro2.any()


def test_a_sixteenfold_tie_keeps_the_size_of_the_subgradient():
    layout = ArenaLayout([LayerShape("tied", 32, 24)], 16)
    flat = torch.zeros(layout.size, device="cuda")
    a, b = layout.views(flat)["tied"]
    a.copy_(torch.eye(16, 24))
    b.copy_(3.0 * torch.eye(32, 16))
    grad = torch.zeros_like(flat)
    state = add_gradient_(layout, flat, grad, 1.0)
    assert float(state.sigma2[0]) == pytest.approx(9.0, rel=1e-5)
    assert float((layout.views(grad)["tied"][1] * b).sum()) == pytest.approx(18.0, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_scale_of_the_factors_does_not_matter(scale):
    layout, bank = make(scale=scale)
    grad = torch.zeros(1, layout.size, device="cuda")
    add_gradient_(layout, bank, grad, 1.0, slots=[SLOT])
    _, gradient = reference(layout, bank[SLOT].cpu(), "spectral")
    assert worst(layout, grad[0], gradient) < TOLERANCE[torch.float32]


def test_neither_padding_nor_other_slots_are_read_or_written():
    layout, bank = make([(63, 31), (5, 9)], rank=3)
    before = bank.clone()
    decay_(layout, bank, 0.1, torch.tensor(0.01, device="cuda"), slots=[SLOT])
    changed = ~torch.eq(bank, before) & ~(torch.isnan(bank) & torch.isnan(before))
    assert not changed[0].any()
    assert not changed[2].any()
    holds = torch.zeros(layout.size, dtype=torch.bool)
    for a, b in layout.views(holds).values():
        a.fill_(value=True)
        b.fill_(value=True)
    assert not (changed[SLOT].cpu() & ~holds).any()
    assert torch.isfinite(bank[SLOT].cpu()[holds]).all()
    _, gradient = reference(layout, before[SLOT].cpu(), "spectral")
    moved = (before[SLOT] - bank[SLOT]).double().cpu().nan_to_num()
    assert float((moved - 1e-3 * gradient.nan_to_num()).abs().max()) < 1e-5


def test_layers_of_several_ranks_and_a_nan_layer():
    layout, bank = make([(320, 320, 16), (640, 320, 8), (320, 640, 64), (64, 63, 1)], rank=64)
    layout.views(bank[SLOT])["l1"][0][0, 0] = torch.nan
    grad = torch.zeros(1, layout.size, device="cuda")
    state = add_gradient_(layout, bank, grad, 1.0, slots=torch.tensor([SLOT], device="cuda"))
    assert torch.isnan(state.sigma2[0]).tolist() == [False, True, False, False]
    _, gradient = reference(layout, bank[SLOT].cpu().nan_to_num(), "spectral")
    for name, pair in layout.views(grad[0].cpu().double()).items():
        for ours, theirs in zip(pair, layout.views(gradient)[name], strict=True):
            if name == "l1":
                assert torch.isnan(ours).any()
            else:
                assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE[torch.float32]


def test_the_step_can_be_captured_with_the_strength_in_device_memory():
    layout, bank = make(rank=16)
    strength = torch.tensor(1.0, device="cuda")
    grad = torch.zeros(1, layout.size, device="cuda")
    slots = torch.tensor([SLOT], dtype=torch.int32, device="cuda")
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


def test_autograd_gives_the_same_gradient():
    layout, bank = make(rank=16)
    flat = bank[SLOT].nan_to_num().clone().requires_grad_()
    (3.0 * spectral_penalty(layout, flat, lam=torch.tensor(0.5, device="cuda"))).backward()
    expected, gradient = reference(layout, flat.detach().cpu(), "spectral")
    assert worst(layout, flat.grad, 1.5 * gradient) < TOLERANCE[torch.float32]
    assert float(spectral_penalty(layout, flat.detach())) == pytest.approx(expected, rel=1e-5)
