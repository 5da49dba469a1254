"""The PyTorch path on slots of a bank, its autograd and decoupled forms, and inputs that are refused."""

from __future__ import annotations

import pytest
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import KINDS, add_gradient_, decay_, penalty, spectral_penalty
from mooring_kernels.spectral.reference import reference

SHAPES = [(63, 31), (16, 1000, 2), (24, 20), (1, 5, 1), (63, 31, 3)]


def make(slots=4, rank=5, dtype=torch.float64, seed=0):
    """A bank whose slots 0 and 2 are NaN, and so is the padding of all."""
    layout = ArenaLayout([LayerShape(f"l{i}", *shape) for i, shape in enumerate(SHAPES)], rank)
    generator = torch.Generator().manual_seed(seed)
    bank = torch.full((slots, layout.size), torch.nan, dtype=dtype)
    for slot in (1, 3):
        for a, b in layout.views(bank[slot]).values():
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(torch.randn(b.shape, generator=generator))
    return layout, bank


def factors(layout, flat):
    """The elements of a row that are factors, without padding."""
    return torch.cat([t.flatten() for pair in layout.views(flat).values() for t in pair])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [[3, 1], torch.tensor([3, 1])])
def test_slots_have_strengths_of_their_own_and_others_are_never_read(kind, slots):
    layout, bank = make()
    before = bank.clone()
    grad = torch.zeros(2, layout.size, dtype=bank.dtype)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0])
    state = add_gradient_(
        layout, bank, grad, torch.tensor([2.0, 0.5]), kind=kind, weights=weights, slots=slots
    )
    assert state.sigma2.shape == state.fro2.shape == (2, len(SHAPES))
    for row, (slot, lam) in enumerate([(3, 2.0), (1, 0.5)]):
        _, gradient = reference(layout, bank[slot], kind, weights)
        torch.testing.assert_close(
            factors(layout, grad[row]), lam * factors(layout, gradient), rtol=1e-9, atol=1e-9
        )
        alone = penalty(layout, bank[slot])
        assert torch.equal(state.sigma2[row], alone.sigma2)
        assert torch.equal(state.fro2[row], alone.fro2)
    assert torch.equal(bank.nan_to_num(), before.nan_to_num())
    assert not torch.isnan(grad).any()


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_agrees_with_finite_differences(kind):
    layout, bank = make()
    flat = bank[1].nan_to_num().requires_grad_()
    weights = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0])
    total = spectral_penalty(layout, flat, kind=kind, lam=0.3, weights=weights)
    (gradient,) = torch.autograd.grad(2.0 * total, flat)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(layout.size, dtype=torch.float64, generator=generator)
        ends = [
            spectral_penalty(
                layout, flat.detach() + h * direction, kind=kind, lam=torch.tensor(0.6), weights=weights
            )
            for h in (1e-6, -1e-6)
        ]
        assert float(ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-5)


def test_autograd_of_a_bank_reaches_the_chosen_slots_only():
    layout, bank = make()
    clean = bank.nan_to_num().requires_grad_()
    lam = torch.tensor([1.0, 3.0])
    value = spectral_penalty(layout, clean, lam=lam, slots=[1, 3])
    value.backward()
    expected = []
    for slot, strength in ((1, 1.0), (3, 3.0)):
        total, gradient = reference(layout, clean.detach()[slot], "spectral")
        torch.testing.assert_close(clean.grad[slot], strength * gradient, rtol=1e-8, atol=1e-8)
        expected.append(strength * total)
    assert float(value.detach()) == pytest.approx(sum(expected), rel=1e-9)
    assert not clean.grad[[0, 2]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01, dtype=torch.float64)])
def test_decay_is_one_gradient_step(kind, rate):
    layout, bank = make()
    before = bank.clone()
    state = decay_(layout, bank, 0.5, rate, kind=kind, slots=[3])
    _, gradient = reference(layout, before[3], kind)
    torch.testing.assert_close(
        factors(layout, bank[3]),
        factors(layout, before[3]) - 0.005 * factors(layout, gradient),
        rtol=1e-9,
        atol=1e-12,
    )
    assert torch.isnan(bank[3]).equal(torch.isnan(before[3])), "padding must not be written"
    assert torch.equal(bank[:3].nan_to_num(), before[:3].nan_to_num())
    assert torch.equal(state.sigma2[0], penalty(layout, before[3]).sigma2)


def test_decay_shrinks_the_largest_direction_and_only_that():
    layout = ArenaLayout([LayerShape("l", 30, 20)], 4)
    flat = torch.zeros(layout.size, dtype=torch.float64)
    a, b = layout.views(flat)["l"]
    a.copy_(torch.eye(4, 20))
    b.copy_(torch.eye(30, 4) * torch.tensor([3.0, 2.0, 1.0, 0.5]))
    decay_(layout, flat, 1.0, 0.01)
    after = torch.linalg.svdvals(b @ a)[:4]
    assert float(after[0]) < 2.7
    torch.testing.assert_close(after[1:], torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_storage_is_accumulated_in_float32(kind):
    layout, bank = make(dtype=torch.bfloat16)
    grad = torch.zeros(1, layout.size)
    state = add_gradient_(layout, bank, grad, 1.0, kind=kind, slots=[1])
    _, gradient = reference(layout, bank[1], kind)
    scale = float(gradient.nan_to_num().abs().max())
    torch.testing.assert_close(
        factors(layout, grad[0].double()), factors(layout, gradient), rtol=1e-4, atol=1e-5 * scale
    )
    torch.testing.assert_close(state.fro2[0], penalty(layout, bank[1].double()).fro2, rtol=1e-5, atol=0)


def test_a_value_that_is_not_finite_shows_in_its_layer_only():
    layout, bank = make()
    for poison in (torch.nan, torch.inf):
        layout.views(bank[1])["l2"][1][0, 0] = poison
        state = penalty(layout, bank, slots=[1])
        assert torch.isfinite(state.sigma2[0]).tolist() == [True, True, False, True, True]
        assert torch.isfinite(state.fro2[0]).tolist() == [True, True, False, True, True]


def test_a_strength_of_zero_in_a_tensor_adds_zero():
    layout, bank = make()
    grad = torch.zeros(1, layout.size, dtype=bank.dtype)
    add_gradient_(layout, bank, grad, torch.zeros(()), slots=[1])
    assert not grad.any()


def test_what_does_not_fit_is_refused():
    layout, bank = make()
    grad = torch.zeros(1, layout.size, dtype=bank.dtype)
    with pytest.raises(ValueError, match="elements"):
        penalty(layout, bank[:, :-8])
    with pytest.raises(ValueError, match="single buffer"):
        penalty(layout, bank[1], slots=[0])
    for slots in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="distinct rows of a bank of 4"):
            penalty(layout, bank, slots=slots)
    with pytest.raises(ValueError, match="one row for each of 2 slots"):
        add_gradient_(layout, bank, grad, 1.0, slots=[1, 3])
    with pytest.raises(ValueError, match="spectral, l2, factor_decay"):
        decay_(layout, bank, 1.0, 0.1, kind="nuclear", slots=[1])
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        penalty(layout, bank, backend="triton")
    with pytest.raises(ValueError, match="CUDA"):
        penalty(layout, bank.float(), backend="triton")
