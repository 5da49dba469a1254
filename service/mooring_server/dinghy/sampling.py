"""Batched sampling of a base model's parts, for sheets and figures (the product has its own engine)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import codec, text
from .device import Compute
from .render import to_uint8
from .t2i import build_scheduler
from .world import Picture


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
        ids = text.tokens(pipeline.tokenizer, part + [""] * len(part)).to(compute.device)
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + start + i))
            for i in range(len(part))
        ]
        latents = torch.stack(noise).to(compute.device)
        with compute.autocast():
            words = pipeline.text_encoder(ids)[0]
            for t in scheduler.timesteps:
                both = pipeline.unet(torch.cat([latents, latents]), t, words).sample.float()
                asked, free = both.chunk(2)
                latents = scheduler.step(free + guidance * (asked - free), t, latents).prev_sample
        out.append(to_uint8(codec.decode(pipeline.vae, latents)))
    return np.concatenate(out)
