"""The specification of the dense penalties: singular value decomposition, float64.

With ΔW_l = θ_l − θ₀_l, flattened to `[out, -1]`:

    spectral   P = Σ_l w_l · σ_max(ΔW_l)²,    ∂P/∂θ_l = 2 w_l σ u vᵀ
    l2         P = Σ_l w_l · ‖ΔW_l‖_F²,       ∂P/∂θ_l = 2 w_l ΔW_l
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(
    weights: Sequence[Tensor], base: Sequence[Tensor], kind: str, gains: Sequence[float] | None = None
) -> tuple[float, list[Tensor]]:
    """Value and gradients of one penalty.

    Args:
        weights: θ_l `[out, …]`.
        base: θ₀_l, likewise.
        kind: `spectral` or `l2`.
        gains: w_l; ones when absent.

    Returns:
        P, and ∂P/∂θ_l as float64, shaped as θ_l.
    """
    total, gradients = 0.0, []
    for index, (theta, start) in enumerate(zip(weights, base, strict=True)):
        w = 1.0 if gains is None else gains[index]
        delta = theta.detach().double() - start.detach().double()
        if kind == "spectral":
            u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            total += w * float(s[0] ** 2)
            gradients.append((2 * w * s[0] * torch.outer(u[:, 0], vh[0])).view_as(delta))
        else:
            total += w * float(delta.square().sum())
            gradients.append(2 * w * delta)
    return total, gradients
