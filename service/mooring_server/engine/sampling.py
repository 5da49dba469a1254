"""Denoising as a generator: the engine answers what it yields, so other work may run between any two steps.

The loop is the diffusers pipeline's, tensor for tensor (guidance order, scheduler calls, noise), so images
are equal to the pipeline's on the same seed. Nothing thread-local (grad mode, active adapters) survives a
yield.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.bank import AdapterBank, Mix
from mooring_server.engine.model import BaseModel, PromptEmbeds
from mooring_server.engine.prompt_cache import PromptCache
from mooring_server.engine.ticks import Steps, UnetCall, by_itself

MAX_BATCH = 4
"""Images denoised in step by default; with guidance the UNet sees twice as many rows."""

OnStep = Callable[[int, Tensor], Generator[None, Any, None]]
"""Called after step k (from 1) with the estimate of the clean latents `[b, C, H, W]`; may take ticks."""


@dataclass(frozen=True, eq=False)
class SampleRow:
    """One image to make.

    Args:
        prompt: what to show.
        negative_prompt: what to steer away from; empty for the unconditional prompt.
        mix: adapters as (slot, factor); none is the base.
        seed: decides the initial noise, alone.
        embeddings: learned tokens the prompts may use.
        text_key: tells apart everything about the adapters that changes how a prompt is encoded; None when
            it cannot be told, and nothing is cached. Empty: the base's own encoding.
    """

    prompt: str
    negative_prompt: str = ""
    mix: Mix = ()
    seed: int = 0
    embeddings: LearnedEmbeddings | None = None
    text_key: Hashable | None = None


def sample(
    base: BaseModel,
    bank: AdapterBank,
    rows: Sequence[SampleRow],
    *,
    steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    batch: int = MAX_BATCH,
) -> Generator[None, None, Tensor]:
    """Make images by plain ticks, in batches of their own; see `draw`.

    Returns:
        uint8 `[N, height, width, 3]`.
    """
    drawn = draw(
        base,
        bank,
        rows,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        height=height,
        width=width,
        batch=batch,
    )
    return (yield from by_itself(base, bank, drawn))


def draw(
    base: BaseModel,
    bank: AdapterBank,
    rows: Sequence[SampleRow],
    *,
    steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    on_step: OnStep | None = None,
    batch: int = MAX_BATCH,
    prompts: PromptCache | None = None,
) -> Steps[Tensor]:
    """Make images, asking for each UNet call.

    Args:
        base: the base model.
        bank: its bank.
        rows: images to make, each with its own prompt, adapters and seed.
        steps: denoising steps.
        guidance_scale: classifier-free guidance w; at 1 or below the unconditional pass is left out.
        sampler: one of `model.SAMPLERS`.
        height: pixels; None is the base's native size.
        width: pixels; None is the base's native size.
        on_step: told of each step of the images being made; steps go on counting over the groups of `batch`.
        batch: images denoised in step.
        prompts: where encodings are kept.

    Returns:
        uint8 `[N, height, width, 3]`.
    """
    height, width = height or base.native_size, width or base.native_size
    encoded = yield from _encode(base, bank, rows, guidance_scale > 1, prompts or PromptCache(0))
    images: list[Tensor] = []
    done = 0
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        wanted = [encoded[_text(row, negative=False)] for row in group]
        if guidance_scale > 1:
            wanted = [encoded[_text(row, negative=True)] for row in group] + wanted
        latents = yield from _denoise(
            base,
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
            yield None  # each decode is a tick of its own: a large one must not stall the others' steps
            images.append(base.decode(latent))
    return torch.cat(images)


def _text(row: SampleRow, *, negative: bool) -> Hashable:
    text = row.negative_prompt if negative else row.prompt
    return (text, negative, tuple(row.mix), id(row.embeddings))


def _encode(
    base: BaseModel, bank: AdapterBank, rows: Sequence[SampleRow], guided: bool, prompts: PromptCache
) -> Steps[dict[Hashable, PromptEmbeds]]:
    encoded: dict[Hashable, PromptEmbeds] = {}
    worked = False
    for row in rows:
        for negative in (False, True) if guided else (False,):
            place = _text(row, negative=negative)
            if place in encoded:
                continue
            text = row.negative_prompt if negative else row.prompt
            key = None if row.text_key is None else (text, negative, row.text_key)
            found = None if key is None else prompts.find(key)
            if found is None:
                if worked:
                    yield None
                worked = True
                # one at a time: a prompt's bits must not depend on its neighbours
                encode = base.encode_negative if negative else base.encode_prompt
                with torch.no_grad(), bank.mixed([row.mix], counted=False):
                    found = encode([text], row.embeddings)
                if key is not None:
                    prompts.put(key, found)
            encoded[place] = found
    return encoded


def _denoise(
    base: BaseModel,
    rows: Sequence[SampleRow],
    embeds: PromptEmbeds,
    *,
    guidance_scale: float,
    scheduler: Any,
    steps: int,
    shape: tuple[int, int, int],
    on_step: OnStep | None,
) -> Steps[Tensor]:
    """Latents `[b, C, H, W]` of one group; `embeds` holds the negative rows first when guidance is on."""
    guided = guidance_scale > 1
    # a generator per row, on the CPU: the noise is the same whatever the batch or the device
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
    scheduler.set_timesteps(steps)
    latents: Tensor = torch.cat(noise).to(base.device) * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    mixes = [row.mix for row in rows] * (2 if guided else 1)
    for index, timestep in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        prediction = yield UnetCall(inputs, timestep, embeds, mixes)
        assert prediction is not None, "a UNet call is answered with its prediction"
        with torch.no_grad():
            if guided:
                without, with_prompt = prediction.chunk(2)
                prediction = without + guidance_scale * (with_prompt - without)
            step = scheduler.step(prediction, timestep, latents, **extra)
            latents = step.prev_sample
        if on_step is not None:
            yield from on_step(index + 1, _clean_estimate(scheduler, step))
    return latents


def _clean_estimate(scheduler: Any, step: Any) -> Tensor:
    """x̂₀ after a step: returned by the scheduler, or (DPM-Solver++) kept as its last model output."""
    estimate = getattr(step, "pred_original_sample", None)
    found: Tensor = scheduler.model_outputs[-1] if estimate is None else estimate
    return found


def _counting(on_step: OnStep, done: int) -> OnStep:
    return lambda step, latents: on_step(done + step, latents)
