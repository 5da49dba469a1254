"""The base's own latents of a list of prompts, drawn once and kept: where a drift probe starts from.

Drawing them is most of the cost of a probe and depends on the base and the prompts alone, so every training
and every evaluation of a server shares them. A list is always drawn in the same batches, whether it was kept
or not: what was kept cannot change a bit of what a resumed run measures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.bank import AdapterBank, TrainingSlot
from mooring_server.engine.base import BaseModel, PromptEmbeds
from mooring_server.evaluation.design import counter_generator

SAMPLER = "dpmpp_2m"
"""Second order: at the few steps that a probe spends, its samples are sharper than DDIM's."""


@dataclass(frozen=True)
class Sampling:
    """How the base draws for a probe.

    Args:
        seed: of the initial noise.
        steps: denoising steps; few, as only noised samples are needed.
        guidance: classifier-free guidance scale.
        rows: UNet rows in one tick.
    """

    seed: int
    steps: int
    guidance: float
    rows: int


@dataclass
class SampleCache:
    """The newest few lists. Not thread-safe: it belongs to whoever runs the ticks.

    Args:
        largest: lists to keep.
    """

    largest: int = 8
    kept: OrderedDict[tuple[object, ...], Tensor] = field(default_factory=OrderedDict)

    def samples(
        self,
        base: BaseModel,
        bank: AdapterBank,
        prompts: Sequence[str],
        how: Sampling,
        tick: Callable[[], None],
    ) -> Generator[None, None, Tensor]:
        """Latents `[P, C, H, W]` of the prompts. One yield a tick; none when they are kept."""
        key = (base.digest, tuple(prompts), how)
        if key not in self.kept:
            self.kept[key] = yield from _draw(base, bank, prompts, how, tick)
        self.kept.move_to_end(key)
        while len(self.kept) > self.largest:
            self.kept.popitem(last=False)
        return self.kept[key]


def _draw(
    base: BaseModel, bank: AdapterBank, prompts: Sequence[str], how: Sampling, tick: Callable[[], None]
) -> Generator[None, None, Tensor]:
    """Guided sampling from noise that depends on the seed and the prompt alone."""
    if not prompts:
        return torch.zeros(0, *latent_shape(base))
    untouched = Predictor(base, bank)
    embeds, empty = untouched.encode(prompts), untouched.empty()
    at_once = max(1, how.rows // 2)
    drawn = []
    for first in range(0, len(prompts), at_once):
        rows = range(first, min(first + at_once, len(prompts)))
        noise = [
            torch.randn(latent_shape(base), generator=counter_generator(how.seed, "x0", prompts[row]))
            for row in rows
        ]
        scheduler = base.new_scheduler(SAMPLER)
        scheduler.set_timesteps(how.steps)
        latents: Tensor = torch.stack(noise).to(embeds.hidden) * scheduler.init_noise_sigma
        both = PromptEmbeds.cat([embeds.rows(list(rows)), empty.rows([0] * len(rows))])
        for timestep in scheduler.timesteps:
            at = timestep.to(latents.device).expand(2 * len(latents))
            conditional, blank = untouched.raw(torch.cat([latents, latents]), at, both).chunk(2)
            guided = blank + how.guidance * (conditional - blank)
            latents = scheduler.step(guided, timestep, latents).prev_sample
            tick()
            yield
        drawn.append(latents)
    return torch.cat(drawn)


def latent_shape(base: BaseModel) -> tuple[int, int, int]:
    """(C, H, W) of a picture of the base's native size."""
    side = base.native_size // base.vae_scale_factor
    return base.latent_channels, side, side


@dataclass(frozen=True)
class Predictor:
    """The base with one adapter, called without gradients.

    no_grad and the bank's row context are held inside one call: a context left open over a `yield` would
    leak into whatever task the engine runs in the next tick.
    """

    base: BaseModel
    bank: AdapterBank
    slot: int | TrainingSlot = 0
    scale: float = 1.0

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], embeddings: LearnedEmbeddings | None = None) -> PromptEmbeds:
        """One row a prompt, by the adapter's text-encoder layers where it has any."""
        if isinstance(self.slot, int):
            with self.bank.mixed([[(self.slot, self.scale)]] * len(prompts), counted=False):
                return self.base.encode_prompt(prompts, embeddings)
        return self.base.encode_prompt(prompts, embeddings)

    @torch.no_grad()
    def empty(self) -> PromptEmbeds:
        """One row: what this base takes for "no condition"."""
        return self.base.encode_negative([""])

    @torch.no_grad()
    def raw(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The network's own output (epsilon or v), [B,C,H,W]."""
        if isinstance(self.slot, int):
            with self.bank.rows([self.slot] * len(latents), [self.scale] * len(latents)):
                return self.base.predict(latents, timesteps, embeds)
        with self.slot.active(self.scale):
            return self.base.predict(latents, timesteps, embeds)

    @torch.no_grad()
    def eps(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Epsilon in float32, [B,C,H,W]."""
        return self.base.to_eps(self.raw(latents, timesteps, embeds), latents, timesteps).float()
