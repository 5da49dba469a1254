"""The hard bound: held exactly, nothing else changed."""

from __future__ import annotations

import pytest
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import check_finite, spectral_cap_
from mooring_kernels.spectral.cap import TOLERANCE
from mooring_kernels.spectral.reference import reference_cap

SHAPES = [(63, 31), (24, 48), (5, 1), (100, 80), (24, 48)]


def make(rank=6, dtype=torch.float32, slots=1, seed=0):
    """A bank without a value in its padding."""
    layout = ArenaLayout([LayerShape(f"l{i}", *shape) for i, shape in enumerate(SHAPES)], rank)
    generator = torch.Generator().manual_seed(seed)
    bank = torch.full((slots, layout.size), torch.nan, dtype=dtype)
    for a, b in layout.views(bank).values():
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator))
    return layout, bank


def singular_values(layout, flat):
    return [torch.linalg.svdvals(b.double() @ a.double()) for a, b in layout.views(flat).values()]


def bits(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6, 40, 80])
def test_clip_holds_the_bound_and_is_the_nearest_matrix(rank, dtype):
    layout, bank = make(rank, dtype)
    before = {name: (a.clone(), b.clone()) for name, (a, b) in layout.views(bank[0]).items()}
    values = singular_values(layout, bank[0])
    # the second layer lies just within its bound; the first has several values above it
    tau = torch.tensor([0.9 * v[min(3, rank - 1, len(v) - 1)] for v in values])
    tau[1] = 1.0001 * values[1][0]
    over = spectral_cap_(layout, bank, tau)
    assert over.tolist() == [[True, False, True, True, True]]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for index, (name, (a, b)) in enumerate(layout.views(bank[0]).items()):
        update = b.double() @ a.double()
        assert float(torch.linalg.matrix_norm(update, 2)) <= float(tau[index]) * (1 + TOLERANCE)
        wanted = reference_cap(*before[name], float(tau[index]))
        assert float((update - wanted).norm() / wanted.norm()) < rounding
        assert torch.equal(bits(a), bits(before[name][0]))
    assert torch.equal(bits(layout.views(bank[0])["l1"][1]), bits(before["l1"][1]))


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_layers_under_the_bound_and_other_slots_keep_their_bits(method):
    layout, bank = make(slots=3)
    before = bank.clone()
    tau = max(float(v[0]) for v in singular_values(layout, bank[1])) * 1.01
    assert not spectral_cap_(layout, bank, tau, method=method, slots=[1]).any()
    assert torch.equal(bits(bank), bits(before))
    tau = min(float(v[0]) for v in singular_values(layout, bank[1])) * 0.5
    assert spectral_cap_(layout, bank, tau, method=method, slots=torch.tensor([1])).all()
    assert torch.equal(bits(bank[[0, 2]]), bits(before[[0, 2]]))
    assert torch.isnan(bank[1]).equal(torch.isnan(before[1])), "padding must not be written"


def test_rescale_keeps_directions_and_meets_the_bound():
    layout, bank = make()
    before = singular_values(layout, bank[0])
    spectral_cap_(layout, bank, 2.0, method="rescale")
    for old, new in zip(before, singular_values(layout, bank[0]), strict=True):
        factor = min(1.0, 2.0 / float(old[0]))
        torch.testing.assert_close(new, factor * old, rtol=1e-6, atol=1e-6)
        assert float(new[0]) <= 2.0 * (1 + TOLERANCE)


def test_a_single_buffer_zero_updates_and_infinite_bounds_are_left_alone():
    layout, bank = make()
    flat = bank[0]
    views = layout.views(flat)
    views["l0"][1].zero_()
    before = flat.clone()
    tau = torch.full((len(SHAPES),), torch.inf)
    tau[0] = 1e-9
    assert spectral_cap_(layout, flat, tau).tolist() == [False] * 5
    assert torch.equal(bits(flat), bits(before))


def test_zero_padded_ranks_do_not_disturb_the_clip():
    layout, bank = make(rank=6)
    for a, b in layout.views(bank[0]).values():
        a[2:] = 0.0
        b[:, 2:] = 0.0
    spectral_cap_(layout, bank, 0.3)
    for name, (a, b) in layout.views(bank[0]).items():
        assert float(torch.linalg.matrix_norm(b.double() @ a.double(), 2)) == pytest.approx(0.3, rel=1e-5), (
            name
        )
        assert not b[:, 2:].any()


def test_ties_are_clipped_together():
    layout = ArenaLayout([LayerShape("tied", 32, 24)], 16)
    flat = torch.zeros(layout.size)
    a, b = layout.views(flat)["tied"]
    a.copy_(torch.eye(16, 24))
    b.copy_(3.0 * torch.eye(32, 16))
    spectral_cap_(layout, flat, 2.0)
    torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:16], torch.full((16,), 2.0))


def test_what_cannot_be_bounded_is_refused():
    layout, bank = make()
    with pytest.raises(ValueError, match="must be positive"):
        spectral_cap_(layout, bank, 0.0)
    with pytest.raises(ValueError, match="clip, rescale"):
        spectral_cap_(layout, bank, 1.0, method="scale")
    layout.views(bank)["l3"][1][0, 7, 2] = torch.inf
    with pytest.raises(ValueError, match=r"not finite: l3 \(B\)"):
        spectral_cap_(layout, bank, 1.0)


def test_check_finite_names_layers_and_ignores_padding():
    layout, bank = make(slots=2)
    check_finite(layout, bank)
    for name in ("l0", "l2", "l3", "l4"):
        layout.views(bank)[name][0][1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"l0 \(A\); l2 \(A\); l3 \(A\) and 1 more"):
        check_finite(layout, bank)
    check_finite(layout, bank[0])
