"""A network whose rows do not depend on the batch: convolutions and linear layers take one row at a time.

CPU libraries choose a layer's algorithm, and with it the order of its additions, by the size of the whole
batch: the same row alone and among seven others differs in its last bits. Row by row every call has the shape
of a batch of one, so the bits are those of the row alone, whatever stands beside it. Attention, normalisation
and elementwise layers work row by row as they are. docs/engine.md has what it costs.

Left out: devices other than the CPU, where so many small calls would cost more than batching gains; there the
engine keeps requests apart instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RowWise:
    """Lets a network compute row by row while `active` is entered.

    Args:
        network: its `Conv2d` and `Linear` modules get another `forward`, which is the old one unless active.
    """

    def __init__(self, network: nn.Module) -> None:
        self._on = False
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                setattr(module, "forward", self._by_row(module.forward))  # noqa: B010 - on the instance

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute row by row inside."""
        before, self._on = self._on, True
        try:
            yield
        finally:
            self._on = before

    def _by_row(self, whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not self._on or x.shape[0] == 1:
                return whole(x)
            return torch.cat([whole(row) for row in torch.split(x, 1)])

        return forward
