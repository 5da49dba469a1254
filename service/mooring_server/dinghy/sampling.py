"""Batched sampling of a base model's parts, for sheets and figures (the product has its own engine)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import text
from .vae import VAE_STD, Pca


@torch.no_grad()
def sample(
    unet: Any,
    encoder: Any,
    tokenizer: Any,
    decoder: Any,
    prompts: list[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    chunk: int = 32,
) -> NDArray[np.uint8]:
    """DDIM with guidance in bf16 autocast: pictures uint8 ``[N, 64, 64, 3]``.

    ``decoder`` is an AutoencoderTiny or, while there is none yet, the PCA (its linear inverse).
    The noise of prompt ``i`` depends on ``seed``, ``i`` and ``chunk`` only.
    """
    from .t2i import build_scheduler

    out = []
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        ids = tokenizer(
            part + [""] * len(part),
            padding="max_length",
            truncation=True,
            max_length=text.MAX_LENGTH,
            return_tensors="pt",
        )["input_ids"]
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed * 100_003 + start)
        latents = torch.randn((len(part), 12, 16, 16), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            words = encoder(ids)[0]
            for t in scheduler.timesteps:
                both = unet(torch.cat([latents, latents]), t, words).sample.float()
                asked, free = both.chunk(2)
                latents = scheduler.step(free + guidance * (asked - free), t, latents).prev_sample
        latents = latents.float() * VAE_STD
        if isinstance(decoder, Pca):
            pixels = decoder.decode(latents)
            pixels = nn.functional.pixel_shuffle(nn.functional.pixel_shuffle(pixels, 2), 2)
        else:
            pixels = (decoder.decode(latents).sample + 1) / 2
        out.append((pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))
    return np.concatenate(out)
