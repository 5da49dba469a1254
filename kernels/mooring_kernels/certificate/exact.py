"""What a certificate states about one layer: singular values of ΔW = B·A in float64, without forming ΔW.

B = Q_B·R_B and Aᵀ = Q_A·R_A with orthonormal Q, so the singular values of B·A are those of the r×r matrix
R_B·R_Aᵀ. Householder QR and the small SVD are backward stable: the relative error of σ_max is about
r·2⁻⁵² ‖A‖‖B‖/σ_max, where the Gram route of `spectral` squares the condition number. For a convolution,
flatten the kernel to `[out, in·kh·kw]` and multiply σ_max by √(kh·kw) for a bound on the operator of
stride 1 (each input pixel appears in kh·kw patches).
"""

from __future__ import annotations

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
