"""Exact norms of a low-rank update, for certificates."""

from __future__ import annotations

from mooring_kernels.certificate.exact import LayerSpectrum, spectral_norm, spectrum

__all__ = ["LayerSpectrum", "spectral_norm", "spectrum"]
