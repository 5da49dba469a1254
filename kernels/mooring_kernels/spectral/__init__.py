"""Penalties on the low-rank update of every layer at once, with analytic gradients."""

from __future__ import annotations

from mooring_kernels.spectral.op import KINDS, Kind, SpectralState, add_gradient_, penalty, value

__all__ = ["KINDS", "Kind", "SpectralState", "add_gradient_", "penalty", "value"]
