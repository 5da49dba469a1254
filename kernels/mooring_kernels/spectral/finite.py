"""Which layer holds values that are not finite: for the entrances of a system, not for its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout


def check_finite(layout: ArenaLayout, flat: Tensor) -> None:
    """Make sure that every factor is finite; padding is not looked at. Waits for the device.

    In a training step nothing is checked: a layer with a value that is not finite has NaN norms in
    `SpectralState`, which a caller may look at whenever it reads them anyway.

    Args:
        layout: of `flat`.
        flat: `[size]` or `[S, size]`.

    Raises:
        ValueError: naming the layers.
    """
    bad = []
    for name, (a, b) in layout.views(flat).items():
        found = [factor for factor, t in (("A", a), ("B", b)) if not bool(torch.isfinite(t).all())]
        if found:
            bad.append(f"{name} ({', '.join(found)})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"factors are not finite: {'; '.join(bad[:3])}{more}")
