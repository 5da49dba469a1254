"""What the rest of the recipe asks of a codec: pixels to the UNet's latents and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .patches import read_pca, to_features


def load(base: Path) -> Any:
    """The codec of an exported base, in float32."""
    from diffusers import AutoencoderTiny

    kind: Any = AutoencoderTiny  # diffusers ships no types
    return kind.from_pretrained(base / "vae").eval()


Encode = Callable[[Tensor], Tensor]


def encoder(codec: Any) -> Encode:
    """A function of pixels ``[B, 3, H, W]`` in [0, 1] that gives what :func:`encode` does.

    One product of matrices instead of the encoder's convolutions, which would take as long as a training step
    of the UNet.
    """
    pca, factor = read_pca(codec), codec.config.scaling_factor
    return lambda pixels: factor * pca.encode(to_features(pixels, pca.stages)).float()


def encode(codec: Any, pixels: Tensor) -> Tensor:
    """The UNet's latents (deviation 1) of ``pixels`` ``[B, 3, H, W]`` in [0, 1]."""
    latents: Tensor = codec.encode(pixels * 2 - 1).latents.float() * codec.config.scaling_factor
    return latents


def decode(codec: Any, latents: Tensor) -> Tensor:
    """Pixels about [0, 1] of the UNet's latents, 64 pictures at a time."""
    parts = [codec.decode(z.float() / codec.config.scaling_factor).sample for z in torch.split(latents, 64)]
    pixels: Tensor = (torch.cat(parts) + 1) / 2
    return pixels


@torch.no_grad()
def psnr(codec: Any, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decode(encode(pixels)), pixels ``[N, 3, H, W]`` in [0, 1]."""
    out = torch.cat([decode(codec, encode(codec, p)) for p in torch.split(pixels, 32)])
    error = (out.clamp(0, 1) - pixels).square().mean()
    return float(-10 * torch.log10(error))
