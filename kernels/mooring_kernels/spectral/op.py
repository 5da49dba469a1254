"""The penalties of `reference.py` for a whole network, batched by layer shape, in r-space.

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

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout

Kind = Literal["spectral", "l2", "factor_decay"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SQUARINGS = 12
"""M^(2^12): two values 0.1 % apart are separated by a factor of e⁸ in squared singular value."""
POLISH_STEPS = 3
_TINY = 1e-300


@dataclass(frozen=True)
class SpectralState:
    """Per-layer norms of ΔW, in the order of `ArenaLayout.layers`.

    Args:
        sigma2: `[L]` float64, σ_max(B_l A_l)².
        fro2: `[L]` float64, ‖B_l A_l‖_F².
    """

    sigma2: Tensor
    fro2: Tensor

    @property
    def sigma_max(self) -> float:
        """The largest operator norm of any layer's update."""
        return float(self.sigma2.max().sqrt())


@dataclass(frozen=True)
class _Solved:
    gram_a: Tensor  # [n, r, r] float64
    gram_b: Tensor
    y: Tensor  # [n, r, 1] float64
    z: Tensor
    q: Tensor
    inverse_n2: Tensor  # [n, 1, 1], zero where ΔW is zero
    sigma2: Tensor  # [n]
    fro2: Tensor


def penalty(layout: ArenaLayout, flat: Tensor) -> SpectralState:
    """σ_max² and ‖·‖_F² of every layer's update.

    Args:
        layout: of `flat`.
        flat: factors `[size]`, float32 or float64.
    """
    state = _empty_state(layout, flat)
    with torch.no_grad():
        for group in layout.groups:
            a, b = group.views(flat)
            _scatter(state, group.indices, _solve(a, b))
    return state


def value(
    layout: ArenaLayout, flat: Tensor, kind: Kind, state: SpectralState, weights: Tensor | None = None
) -> float:
    """The penalty P of `kind` from a state that was computed for `flat`."""
    if kind == "factor_decay":
        with torch.no_grad():
            squares = [a.square().sum() + b.square().sum() for a, b in layout.views(flat).values()]
            terms = torch.stack(squares).double()
    else:
        terms = state.sigma2 if kind == "spectral" else state.fro2
    return float(terms.sum() if weights is None else (terms * weights.to(terms)).sum())


def add_gradient_(
    layout: ArenaLayout,
    flat: Tensor,
    flat_grad: Tensor,
    lam: float,
    *,
    kind: Kind = "spectral",
    weights: Tensor | None = None,
) -> SpectralState:
    """Add λ·∂P/∂flat to `flat_grad` in place.

    Args:
        layout: of both buffers.
        flat: factors `[size]`.
        flat_grad: gradient `[size]`, changed in place; its padding is left untouched.
        lam: strength λ ≥ 0; with 0 nothing is added and the state is still returned (telemetry).
        kind: which penalty.
        weights: `[L]` layer weights w_l ≥ 0; ones when absent.

    Returns:
        The norms of `flat`, whatever the kind.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown penalty {kind!r}; one of {', '.join(KINDS)}")
    state = _empty_state(layout, flat)
    with torch.no_grad():
        for group in layout.groups:
            a, b = group.views(flat)
            grad_a, grad_b = group.views(flat_grad)
            solved = _solve(a, b)
            _scatter(state, group.indices, solved)
            if lam == 0.0:
                continue
            w = torch.full((len(group.indices), 1, 1), 2.0 * lam, dtype=torch.float64, device=flat.device)
            if weights is not None:
                w *= weights[list(group.indices)].to(w).view(-1, 1, 1)
            if kind == "spectral":
                k = w * solved.inverse_n2
                grad_b.baddbmm_(b @ solved.z.to(b.dtype), (k * solved.z).to(b.dtype).mT)
                grad_a.baddbmm_((k * solved.q).to(a.dtype), solved.y.to(a.dtype).mT @ a)
            elif kind == "l2":
                grad_b.baddbmm_(b, (w * solved.gram_a).to(b.dtype))
                grad_a.baddbmm_((w * solved.gram_b).to(a.dtype), a)
            else:
                grad_a.addcmul_(a, w.to(a.dtype))
                grad_b.addcmul_(b, w.to(b.dtype))
    return state


def _solve(a: Tensor, b: Tensor) -> _Solved:
    gram_a = (a @ a.mT).double()
    gram_b = (b.mT @ b).double()
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
    inverse_n2 = torch.where(n2 > _TINY, 1.0 / n2.clamp_min(_TINY), torch.zeros_like(n2))
    sigma2 = ((z * q).sum((-2, -1), keepdim=True) * inverse_n2).flatten()
    return _Solved(gram_a, gram_b, y, z, q, inverse_n2, sigma2, (gram_a * gram_b).sum((-2, -1)))


def _normalised(m: Tensor) -> Tensor:
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    return m / trace.clamp_min(_TINY)[:, None, None]


def _empty_state(layout: ArenaLayout, flat: Tensor) -> SpectralState:
    norms = torch.zeros(2, len(layout.layers), dtype=torch.float64, device=flat.device)
    return SpectralState(norms[0], norms[1])


def _scatter(state: SpectralState, indices: tuple[int, ...], solved: _Solved) -> None:
    at = list(indices)
    state.sigma2[at] = solved.sigma2
    state.fro2[at] = solved.fro2
