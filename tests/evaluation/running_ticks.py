"""Running generators of ticks in tests."""

from __future__ import annotations

import torch


def finish(steps):
    """Run a generator of ticks to its end: (result, number of ticks)."""
    ticks = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, ticks
        ticks += 1
        assert torch.is_grad_enabled(), "no context may stay open between ticks"
