"""What a certificate states about one layer: singular values of ΔW = B·A in float64, without forming ΔW.

B = Q_B·R_B and Aᵀ = Q_A·R_A with orthonormal Q, so the singular values of B·A are those of the r×r matrix
R_B·R_Aᵀ. Householder QR and the small SVD are backward stable: the relative error of σ_max is about
r·2⁻⁵² ‖A‖‖B‖/σ_max, where the Gram route of `spectral` squares the condition number. A convolution's kernel
is flattened to `[out, in·kh·kw]`; `conv_factor` bounds the operator by that matrix. `logit_gain` joins the
norms of a query and a key projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSpectrum:
    """Norms of one layer's update.

    Args:
        sigma_max: operator norm ‖BA‖₂; ‖ΔW·x‖ ≤ sigma_max·‖x‖ holds for every x.
        frobenius: ‖BA‖_F.
        stable_rank: ‖BA‖_F²/‖BA‖₂², between 1 and r; 0 for a zero update.
        singular_values: all of them, descending, at most r.
    """

    sigma_max: float
    frobenius: float
    stable_rank: float
    singular_values: tuple[float, ...]


def spectrum(a: Tensor, b: Tensor) -> LayerSpectrum:
    """Exact (float64) spectrum of B·A.

    Args:
        a: `[r, in]`.
        b: `[out, r]`, the LoRA scale folded in.

    Raises:
        ValueError: when the ranks disagree or a value is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"factors do not fit: A {tuple(a.shape)}, B {tuple(b.shape)}")
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise ValueError("factors hold values that are not finite")
    r_b = torch.linalg.qr(b.detach().double().cpu(), mode="r").R
    r_a = torch.linalg.qr(a.detach().double().cpu().mT, mode="r").R
    values = torch.linalg.svdvals(r_b @ r_a.mT)
    sigma = float(values[0])
    frobenius = float(values.square().sum().sqrt())
    return LayerSpectrum(
        sigma_max=sigma,
        frobenius=frobenius,
        stable_rank=(frobenius / sigma) ** 2 if sigma > 0.0 else 0.0,
        singular_values=tuple(values.tolist()),
    )


def spectral_norm(weight: Tensor) -> float:
    """Exact (float64) operator norm of a frozen matrix `[out, in, …]`, flattened to `[out, -1]`."""
    return float(torch.linalg.matrix_norm(weight.detach().double().cpu().flatten(1), ord=2))


def conv_factor(kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> float:
    """Bound on ‖convolution‖/σ_max of its kernel flattened to `[out, in·kh·kw]`, with zero padding.

    Every output position is that matrix times a patch, and an input pixel appears in at most
    ⌈kh/sh⌉·⌈kw/sw⌉ patches, so the factor is the square root of that: k for a k×k kernel of stride 1.

    Args:
        kernel: (kh, kw).
        stride: (sh, sw).

    Raises:
        ValueError: on a size below 1.
    """
    if min(*kernel, *stride) < 1:
        raise ValueError(f"kernel {kernel} and stride {stride} must be positive")
    return math.sqrt(math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True)))


def logit_gain(
    delta_query: float, base_query: float, delta_key: float, base_key: float, head_dim: int
) -> float:
    """How far attention logits can move: |Δlogit| ≤ gain·‖x‖·‖y‖ for query input x and key input y.

    (W_q + ΔW_q)x·(W_k + ΔW_k)y − W_q x·W_k y has three terms, each bounded by its two norms; a logit is that
    over √d. A head's rows are a part of the projection's, so norms of the whole projection bound each head.

    Args:
        delta_query: ‖ΔW_q‖₂.
        base_query: ‖W_q‖₂.
        delta_key: ‖ΔW_k‖₂.
        base_key: ‖W_k‖₂.
        head_dim: d, features of one head.

    Raises:
        ValueError: on a negative or undefined norm, or a dimension below 1.
    """
    norms = (delta_query, base_query, delta_key, base_key)
    if head_dim < 1 or not all(norm >= 0.0 for norm in norms):
        raise ValueError(f"not norms of attention projections: {norms}, head dimension {head_dim}")
    moved = delta_query * base_key + base_query * delta_key + delta_query * delta_key
    return moved / math.sqrt(head_dim)
