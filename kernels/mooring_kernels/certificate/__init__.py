"""Exact norms of a low-rank update, for certificates."""

from __future__ import annotations

from mooring_kernels.certificate.exact import (
    LayerSpectrum,
    conv_factor,
    logit_gain,
    spectral_norm,
    spectrum,
)

__all__ = ["LayerSpectrum", "conv_factor", "logit_gain", "spectral_norm", "spectrum"]
