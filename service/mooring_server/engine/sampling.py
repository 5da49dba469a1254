"""Denoising as a generator: every `yield` ends one tick, so other work may run between any two steps.

The loop is the diffusers pipeline's, tensor for tensor (guidance order, scheduler calls, noise), so images
are equal to the pipeline's on the same seed. Nothing thread-local (grad mode, active adapters) survives a
yield.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.bank import ZERO_SLOT, AdapterBank
from mooring_server.engine.model import BaseModel, PromptEmbeds

MAX_BATCH = 4
"""Images denoised together by default; with guidance the UNet sees twice as many rows."""


@dataclass(frozen=True, eq=False)
class SampleRow:
    """One image to make.

    Args:
        prompt: what to show.
        negative_prompt: what to steer away from; empty for the unconditional prompt.
        slot: adapter slot; 0 is the base.
        scale: factor on the adapter.
        seed: decides the initial noise, alone.
        embeddings: learned tokens the prompts may use.
    """

    prompt: str
    negative_prompt: str = ""
    slot: int = ZERO_SLOT
    scale: float = 1.0
    seed: int = 0
    embeddings: LearnedEmbeddings | None = None


def sample(
    base: BaseModel,
    bank: AdapterBank,
    rows: Sequence[SampleRow],
    *,
    steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    sampler: str = "ddim",
    on_step: Callable[[int, Tensor], None] | None = None,
    batch: int = MAX_BATCH,
) -> Generator[None, None, Tensor]:
    """Make images.

    Args:
        base: the base model.
        bank: its bank.
        rows: images to make, each with its own prompt, adapter, scale and seed.
        steps: denoising steps.
        guidance_scale: classifier-free guidance w; at 1 or below the unconditional pass is left out.
        height: pixels; None is the base's native size.
        width: pixels; None is the base's native size.
        sampler: one of `model.SAMPLERS`.
        on_step: called after step k (from 1) with the current estimate of the clean latents `[b, C, H, W]` of
            the images being made; decode it for a preview. Steps go on counting over the groups of `batch`.
        batch: images denoised together.

    Returns:
        uint8 `[N, height, width, 3]`.
    """
    height, width = height or base.native_size, width or base.native_size
    embeds: dict[tuple[str, bool, int], PromptEmbeds] = {}
    for row in rows:
        texts = [(row.prompt, False)] + ([(row.negative_prompt, True)] if guidance_scale > 1 else [])
        for text, negative in texts:
            key = (text, negative, id(row.embeddings))
            if key not in embeds:
                with torch.no_grad():
                    # one at a time: a prompt's bits must not depend on its neighbours
                    encode = base.encode_negative if negative else base.encode_prompt
                    embeds[key] = encode([text], row.embeddings)
                yield
    images: list[Tensor] = []
    done = 0
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        wanted = [embeds[row.prompt, False, id(row.embeddings)] for row in group]
        if guidance_scale > 1:
            unwanted = [embeds[row.negative_prompt, True, id(row.embeddings)] for row in group]
            wanted = unwanted + wanted
        latents = yield from _denoise(
            base,
            bank,
            group,
            PromptEmbeds.cat(wanted),
            guidance_scale=guidance_scale,
            scheduler=base.new_scheduler(sampler),
            steps=steps,
            shape=(base.latent_channels, height // base.vae_scale_factor, width // base.vae_scale_factor),
            on_step=None if on_step is None else _counting(on_step, done),
        )
        done += steps
        for latent in latents.unsqueeze(1):
            images.append(base.decode(latent))
            yield
    return torch.cat(images)


def _denoise(
    base: BaseModel,
    bank: AdapterBank,
    rows: Sequence[SampleRow],
    embeds: PromptEmbeds,
    *,
    guidance_scale: float,
    scheduler: Any,
    steps: int,
    shape: tuple[int, int, int],
    on_step: Callable[[int, Tensor], None] | None,
) -> Generator[None, None, Tensor]:
    """Latents `[b, C, H, W]` of one group; `embeds` holds the negative rows first when guidance is on."""
    guided = guidance_scale > 1
    # a generator per row, on the CPU: the noise is the same whatever the batch or the device
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
    scheduler.set_timesteps(steps)
    latents: Tensor = torch.cat(noise).to(base.device) * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    slots = [row.slot for row in rows] * (2 if guided else 1)
    scales = [row.scale for row in rows] * (2 if guided else 1)
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            with bank.rows(slots, scales):
                prediction = base.predict(inputs, timestep.to(base.device), embeds)
            if guided:
                without, with_prompt = prediction.chunk(2)
                prediction = without + guidance_scale * (with_prompt - without)
            step = scheduler.step(prediction, timestep, latents, **extra)
            latents = step.prev_sample
            if on_step is not None:
                on_step(index + 1, _clean_estimate(scheduler, step))
        yield
    return latents


def _clean_estimate(scheduler: Any, step: Any) -> Tensor:
    """x̂₀ after a step: returned by the scheduler, or (DPM-Solver++) kept as its last model output."""
    estimate = getattr(step, "pred_original_sample", None)
    found: Tensor = scheduler.model_outputs[-1] if estimate is None else estimate
    return found


def _counting(on_step: Callable[[int, Tensor], None], done: int) -> Callable[[int, Tensor], None]:
    return lambda step, latents: on_step(done + step, latents)
