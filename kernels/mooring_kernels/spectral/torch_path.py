"""The penalties in plain PyTorch: batched by layer shape, analytic gradient, solve in float64.

Gram route: with G_A = A·Aᵀ and G_B = Bᵀ·B (both r×r) the squared singular values of B·A are the eigenvalues
of M = G_B·G_A, so no matrix larger than r×r is ever decomposed. M is squared `SQUARINGS` times (normalised
by its trace each time), which leaves the leading eigenvector y in its columns; then

    z = G_A·y,  q = G_B·z,  n² = yᵀz,  σ² = zᵀq/n²,
    ∂σ²/∂B = 2/n² · (B·z)·zᵀ,     ∂σ²/∂A = 2/n² · q·(yᵀA),

and ‖BA‖_F² = ⟨G_A, G_B⟩ comes free. The solve runs in float64: it is a few kilobytes, and an
under-resolved σ (as a cold power iteration gives) would let the largest direction grow unpunished. At B = 0
values and gradients are exactly zero. Every product has a fixed order, so results are reproducible bit for
bit on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout

SQUARINGS = 12
"""M^(2^12): two values 0.1 % apart are separated by a factor of e⁸ in squared singular value."""
POLISH_STEPS = 3
MERGED_RANK = 32
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


def solve_grams(gram_a: Tensor, gram_b: Tensor) -> Solved:
    """Norms of n layers' B·A from G_A and G_B, float64 `[n, r, r]`."""
    product = gram_b @ gram_a
    power = _normalised(product)
    for _ in range(SQUARINGS):
        power = _normalised(power @ power)
    column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    y = power.gather(-1, column[:, None, None].expand(-1, power.shape[-2], 1))
    for _ in range(POLISH_STEPS):
        y = product @ y
        y = y / y.abs().amax(-2, keepdim=True).clamp_min(_TINY)
    z = gram_a @ y
    q = gram_b @ z
    n2 = (y * z).sum((-2, -1), keepdim=True)
    inverse_n2 = torch.where(n2 > _TINY, 1.0 / n2.clamp_min(_TINY), n2 - n2)
    sigma2 = ((z * q).sum((-2, -1), keepdim=True) * inverse_n2).flatten()
    return Solved(gram_a, gram_b, y, z, q, inverse_n2, sigma2, (gram_a * gram_b).sum((-2, -1)))


def solve_network(layout: ArenaLayout, flat: Tensor) -> list[Solved]:
    """Norms and leading directions of every group of the layout.

    Groups of one small rank are solved as one batch: there the calls take longer than the arithmetic.
    """
    grams = [_grams(*group.views(flat)) for group in layout.groups]
    found: list[Solved | None] = [None] * len(grams)
    for rank in {group.rank for group in layout.groups}:
        members = [i for i, group in enumerate(layout.groups) if group.rank == rank]
        if rank > MERGED_RANK or len(members) == 1:
            for i in members:
                found[i] = solve_grams(*grams[i])
            continue
        whole = solve_grams(*(torch.cat([grams[i][k] for i in members]) for k in (0, 1)))
        sizes = [len(layout.groups[i].indices) for i in members]
        parts = zip(*(getattr(whole, name.name).split(sizes) for name in fields(Solved)), strict=True)
        for i, part in zip(members, parts, strict=True):
            found[i] = Solved(*part)
    return [solved for solved in found if solved is not None]


def collect(layout: ArenaLayout, found: list[Solved]) -> tuple[Tensor, Tensor]:
    """σ² and ‖·‖_F² of the groups, float64 `[L]` each, in the order of the layers."""
    order = torch.tensor([i for group in layout.groups for i in group.indices], device=found[0].sigma2.device)
    both = torch.stack((torch.cat([s.sigma2 for s in found]), torch.cat([s.fro2 for s in found])))
    placed = torch.empty_like(both)
    placed[:, order] = both
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
    for group, solved in zip(layout.groups, found, strict=True):
        a, b = group.views(flat)
        w = torch.full((len(group.indices), 1, 1), 2.0, dtype=torch.float64, device=flat.device) * lam
        if weights is not None:
            w *= weights[list(group.indices)].to(w).view(-1, 1, 1)
        shares = _shares(_computable(a), _computable(b), solved, w, kind)
        for goal, share in zip(group.views(target), shares, strict=True):
            _add(goal, *share)
    return collect(layout, found)


def squares(layout: ArenaLayout, flat: Tensor) -> Tensor:
    """‖A_l‖_F² + ‖B_l‖_F² of every layer, float64 `[L]`, of one row `[size]`."""
    found = [
        _computable(a).square().sum() + _computable(b).square().sum() for a, b in layout.views(flat).values()
    ]
    return torch.stack(found).double()


def _shares(
    a: Tensor, b: Tensor, solved: Solved, w: Tensor, kind: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What is added to A and to B, each as a product of two factors (or one tensor and None)."""
    if kind == "spectral":
        k = w * solved.inverse_n2
        yield (k * solved.q).to(a.dtype), solved.y.to(a.dtype).mT @ a
        yield b @ solved.z.to(b.dtype), (k * solved.z).to(b.dtype).mT
    elif kind == "l2":
        yield (w * solved.gram_b).to(a.dtype), a.clone()
        yield b.clone(), (w * solved.gram_a).to(b.dtype)
    else:
        yield a * w.to(a.dtype), None
        yield b * w.to(b.dtype), None


def _add(goal: Tensor, left: Tensor, right: Tensor | None) -> None:
    if right is None:
        goal += left.to(goal.dtype)
    elif goal.dtype == left.dtype:
        goal.baddbmm_(left, right)
    else:
        goal += (left @ right).to(goal.dtype)


def _computable(t: Tensor) -> Tensor:
    """float32 of bfloat16 storage: the Grams must be accumulated in float32."""
    return t.float() if t.dtype in {torch.bfloat16, torch.float16} else t


def _normalised(m: Tensor) -> Tensor:
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    return m / trace.clamp_min(_TINY)[:, None, None]
