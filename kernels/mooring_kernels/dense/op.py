"""Spectral and l2 penalties on θ − θ₀, for full fine-tuning: one sweep over the weights per training step.

No Gram matrix is small here, so σ_max comes from power iteration that is warm-started from step to step:

    u = ΔW·v,   w = ΔWᵀ·u,   σ² = vᵀw,   v ← w/‖w‖,

both products of a row block while it is in cache: θ and θ₀ are read once, and their difference is taken
before the product (taken after it, the digits of a small ΔW would be lost). With the v that the sweep starts
from, the gradient 2λ·u·vᵀ has rank one and is added block by block in the same sweep; ΔW is never stored.
Power iteration reaches σ from below: what it reports during training is an estimate, a certificate takes
`certificate.spectral_norm`.

Decoupled, the l2 penalty is a step towards θ₀: θ ← θ + rate·(θ₀ − θ), one fused call for all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 256
"""Of a block: its difference (1.3 MB for 1280 columns in float32) stays in cache between the two products."""
_TINY = 1e-30


class DensePenalty:
    """Norms and gradients of ΔW_l = θ_l − θ₀_l for a list of layers; keeps each layer's direction v.

    Args:
        base: θ₀_l `[out, …]`, kept by reference; kernels are flattened to `[out, in·kh·kw]`.
        seed: of the first directions.

    Attributes:
        sigma: `[L]` float32, σ_max estimates of the last call, on the layers' device.
    """

    def __init__(self, base: Sequence[Tensor], seed: int = 0) -> None:
        if not base:
            raise ValueError("a dense penalty needs at least one layer")
        self.base = [t.detach() for t in base]
        generator = torch.Generator().manual_seed(seed)
        self._v = [_unit(torch.randn(t[0].numel(), generator=generator).to(t.device)) for t in self.base]
        self.sigma = torch.zeros(len(self.base), device=self.base[0].device)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor], sweeps: int = 1) -> Tensor:
        """Improve every layer's direction and σ.

        Args:
            weights: θ_l, shaped as the base.
            sweeps: over the weights; one per training step is enough, a first call takes about ten.

        Returns:
            σ `[L]`, float32.

        Raises:
            ValueError: when shapes differ from the base's.
        """
        return self._sweep_all(weights, None, 0.0, None, sweeps)

    @torch.no_grad()
    def add_gradient_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        lam: float | Tensor,
        *,
        gains: Tensor | None = None,
        sweeps: int = 1,
    ) -> Tensor:
        """Add λ·∂/∂θ_l Σ w_l σ_l² to the gradients in place.

        Args:
            weights: θ_l.
            gradients: shaped as the weights, each contiguous.
            lam: λ ≥ 0, a number or a 0-d tensor.
            gains: `[L]` w_l; ones when absent.
            sweeps: as for `step`.

        Returns:
            σ `[L]`.

        Raises:
            ValueError: as `step`.
        """
        return self._sweep_all(weights, gradients, lam, gains, sweeps)

    def _sweep_all(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
        lam: float | Tensor,
        gains: Tensor | None,
        sweeps: int,
    ) -> Tensor:
        self._check(weights)
        found = []
        for index, (theta, start) in enumerate(zip(weights, self.base, strict=True)):
            for _ in range(sweeps - 1):
                _, self._v[index] = _sweep(theta, start, self._v[index])
            factor = 2.0 * lam if gains is None else 2.0 * lam * gains[index]
            gradient = None if gradients is None else gradients[index]
            sigma, self._v[index] = _sweep(theta, start, self._v[index], gradient, factor)
            found.append(sigma)
        self.sigma = torch.stack(found)
        return self.sigma

    def _check(self, weights: Sequence[Tensor]) -> None:
        shapes = [tuple(t.shape) for t in weights]
        expected = [tuple(t.shape) for t in self.base]
        if shapes != expected:
            wrong = next(
                i for i in range(max(len(shapes), len(expected))) if shapes[i:][:1] != expected[i:][:1]
            )
            raise ValueError(
                f"weights do not fit the base: layer {wrong} of {len(expected)} differs in shape"
            )


@torch.no_grad()
def decay_to_(weights: Sequence[Tensor], base: Sequence[Tensor], rate: float | Tensor) -> None:
    """Decoupled l2: move every weight the share `rate` of its way back to the base, in place.

    With rate = 2·lr·λ this is a gradient step on λ·‖θ − θ₀‖² (rate < 1 keeps it stable).

    Args:
        weights: θ_l.
        base: θ₀_l, same shapes and dtypes.
        rate: a number or a 0-d tensor.
    """
    if isinstance(rate, Tensor):
        for theta, start in zip(weights, base, strict=True):
            theta.lerp_(start, rate.to(theta.dtype))
    else:
        torch._foreach_lerp_(list(weights), list(base), rate)


def _sweep(
    theta: Tensor, start: Tensor, v: Tensor, gradient: Tensor | None = None, factor: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """σ and the next direction; adds factor·u·vᵀ to the gradient, where one is given."""
    w = torch.zeros_like(v)
    for first in range(0, theta.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        block = (theta[rows].float() - start[rows].float()).flatten(1)
        u = block @ v
        w += block.mT @ u
        if gradient is not None:
            goal = gradient[rows].view(len(u), -1)
            goal += torch.outer(factor * u, v).to(goal.dtype)
    sigma = torch.dot(v, w).clamp_min(0.0).sqrt()
    # a zero update keeps its old direction: the next step may need one
    norm = torch.linalg.vector_norm(w)
    return sigma, torch.where(norm > _TINY, w / norm.clamp_min(_TINY), v)


def _unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=0)
