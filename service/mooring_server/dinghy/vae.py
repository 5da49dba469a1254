"""The codec of dinghy-2: an AutoencoderKL that halves three times (128 px to 16x16 latents of 16 channels).

Loss: L1, L1 of both gradients, 2·MSE and a light KL term, as for the codec of latent diffusion (arXiv
2112.10752) without its discriminator; and the same picture at half size must follow from the latents at half
size (scale equivariance, arXiv 2502.09509), which keeps the latents as smooth as the picture and so easier to
draw by diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .device import Compute
from .loop import Batch, Loop, Optimisers, Plan, batches
from .render import Renderer
from .world import World, world_samples

LATENT_CHANNELS = 16
KL_WEIGHT = 5e-4
PLAN = Plan(steps=8000, batch=96, muon_lr=0.01, adam_lr=1e-3)


def build_vae() -> Any:
    """3.5 million parameters; pixels ``[B, 3, 128, 128]`` in -1..1, latents ``[B, 16, 16, 16]``."""
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # diffusers ships no types
    return kind(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
    )


def codec_loss(vae: Any, pixels: Tensor, compute: Compute, rng: torch.Generator) -> Tensor:
    """The loss of ``pixels`` ``[B, 3, H, W]`` in [0, 1]; a quarter of the batch also at half size."""
    with compute.autocast():
        posterior = vae.encode(pixels * 2 - 1).latent_dist
        latents = posterior.sample(rng)
        out = vae.decode(latents).sample
        quarter = max(1, len(pixels) // 4)
        small = vae.decode(nn.functional.avg_pool2d(latents[:quarter], 2)).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    halved = nn.functional.avg_pool2d(pixels[:quarter], 2)
    total: Tensor = distance(out, pixels) + 0.25 * distance(small, halved) + KL_WEIGHT * divergence
    return total


def distance(out: Tensor, pixels: Tensor) -> Tensor:
    """L1 + L1 of both gradients + 2·MSE between a decoding in -1..1 and ``pixels`` in [0, 1]."""
    difference = (out.float() + 1) / 2 - pixels
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + edges + 2 * difference.square().mean()


def train_codec(folder: Path, world: World, renderer: Renderer, compute: Compute, plan: Plan = PLAN) -> Any:
    """Train (or go on training) in ``folder``; returns the codec with averaged weights and its scale set."""
    torch.manual_seed(2)
    vae = build_vae().to(compute.device)
    optimisers = Optimisers([vae.encoder, vae.decoder], [vae.quant_conv, vae.post_quant_conv],
                            plan.muon_lr, plan.adam_lr)  # fmt: skip
    loop = Loop(folder, {"vae": vae}, optimisers, plan)
    size = plan.batch

    def loss(step: int, batch: Batch) -> Tensor:
        rng = torch.Generator(compute.device).manual_seed(step)
        return codec_loss(vae, renderer.draw(batch.layout), compute, rng)

    data = batches(world_samples(world, size), loop.step, compute.workers)
    loop.run(data, loss)
    loop.use_average()
    set_scale(vae.eval(), world, renderer)
    return vae


@torch.no_grad()
def set_scale(vae: Any, world: World, renderer: Renderer, count: int = 512) -> None:
    """Set ``scaling_factor`` so that the UNet's latents have standard deviation 1."""
    from .render import lay_out

    chunks = [
        renderer.draw(lay_out([world.sample(10_000_000 + at + i) for i in range(64)]))
        for at in range(0, count, 64)
    ]
    latents = torch.cat([vae.encode(c * 2 - 1).latent_dist.mean for c in chunks])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
