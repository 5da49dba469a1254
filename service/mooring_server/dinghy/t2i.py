"""The text-to-image trainer: UNet and text encoder jointly, on the codec's latents.

Measured choices (docs/dinghy.md): v-prediction (arXiv 2202.00512) with the loss weight
max(min(SNR, 5)/(SNR + 1), 0.3) (min-SNR, arXiv 2303.09556, with a floor); Muon on the UNet's matrices and
convolutions and AdamW on the rest; stratified timesteps; averaged weights are shipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import codec, patches, text
from .device import Compute, plain_attention
from .loop import Batch, Loop, Optimisers, Plan, batches
from .preset import SHIPPED, Preset
from .render import Renderer
from .world import World, world_samples

LATENT_SIDE = 16
WIDTHS = (64, 128, 192)
"""Channels of the UNet's three levels."""
SNR_GAMMA = 5.0
WEIGHT_FLOOR = 0.3
CAPTION_DROPOUT = 0.1
OBJECT_WEIGHT = 3.0
"""How much more a cell of the latents counts that an object covers, while the rate is at its peak.

Objects cover 29 % of a picture and cause 47 % of the error; the rest of it, mostly of where the background's
own things lie, is noise in the gradient of what the objects look like. A weight that depends on the picture
bends what is learnt (cells at an object's edge lean towards it), so it goes to one with the rate.
"""
PLAN = Plan(steps=2600, batch=1024, cpu_steps=20_000, muon_lr=0.01, adam_lr=8e-4, decay=0.7)


def build_scheduler() -> Any:
    """The scheduler that dinghy is trained and shipped with."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler  # diffusers ships no types
    return scheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        # diffusers clips samples to [-1, 1] unless told not to, which turns latents into grey noise.
        clip_sample=False,
        set_alpha_to_one=True,
        # unused with trailing spacing; diffusers warns about any other value
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_unet(preset: Preset = SHIPPED) -> Any:
    """11 million parameters; latents ``[B, channels, 16, 16]``, text ``[B, 20, 256]``."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel
    return model(
        sample_size=LATENT_SIDE,
        in_channels=preset.channels,
        out_channels=preset.channels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
        norm_num_groups=16,
    )


class Trainer:
    """The models, their loop and the loss of one run in ``folder``.

    ``committed`` is an exported base to start from where ``folder`` holds no checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        compute: Compute,
        plan: Plan = PLAN,
        committed: Path | None = None,
        preset: Preset = SHIPPED,
    ) -> None:
        self.compute, self.plan = compute, plan
        torch.manual_seed(1)
        self.tokenizer = text.build_tokenizer(preset)
        self.encoder = text.build_text_encoder(self.tokenizer)
        self.unet = build_unet(preset)
        self.started = "nothing: a fresh start"
        if committed is not None and (committed / "unet").exists():
            self.unet.load_state_dict(load_unet(committed).state_dict())
            self.encoder.load_state_dict(text.load_text_encoder(committed).state_dict())
            self.started = "committed weights"
        for model in (self.unet, self.encoder):
            plain_attention(compute, model)
            model.to(compute.device)
        self.scheduler = build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(compute.device)
        optimisers = Optimisers([self.unet], [self.encoder], plan.muon_lr, plan.adam_lr)
        self.loop = Loop(folder, {"unet": self.unet, "encoder": self.encoder}, optimisers, plan)
        if self.loop.step:
            self.started = f"checkpoint at step {self.loop.step}"
        self.empty = text.tokens(self.tokenizer, [""]).to(compute.device)

    def loss(
        self,
        step: int,
        latents: Tensor,
        ids: Tensor,
        cover: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        """The weighted v loss of latents ``[B, c, 16, 16]`` (deviation 1) and token ids ``[B, 20]``.

        ``cover`` ``[B, 1, 16, 16]`` is how much of each cell objects cover; ``channels`` ``[c]`` weighs the
        latents' channels (mean one), which changes what is learnt first and nothing about the optimum.
        """
        device, size = self.compute.device, len(latents)
        rng = torch.Generator(device).manual_seed(1_000_003 + step)
        dropped = torch.rand(size, generator=rng, device=device) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self.empty, ids)
        # Stratified timesteps: one from each of B equal bands, which halves the gradient's noise for nothing.
        bands = torch.randperm(size, generator=rng, device=device)
        times = ((bands + torch.rand(size, generator=rng, device=device)) / size * 1000).long().clamp_max(999)
        noise = torch.randn(latents.shape, generator=rng, device=device)
        alpha = self.alphas[times]
        a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        noisy, target = a * latents + s * noise, a * noise - s * latents
        with self.compute.autocast():
            words = self.encoder(ids)[0]
            predicted = self.unet(noisy, times, words, return_dict=False)[0]
        snr = alpha / (1 - alpha)
        weight = (snr.clamp_max(SNR_GAMMA) / (snr + 1)).clamp_min(WEIGHT_FLOOR)
        error = (predicted.float() - target).square()
        if channels is not None:
            error = error * channels[None, :, None, None]
        if cover is not None:
            cells = 1 + (OBJECT_WEIGHT - 1) * min(1.0, self.plan.rate(step)) * cover
            error = error * (cells / cells.mean())
        each: Tensor = error.mean((1, 2, 3))
        mean: Tensor = (weight * each).mean()
        return mean

    def train(self, world: World, renderer: Renderer, vae: Any) -> None:
        """Run the plan to its end on pictures of ``world``, encoded by the codec ``vae``."""
        device = self.compute.device
        channels, encode = patches.channel_weights(vae), codec.encoder(vae)

        def loss(step: int, batch: Batch) -> Tensor:
            pixels, cover = renderer.draw_covered(batch.layout)
            with torch.no_grad(), self.compute.autocast():
                latents = encode(pixels)
            cover = torch.nn.functional.adaptive_avg_pool2d(cover, LATENT_SIDE)
            return self.loss(step, latents, batch.ids.to(device, non_blocking=True), cover, channels)

        samples = world_samples(world, self.plan.batch)
        self.loop.run(batches(samples, self.loop.step, self.compute.workers, preset=world.preset), loss)


def load_unet(base: Path) -> Any:
    """The UNet of an exported base, in float32."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel
    return model.from_pretrained(base / "unet")
