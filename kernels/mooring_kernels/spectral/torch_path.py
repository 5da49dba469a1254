"""The penalties in plain PyTorch: batched by layer shape, analytic gradient, solve in float64.

Gram route: with G_A = A·Aᵀ and G_B = Bᵀ·B (both r×r) the squared singular values of B·A are the eigenvalues
of M = G_B·G_A, so no matrix larger than r×r is ever decomposed. M is squared `SQUARINGS` times (divided by
its largest entry now and then), which leaves the leading eigenvector y in its columns; then

    z = G_A·y,  q = G_B·z,  n² = yᵀz,  σ² = zᵀq/n²,
    ∂σ²/∂B = 2/n² · (B·z)·zᵀ,     ∂σ²/∂A = 2/n² · q·(yᵀA),

and ‖BA‖_F² = ⟨G_A, G_B⟩ comes free. The solve runs in float64: it is a few kilobytes, and an
under-resolved σ (as a cold power iteration gives) would let the largest direction grow unpunished. At B = 0
values and gradients are exactly zero. Every product has a fixed order, so results are reproducible bit for
bit on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout, ShapeGroup

SQUARINGS = 12
"""M^(2^12): two values 0.1 % apart are separated by a factor of e⁸ in squared singular value."""
NORMALISE_EVERY = {torch.float64: 4, torch.float32: 2}
"""Squarings between two divisions: from entries up to 1, those of M^16 are at most r^15, of M^4 r^3; between
them M may shrink by (σ/‖A‖‖B‖)^30 and (σ/‖A‖‖B‖)^6."""
POLISH_STEPS = 3
MERGED_RANK = 32
"""Up to this rank groups are solved together. Above it the squarings are most of the work and are done in
float32 when the factors are: the digits that costs were lost in the Grams before."""
_TINY = 1e-300


@dataclass(frozen=True)
class Solved:
    """Norms and leading directions of n layers of one shape, float64.

    Args:
        gram_a: `[n, r, r]` A·Aᵀ.
        gram_b: `[n, r, r]` Bᵀ·B.
        y: `[n, r, 1]` leading eigenvector of G_B·G_A.
        z: `[n, r, 1]` G_A·y.
        q: `[n, r, 1]` G_B·z.
        inverse_n2: `[n, 1, 1]` 1/(yᵀz), zero where ΔW is zero.
        sigma2: `[n]`.
        fro2: `[n]`.
    """

    gram_a: Tensor
    gram_b: Tensor
    y: Tensor
    z: Tensor
    q: Tensor
    inverse_n2: Tensor
    sigma2: Tensor
    fro2: Tensor


def _grams(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _computable(a), _computable(b)
    return (a @ a.mT).double(), (b.mT @ b).double()


def solve_grams(gram_a: Tensor, gram_b: Tensor, squaring: torch.dtype = torch.float64) -> Solved:
    """Norms of n layers' B·A from G_A and G_B.

    Args:
        gram_a: `[n, r, r]` float64.
        gram_b: likewise.
        squaring: precision of the squarings; the polish and the norms are float64 in any case.
    """
    product = gram_b @ gram_a
    power = (product / _largest(product)).to(squaring)
    other = torch.empty_like(power)
    every = NORMALISE_EVERY[squaring]
    for number in range(1, SQUARINGS + 1):
        power, other = torch.bmm(power, power, out=other), power
        if number % every == 0:
            power.div_(_largest(power))
    column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    y = power.gather(-1, column[:, None, None].expand(-1, power.shape[-2], 1)).double()
    for _ in range(POLISH_STEPS):
        y = product @ y
        y = y / y.abs().amax(-2, keepdim=True).clamp_min(_TINY)
    z = gram_a @ y
    q = gram_b @ z
    n2 = (y * z).sum((-2, -1), keepdim=True)
    inverse_n2 = torch.where(n2 > _TINY, 1.0 / n2.clamp_min(_TINY), n2 - n2)
    sigma2 = ((z * q).sum((-2, -1), keepdim=True) * inverse_n2).flatten()
    return Solved(gram_a, gram_b, y, z, q, inverse_n2, sigma2, (gram_a * gram_b).sum((-2, -1)))


@dataclass(frozen=True)
class Batch:
    """Groups that are solved together.

    Args:
        groups: of one rank.
        order: int64 `[n]`, the layers' indices, group after group.
        solved: of their n layers.
    """

    groups: tuple[ShapeGroup, ...]
    order: Tensor
    solved: Solved

    def split(self, t: Tensor) -> Sequence[Tensor]:
        """A tensor `[n, ...]` by group."""
        return torch.split_with_sizes(t, [len(group.indices) for group in self.groups])


def solve_network(layout: ArenaLayout, flat: Tensor) -> list[Batch]:
    """Norms and leading directions of every layer of one row `[size]`.

    Groups of one small rank are solved as one batch: there the calls take longer than the arithmetic.
    """
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    found = []
    for groups, order in _batches(layout, flat.device):
        grams = [_grams(*group.views(flat)) for group in groups]
        gram_a, gram_b = (
            grams[0] if len(grams) == 1 else (torch.cat(both) for both in zip(*grams, strict=True))
        )
        squaring = wide if groups[0].rank > MERGED_RANK else torch.float64
        found.append(Batch(groups, order, solve_grams(gram_a, gram_b, squaring)))
    return found


def _batches(layout: ArenaLayout, device: torch.device) -> list[tuple[tuple[ShapeGroup, ...], Tensor]]:
    known: list[tuple[tuple[ShapeGroup, ...], Tensor]] | None = layout.cache.get(("batches", device))
    if known is None:
        small: dict[int, list[ShapeGroup]] = {}
        for group in layout.groups:
            key = group.rank if group.rank <= MERGED_RANK else -len(small) - 1
            small.setdefault(key, []).append(group)
        known = [
            (tuple(groups), torch.tensor([i for group in groups for i in group.indices], device=device))
            for groups in small.values()
        ]
        layout.cache["batches", device] = known
    return known


def collect(layout: ArenaLayout, found: list[Batch]) -> tuple[Tensor, Tensor]:
    """σ² and ‖·‖_F² of all batches, float64 `[L]` each, in the order of the layers."""
    placed = torch.empty(2, len(layout.layers), dtype=torch.float64, device=found[0].order.device)
    for batch in found:
        placed[:, batch.order] = torch.stack((batch.solved.sigma2, batch.solved.fro2))
    return placed[0], placed[1]


def norms(layout: ArenaLayout, flat: Tensor) -> tuple[Tensor, Tensor]:
    """σ² and ‖·‖_F² of every layer, float64 `[L]`, of one row `[size]`."""
    return collect(layout, solve_network(layout, flat))


def add_share_(
    layout: ArenaLayout,
    flat: Tensor,
    target: Tensor,
    lam: float | Tensor,
    *,
    kind: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add λ·∂P/∂flat to `target` for one row; `target` may be `flat`.

    Args:
        layout: of both buffers.
        flat: `[size]`.
        target: `[size]`, changed in place.
        lam: strength, a number or a 0-d tensor; the number 0 adds nothing.
        kind: which penalty.
        weights: `[L]`; ones when absent.

    Returns:
        σ² and ‖·‖_F² of every layer of `flat` as it was, float64 `[L]`.
    """
    found = solve_network(layout, flat)
    if isinstance(lam, float | int) and lam == 0.0:
        return collect(layout, found)
    for batch in found:
        w = torch.full((len(batch.order), 1, 1), 2.0, dtype=torch.float64, device=flat.device) * lam
        if weights is not None:
            w *= weights[batch.order].to(w).view(-1, 1, 1)
        lefts, rights = _outer_factors(batch, w, kind, _accumulator(flat.dtype))
        for group, *of_group in zip(batch.groups, *lefts, *rights, strict=True):
            a, b = (_computable(t) for t in group.views(flat))
            goal_a, goal_b = group.views(target)
            left_a, left_b, right_a, right_b = of_group
            if kind == "spectral":
                share_a, share_b = torch.bmm(right_a.mT, a), torch.bmm(b, left_b)
                _add_product(goal_a, left_a, share_a)
                _add_product(goal_b, share_b, right_b)
            elif kind == "l2":
                aliased = target.data_ptr() == flat.data_ptr()
                _add_product(goal_a, left_a, a.clone() if aliased else a)
                _add_product(goal_b, b.clone() if aliased else b, right_b)
            else:
                goal_a += (a * left_a).to(goal_a.dtype)
                goal_b += (b * right_b).to(goal_b.dtype)
    return collect(layout, found)


