"""Penalties on the low-rank update of every layer at once, with analytic gradients."""

from __future__ import annotations

from mooring_kernels.spectral.cap import CapMethod, spectral_cap_
from mooring_kernels.spectral.finite import check_finite
from mooring_kernels.spectral.op import (
    KINDS,
    Backend,
    Kind,
    SpectralState,
    add_gradient_,
    decay_,
    penalty,
    spectral_penalty,
    value,
)

__all__ = [
    "KINDS",
    "Backend",
    "CapMethod",
    "Kind",
    "SpectralState",
    "add_gradient_",
    "check_finite",
    "decay_",
    "penalty",
    "spectral_cap_",
    "spectral_penalty",
    "value",
]
