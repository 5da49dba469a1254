"""What the rest of the recipe asks of either codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import patches, vae
from .device import Compute
from .loop import Plan
from .preset import Preset
from .render import Renderer
from .world import World


def plan(preset: Preset) -> Plan:
    """The training plan of the preset's codec."""
    return patches.PLAN if preset.codec == "patches" else vae.PLAN


def train(
    folder: Path,
    world: World,
    renderer: Renderer,
    compute: Compute,
    length: Plan,
    committed: Any | None = None,
    redraw: patches.Redraw | None = None,
) -> Any:
    """Train (or go on training) the codec of the world's preset in ``folder``; returns it averaged.

    ``committed`` is a patch codec to start from where ``folder`` holds no checkpoint, ``redraw`` what a patch
    codec's decoder is to mend.
    """
    if world.preset.codec == "patches":
        return patches.train_codec(folder, world, renderer, compute, length, committed, redraw)
    return vae.train_codec(folder, world, renderer, compute, length)


def load(base: Path) -> Any:
    """The codec of an exported base, in float32."""
    import diffusers

    name = diffusers.AutoencoderTiny.load_config(base / "vae")["_class_name"]
    return getattr(diffusers, name).from_pretrained(base / "vae").eval()


def channel_weights(codec: Any) -> Tensor | None:
    """What an error of one in each channel of the latents costs in pixels, ``[c]``, mean one.

    None for a variational codec, whose channels are not known to differ.
    """
    from diffusers import AutoencoderTiny

    return patches.channel_weights(codec) if isinstance(codec, AutoencoderTiny) else None


Encode = Callable[[Tensor, torch.Generator], Tensor]


def encoder(codec: Any) -> Encode:
    """A function of pixels ``[B, 3, H, W]`` in [0, 1] and a generator that gives what :func:`encode` does.

    A patch codec's is one product of matrices instead of its convolutions, which would take as long as a
    training step of the UNet.
    """
    from diffusers import AutoencoderTiny

    if not isinstance(codec, AutoencoderTiny):
        return lambda pixels, rng: encode(codec, pixels, rng)
    known: Any = codec  # diffusers ships no types
    pca, factor = patches.read_pca(known), known.config.scaling_factor
    return lambda pixels, _: factor * pca.encode(patches.to_features(pixels, pca.stages)).float()


def encode(codec: Any, pixels: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """The UNet's latents (deviation 1) of ``pixels`` ``[B, 3, H, W]`` in [0, 1].

    A variational codec's mean, or with ``rng`` a sample of its posterior.
    """
    found = codec.encode(pixels * 2 - 1)
    if hasattr(found, "latents"):
        latents: Tensor = found.latents
    else:
        latents = found.latent_dist.mode() if rng is None else found.latent_dist.sample(rng)
    scaled: Tensor = latents.float() * codec.config.scaling_factor
    return scaled


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
