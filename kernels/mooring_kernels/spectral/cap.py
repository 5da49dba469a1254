"""A hard bound: σ_max(B_l A_l) ≤ τ_l, by clipping singular values in r-space or by rescaling B.

With G_A = A·Aᵀ = K·Kᵀ (a square root by eigenvalues, so zero rows of A do no harm), the eigenvalues of
Kᵀ·G_B·K are σ_i², and with its eigenvectors V, Z = K·V:

    B ← B·(I − Σ_{σ_i>τ} (1 − τ/σ_i)/σ_i² · z_i·(G_B·z_i)ᵀ)

replaces every σ_i > τ of B·A by τ and keeps its singular vectors and its other singular values: the matrix of
the ball of radius τ that is nearest in Frobenius norm. Only B changes. Everything runs in float64 on r×r
matrices. `rescale` multiplies B by min(1, τ/σ) instead: cheaper, no host synchronisation, but it shrinks
directions that were within the bound.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout, ShapeGroup
from mooring_kernels.spectral.finite import check_finite
from mooring_kernels.spectral.op import Backend, Slots, host_slots, penalty

CapMethod = Literal["clip", "rescale"]
TOLERANCE = 1e-5
"""After a clip σ ≤ τ(1 + TOLERANCE), whatever the rounding of the stored B."""
SCREEN = 0.99
"""Layers whose σ was found below SCREEN·τ are not looked at exactly."""
ATTEMPTS = 8


def spectral_cap_(
    layout: ArenaLayout,
    flat: Tensor,
    tau: float | Tensor,
    *,
    method: CapMethod = "clip",
    slots: Slots = None,
    backend: Backend = "auto",
) -> Tensor:
    """Bound the operator norm of every layer's update in place.

    Layers within the bound keep their bits. With `clip` the host waits for the layers' norms once, since only
    layers above the bound are worth an eigenvalue problem; `rescale` never waits.

    Args:
        layout: of `flat`.
        flat: `[size]` or `[S, size]`, changed in place (B only).
        tau: bound > 0 for all layers, or one for each `[L]` (infinity: none).
        method: `clip` is exact; `rescale` keeps to the accuracy of `penalty`.
        slots: rows to bound; all when absent.
        backend: which path finds the layers above the bound.

    Returns:
        Which layers were above their bound: bool `[L]` or `[T, L]`, on the device of `flat`.

    Raises:
        ValueError: on a bound that is not positive, an unknown method, or (clip only) factors that are not
            finite, naming the layer.
    """
    if method not in get_args(CapMethod):
        raise ValueError(f"unknown method {method!r}; one of {', '.join(get_args(CapMethod))}")
    bounds = torch.as_tensor(tau, dtype=torch.float64, device=flat.device).expand(len(layout.layers))
    if not isinstance(tau, Tensor) and not tau > 0.0:
        raise ValueError(f"the bound must be positive, not {tau}")
    with torch.no_grad():
        state = penalty(layout, flat, slots=slots, backend=backend)
        bank = flat if flat.ndim == 2 else flat.unsqueeze(0)
        sigma = state.sigma2.double().sqrt().reshape(-1, len(layout.layers))
        if method == "rescale":
            over = _rescale(layout, bank, slots, sigma, bounds)
        else:
            frobenius = state.fro2.double().sqrt().reshape(sigma.shape)
            over = _clip_all(layout, bank, host_slots(flat, slots), sigma, frobenius, bounds)
    return over if flat.ndim == 2 else over[0]


def _rescale(layout: ArenaLayout, bank: Tensor, slots: Slots, sigma: Tensor, bounds: Tensor) -> Tensor:
    over = sigma > bounds
    # a factor within the resolution of the storage would be rounded back to 1
    goal = bounds * (1.0 - torch.finfo(bank.dtype).eps / 2)
    factor = torch.where(over, goal / sigma, torch.ones_like(sigma)).float()
    where = None if slots is None else torch.as_tensor(slots, device=bank.device).long()
    rows = bank if where is None else bank.index_select(0, where)
    for group in layout.groups:
        _, b = group.views(rows)
        # float32 products rounded once; times exactly 1 a value keeps its bits
        b.copy_(b * factor[:, list(group.indices), None, None])
    if where is not None:
        bank.index_copy_(0, where, rows)
    return over


def _clip_all(
    layout: ArenaLayout, bank: Tensor, rows: list[int], sigma: Tensor, frobenius: Tensor, bounds: Tensor
) -> Tensor:
    suspect = (sigma > SCREEN * bounds) | ~torch.isfinite(frobenius)
    over = torch.zeros_like(suspect)
    for row, slot in enumerate(rows):
        chosen = set(suspect[row].nonzero().flatten().tolist())  # the one wait
        for group in layout.groups:
            at = [k for k, index in enumerate(group.indices) if index in chosen]
            if at:
                indices = [group.indices[k] for k in at]
                over[row, indices] = _clip(layout, group, bank[slot], at, bounds[indices])
    return over


def _clip(layout: ArenaLayout, group: ShapeGroup, flat: Tensor, at: list[int], bounds: Tensor) -> Tensor:
    """Clip the layers `at` of one group; says which were above their bound."""
    a_view, b_view = group.views(flat)
    a, b = a_view[at].double(), b_view[at].double()
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        check_finite(layout, flat)
    gram_a = a @ a.mT
    values, vectors = torch.linalg.eigh(gram_a)
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    tau = bounds.unsqueeze(-1)
    above: Tensor | None = None
    margin = 0.0
    for attempt in range(ATTEMPTS):
        gram_b = b.mT @ b
        squared, v = torch.linalg.eigh(root.mT @ gram_b @ root)
        sigma = squared.clamp_min(0.0).sqrt()
        over = (sigma > tau).any(-1)
        if above is None:
            above = over
        # rounding B to its storage moves σ a little: what is still within the tolerance is left
        over = over if attempt == 0 else (sigma > tau * (1.0 + TOLERANCE / 2)).any(-1)
        if not bool(over.any()):
            break
        goal = tau * (1.0 - margin)
        z = root @ v
        share = torch.where(sigma > goal, (1.0 - goal / sigma) / squared, torch.zeros_like(sigma))
        change = (b @ (z * share.unsqueeze(-2))) @ (gram_b @ z).mT
        stored = (b - change).to(flat.dtype).double()
        b = torch.where(over[:, None, None], stored, b)
        margin = max(2 * margin, torch.finfo(flat.dtype).eps / 4)
    else:
        raise ArithmeticError("the clip does not settle: the factors nearly cancel in this storage format")
    assert above is not None
    b_view[at] = b.to(flat.dtype)
    return above