def _outer_factors(
    batch: Batch, w: Tensor, kind: str, dtype: torch.dtype
) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """What A and B are multiplied by from the left, and from the right, by group; r-space only."""
    solved = batch.solved
    if kind == "spectral":
        k = w * solved.inverse_n2
        # A: k·q·(yᵀA), with y as it lies; B: (B·z)·(k·z)ᵀ
        left, right = (k * solved.q, solved.z), (solved.y, (k * solved.z).mT)
    elif kind == "l2":
        left, right = (w * solved.gram_b, w), (w, w * solved.gram_a)
    else:
        left, right = (w, w), (w, w)
    return [batch.split(t.to(dtype)) for t in left], [batch.split(t.to(dtype)) for t in right]


def squares(layout: ArenaLayout, flat: Tensor) -> Tensor:
    """‖A_l‖_F² + ‖B_l‖_F² of every layer, float64 `[L]`, of one row `[size]`."""
    found = [
        _computable(a).square().sum() + _computable(b).square().sum() for a, b in layout.views(flat).values()
    ]
    return torch.stack(found).double()


def _add_product(goal: Tensor, left: Tensor, right: Tensor) -> None:
    if goal.dtype != left.dtype:
        goal += torch.bmm(left, right).to(goal.dtype)
    elif left.shape[-1] == 1:
        goal.addcmul_(left, right)
    else:
        goal.baddbmm_(left, right)


def _accumulator(storage: torch.dtype) -> torch.dtype:
    return torch.float32 if storage in {torch.bfloat16, torch.float16} else storage


def _computable(t: Tensor) -> Tensor:
    """float32 of bfloat16 storage: the Grams must be accumulated in float32."""
    return t.to(_accumulator(t.dtype))


def _largest(m: Tensor) -> Tensor:
    """The largest magnitude `[n, 1, 1]`, never zero; a trace may round to a negative number."""
    return m.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
