"""The specification of the mixed-adapter linear: one row at a time, dense, float64.

Row b of a batch carries slot s_b and scale c_b:

    out[b]  = output[b] + c_b · x[b]·A[s_b]ᵀ·B[s_b]ᵀ
    ∂L/∂x[b]      = c_b · g[b]·B[s_b]·A[s_b]
    ∂L/∂B[s]     += c_b · g[b]ᵀ·(x[b]·A[s]ᵀ)         for every b with s_b = s
    ∂L/∂A[s]     += c_b · (g[b]·B[s])ᵀ·x[b]
    ∂L/∂output[b] = g[b]

with g = ∂L/∂out. Rows of slot 0 or scale 0 are the base: their output is returned as it came. Source: LoRA
(arXiv 2106.09685) eq. 3, one pair of factors for each row as in S-LoRA (arXiv 2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(
    output: Tensor, x: Tensor, A: Tensor, B: Tensor, slots: Sequence[int], scales: Sequence[float]
) -> Tensor:
    """The output with every row's own ΔW applied.

    Args:
        output: `[N, T, out]` (or `[N, out]`), the base layer's.
        x: `[N, T, in]` (or `[N, in]`), the base layer's input.
        A: `[S, r, in]`.
        B: `[S, out, r]`.
        slots: N slots.
        scales: N factors on ΔW.

    Returns:
        float64, shaped as `output`.
    """
    rows = []
    for row, (slot, scale) in enumerate(zip(slots, scales, strict=True)):
        delta = B[slot].double() @ A[slot].double()
        plain = output[row].double()
        rows.append(plain + scale * x[row].double() @ delta.mT if slot and scale else plain)
    return torch.stack(rows)


def reference_gradients(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, slots: Sequence[int], scales: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference` by the formulas above.

    Args:
        grad: ∂L/∂out, shaped as the output.
        x: as for `reference`, and so are the others.
        A: `[S, r, in]`.
        B: `[S, out, r]`.
        slots: N slots.
        scales: N factors.

    Returns:
        ∂L/∂x (without the base layer's share), ∂L/∂A `[S, r, in]`, ∂L/∂B `[S, out, r]`; float64.
    """
    grad_x = torch.zeros_like(x, dtype=torch.float64)
    grad_A = torch.zeros_like(A, dtype=torch.float64)
    grad_B = torch.zeros_like(B, dtype=torch.float64)
    for row, (slot, scale) in enumerate(zip(slots, scales, strict=True)):
        if not slot or not scale:
            continue
        g = grad[row].double().reshape(-1, B.shape[1])
        tokens = x[row].double().reshape(-1, A.shape[2])
        a, b = A[slot].double(), B[slot].double()
        grad_x[row] = (scale * g @ b @ a).reshape(x[row].shape)
        grad_B[slot] += scale * g.mT @ (tokens @ a.mT)
        grad_A[slot] += scale * (g @ b).mT @ tokens
    return grad_x, grad_A, grad_B
