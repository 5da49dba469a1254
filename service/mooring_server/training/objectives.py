"""The denoising objective and what a step draws for it.

    L = mean over rows of ‖target - f_θ(z_t, t, c)‖² / elements

with the base's own target (noise or velocity). A batch's timesteps are stratified: row b of B draws from the
b-th of B equal bands (bands shuffled over rows), which takes most of the variance out of a small batch.

Shape legend: B rows, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mooring_server.engine.base import BaseModel, PromptEmbeds
from mooring_server.evaluation.design import counter_generator


@dataclass(frozen=True)
class Draw:
    """What one step draws for its rows.

    Args:
        noise: `[B, C, h, w]`.
        timesteps: `[B]` long.
    """

    noise: Tensor
    timesteps: Tensor


def draw(base: BaseModel, like: Tensor, seed: int, step: int, purpose: str = "step") -> Draw:
    """Noise and timesteps of a step, by counter.

    Args:
        base: for the number of timesteps.
        like: `[B, C, h, w]` latents.
        seed: of the run.
        step: from 0.
        purpose: keeps the draws of several losses apart.
    """
    g = counter_generator(seed, purpose, step)
    rows = like.shape[0]
    noise = torch.randn(like.shape, generator=g).to(like)
    band = torch.randperm(rows, generator=g)
    position = (band + torch.rand(rows, generator=g)) / rows
    timesteps = (position * base.num_train_timesteps).long().clamp_(max=base.num_train_timesteps - 1)
    return Draw(noise, timesteps.to(like.device))


def denoising_loss(base: BaseModel, latents: Tensor, embeds: PromptEmbeds, drawn: Draw) -> Tensor:
    """Scalar loss of the active adapter on latents `[B, C, h, w]`; differentiable."""
    noisy = base.add_noise(latents, drawn.noise, drawn.timesteps)
    prediction = base.predict(noisy, drawn.timesteps, embeds)
    wanted = base.target(latents, drawn.noise, drawn.timesteps)
    return (prediction.float() - wanted.float()).square().mean()
