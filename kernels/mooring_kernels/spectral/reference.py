"""The specification of the penalties: one layer at a time, dense, float64.

With ΔW = B·A per layer (any LoRA scale already folded into B):

    spectral      P = Σ_l w_l · σ_max(B_l A_l)²
    l2            P = Σ_l w_l · ‖B_l A_l‖_F²
    factor_decay  P = Σ_l w_l · (‖A_l‖_F² + ‖B_l‖_F²)

Gradients of the spectral term come from the leading singular triple of ΔW: ∂σ²/∂ΔW = 2σ·u·vᵀ, hence
∂P/∂B = 2wσ·u·(A·v)ᵀ and ∂P/∂A = 2wσ·(Bᵀu)·vᵀ. Where the leading value is repeated this is one subgradient.
Sources: P&P (arXiv 2505.19519) Alg. 1 for `l2` and its released LoRA code for `factor_decay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout
from mooring_kernels.spectral.op import Kind


def reference(
    layout: ArenaLayout, flat: Tensor, kind: Kind, weights: Tensor | None = None
) -> tuple[float, Tensor]:
    """Value and gradient of one penalty.

    Args:
        layout: of `flat`.
        flat: factors `[size]`, any dtype.
        kind: which penalty.
        weights: `[L]` layer weights w_l; ones when absent.

    Returns:
        P, and ∂P/∂flat as float64 `[size]` (padding zero).
    """
    exact = flat.detach().double()
    gradient = torch.zeros_like(exact)
    gradients = layout.views(gradient)
    total = 0.0
    for index, (name, (a, b)) in enumerate(layout.views(exact).items()):
        w = 1.0 if weights is None else float(weights[index])
        grad_a, grad_b = gradients[name]
        if kind == "spectral":
            u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
            sigma = s[0]
            total += w * float(sigma**2)
            grad_b += 2 * w * sigma * torch.outer(u[:, 0], a @ vh[0])
            grad_a += 2 * w * sigma * torch.outer(b.T @ u[:, 0], vh[0])
        elif kind == "l2":
            delta = b @ a
            total += w * float((delta**2).sum())
            grad_b += 2 * w * delta @ a.T
            grad_a += 2 * w * b.T @ delta
        else:
            total += w * float((a**2).sum() + (b**2).sum())
            grad_a += 2 * w * a
            grad_b += 2 * w * b
    return total, gradient


def reference_cap(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """The matrix nearest to B·A (Frobenius norm) among those with no singular value above τ.

    Args:
        a: `[r, in]`.
        b: `[out, r]`.
        tau: bound > 0.

    Returns:
        ΔW `[out, in]`, float64.
    """
    u, s, vh = torch.linalg.svd(b.detach().double() @ a.detach().double(), full_matrices=False)
    clipped: Tensor = (u * s.clamp_max(tau)) @ vh
    return clipped
