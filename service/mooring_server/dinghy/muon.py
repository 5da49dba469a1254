"""Muon (Jordan et al., 2024) for matrices: the momentum's nearest semi-orthogonal matrix is the update.

The same update as `torch.optim.Muon`, with two differences that its use here needs. Newton-Schulz runs in a
dtype that the device computes in: torch's runs in bfloat16 everywhere, which some processors emulate, and
then 15 s of an 18 s training step are the optimiser's. And matrices of one shape are one batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; chosen by Muon's authors for the largest slope at zero, not for convergence to one."""
ITERATIONS = 5


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
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)  # the spectral norm is at most one then
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
