"""Muon (Jordan et al., 2024) for matrices: the momentum's nearest semi-orthogonal matrix is the update.

The same update as `torch.optim.Muon`, with three differences that its use here needs. Newton-Schulz runs in a
dtype that the device computes in: torch's runs in bfloat16 everywhere, which some processors emulate, and
then 15 s of an 18 s training step are the optimiser's. Matrices of one shape are one batch. And where float32
allows it, a wide matrix X is iterated through its small Gram matrix: every iterate is p(XXᵀ)X for a
polynomial p, so only the first and the last product have X's width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; chosen by Muon's authors for the largest slope at zero, not for convergence to one."""
ITERATIONS = 5
GRAM_FROM = 1.5
"""Columns by rows from which the Gram matrix's way needs fewer operations."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, without weight decay.

    Args:
        params: matrices.
        lr: scaled by √max(1, rows/columns) for each of them.
        momentum: of the gradient's average.
        dtype: of the iteration.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # the base class may return a loss
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            same: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in same.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum).to(self._dtype)


def orthogonal(matrices: Tensor, eps: float = 1e-7) -> Tensor:
    """The same singular vectors with singular values near one (about 0.7 to 1.2).

    Args:
        matrices: `[n, rows, columns]`.
        eps: keeps a matrix of zeros one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)  # the spectral norm is at most one then
    wide = x.shape[-1] > GRAM_FROM * x.shape[-2] and x.dtype == torch.float32
    x = _through_gram(x) if wide else _directly(x)
    return x.mT if tall else x


def _directly(x: Tensor) -> Tensor:
    """The iteration as published: 20·m²n + 10·m³ operations for x `[…, m, n]`."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor) -> Tensor:
    """The same by G ← QGQ and P ← QP with Q = aI + bG + cG²; then Px. 4·m²n + 34·m³ operations.

    A Gram matrix knows a singular value below 1e-4 of the largest as rounding only. There Q is aI either way,
    so what the iteration makes of such a value is right nevertheless. In bfloat16 that would be below 1e-1.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    product = identity.expand_as(gram)
    for iteration in range(ITERATIONS):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = step @ product if iteration else step
        if iteration + 1 < ITERATIONS:
            gram = step @ gram @ step
    return product @ x
