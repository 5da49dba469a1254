"""AdamW on flat buffers: one pass over the arena row, its gradient and two moments.

The update of Loshchilov & Hutter (arXiv 1711.05101) with bias correction; weight decay is left out, as the
protection methods are the decay here. Padding has zero gradient and therefore stays exactly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8
WARMUP_SHARE = 0.05
FINAL_SHARE = 0.1


@dataclass
class FlatAdam:
    """Adam's moments of one flat parameter.

    Args:
        parameter: `[n]`, changed in place.
        first: `[n]` moving mean of the gradient.
        second: `[n]` moving mean of its square.
    """

    parameter: Tensor
    first: Tensor
    second: Tensor

    @staticmethod
    def create(parameter: Tensor) -> FlatAdam:
        """Fresh moments for a parameter."""
        return FlatAdam(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, gradient: Tensor, learning_rate: float, number: int) -> None:
        """One update in place.

        Args:
            gradient: `[n]`.
            learning_rate: step size.
            number: of this update, from 1 (bias correction).
        """
        self.first.lerp_(gradient, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        scale = math.sqrt(1 - BETA2**number)
        denominator = self.second.sqrt().div_(scale).add_(EPSILON)
        self.parameter.addcdiv_(self.first, denominator, value=-learning_rate / (1 - BETA1**number))


@torch.no_grad()
def clip_(gradient: Tensor, largest: float) -> float:
    """Scale a flat gradient in place to a norm of at most `largest`; returns the norm it had."""
    norm = float(gradient.norm())
    if norm > largest:
        gradient.mul_(largest / norm)
    return norm


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor of step 0 … steps-1: linear warm-up, then cosine decay to `FINAL_SHARE`."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
