"""Batched sampling of a base model's parts, for sheets and figures (the product has its own engine)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import codec, text
from .device import Compute
from .patches import Redraw
from .render import to_uint8
from .t2i import build_scheduler
from .world import Picture

REDRAWN = (10, 3)
"""Steps that a whole picture would take, and how many of them at most a picture is drawn again."""


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    compute: Compute,
    *,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 4.0,
    chunk: int = 0,
) -> Picture:
    """DDIM with guidance in bf16 autocast by a pipeline's parts: pictures uint8 ``[N, px, px, 3]``.

    The noise of prompt ``i`` depends on ``seed`` and ``i`` only. ``chunk`` pictures are drawn at once
    (by default 256 on a GPU and 32 on a CPU).
    """
    chunk = chunk or (32 if compute.device.type == "cpu" else 256)
    config, out = pipeline.unet.config, []
    for start in range(0, len(prompts), chunk):
        part = list(prompts[start : start + chunk])
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + start + i))
            for i in range(len(part))
        ]
        ids = text.tokens(pipeline.tokenizer, part).to(compute.device)
        latents = torch.stack(noise).to(compute.device)
        latents = _denoise(pipeline, latents, ids, scheduler, scheduler.timesteps, guidance, compute)
        out.append(to_uint8(codec.decode(pipeline.vae, latents)))
    return np.concatenate(out)


def _denoise(
    pipeline: Any,
    latents: Tensor,
    ids: Tensor,
    scheduler: Any,
    times: Tensor,
    guidance: float,
    compute: Compute,
) -> Tensor:
    """``latents`` ``[B, c, h, w]`` after the timesteps ``times``, asked for token ids ``[B, 20]``."""
    empty = text.tokens(pipeline.tokenizer, [""] * len(ids)).to(ids.device)
    with compute.autocast():
        words = pipeline.text_encoder(torch.cat([ids, empty]))[0]
        for t in times:
            both = pipeline.unet(torch.cat([latents, latents]), t, words).sample.float()
            asked, free = both.chunk(2)
            latents = scheduler.step(free + guidance * (asked - free), t, latents).prev_sample
    return latents


def redrawing(pipeline: Any, compute: Compute, guidance: float = 4.0) -> Redraw:
    """A function that draws the end of given pictures again: latents that ``pipeline`` might have made.

    It takes latents ``[B, c, h, w]`` (deviation 1), token ids ``[B, 20]`` and a generator, adds noise up to
    one of the last timesteps (SDEdit, arXiv 2108.01073) and removes it with guidance: what is shown stays,
    with the model's own mistakes in it.
    """
    steps, most = REDRAWN

    @torch.no_grad()
    def redraw(latents: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        left = 1 + int(torch.randint(most, (), generator=rng, device=rng.device))
        times = scheduler.timesteps[-left:]
        noise = torch.randn(latents.shape, generator=rng, device=latents.device)
        noisy = scheduler.add_noise(latents, noise, times[:1].expand(len(latents)))
        return _denoise(pipeline, noisy, ids, scheduler, times, guidance, compute)

    return redraw
