"""Penalties on the dense update θ − θ₀ of full fine-tuning."""

from __future__ import annotations

from mooring_kernels.dense.op import DensePenalty, decay_to_

__all__ = ["DensePenalty", "decay_to_"]
