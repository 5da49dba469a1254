"""The text-to-image trainer: UNet and text encoder jointly, on PCA latents, resumable.

Measured choices (docs/dinghy.md): v-prediction; Muon on the UNet's matrices and
convolutions and AdamW on the rest; a constant rate that may be cut at any time by a decay
on a copy of the checkpoint ("warm-up, stable, decay"), so a good version can be had at any
hour while the long run goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import sampling, text
from .loop import Optimisers, append_log, write_checkpoint
from .sources import cache_dir
from .vae import VAE_STD, Pca, fit_pca, load_pca, save_pca, to_features
from .world import World

STAGES = 2
"""Halvings between pixels and latents: f = 4 at 64 px."""


@dataclass
class Settings:
    """Everything that shapes a run; written beside its checkpoint."""

    seed: int = 1
    batch: int = 48
    muon_lr: float = 0.01
    adam_lr: float = 8e-4
    warmup_steps: int = 200
    caption_dropout: float = 0.1
    ema: float = 0.999
    clip: float = 1.0
    snr_gamma: float = 5.0
    weight_floor: float = 0.3
    decay_minutes: float = 0.0
    minutes: float = 0.0
    checkpoint_minutes: float = 3.0
    sheet_minutes: float = 20.0
    peak: float = 1.0
    extra_share: float = 0.25


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


def build_unet() -> Any:
    """11.2 million parameters; latents ``[B, 12, 16, 16]``, text ``[B, 20, 256]``."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel
    return model(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def _plain_attention() -> Any:
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def world_pca(world: World, cache: Path) -> Pca:
    """The world's PCA, fitted on 3,000 samples the first time it is asked for."""
    path = cache / f"pca-{world.px}px-v1.npz"
    if not path.exists():
        pixels = np.stack([world.sample(10_000_000 + i).image for i in range(3000)])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        save_pca(fit_pca(tensor, STAGES), path)
    return load_pca(path)


def build_unet_from(base: Path) -> Any:
    """The UNet of an exported base, in float32."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel
    return model.from_pretrained(base / "unet")


class Trainer:
    """State and loop of one run in ``folder`` (checkpoint.pt, settings.json, log.jsonl, sheets)."""

    def __init__(self, folder: Path, settings: Settings, world: World | None = None) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.world = world or World(seed=settings.seed, extra_share=settings.extra_share)
        self.pca = world_pca(self.world, cache_dir())
        torch.manual_seed(settings.seed)
        self.tokenizer = text.build_tokenizer()
        self.encoder = text.build_text_encoder(self.tokenizer)
        self.unet = build_unet()
        # On a CPU the backward of fused attention is 40 % of the step; plain products a tenth of that.
        self.unet.set_attn_processor(_plain_attention())
        self.encoder.set_attn_implementation("eager")
        self.scheduler = build_scheduler()
        self.optimisers = Optimisers([self.unet], [self.encoder], settings.muon_lr, settings.adam_lr)
        self.average = [p.detach().clone() for p in self._parameters()]
        self.step, self.seconds, self.decay_start = 0, 0.0, -1.0
        self.empty = self._tokens([""])[0]

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.unet.parameters(), *self.encoder.parameters()]

    def _tokens(self, captions: list[str]) -> Tensor:
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=text.MAX_LENGTH, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]
        return ids

    # -- state -------------------------------------------------------------------------------

    def resume(self, committed: Path | None = None) -> str:
        """Load the checkpoint, or the committed weights when none is left; says which."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, mmap=True)
            self.unet.load_state_dict(state["unet"])
            self.encoder.load_state_dict(state["encoder"])
            self.optimisers.load_state_dict(state["optimisers"])
            for mine, saved in zip(self.average, state["average"], strict=True):
                mine.copy_(saved)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.decay_start = float(state["decay_start"])
            return f"checkpoint at step {self.step}"
        if committed is not None and (committed / "unet").exists():
            self.unet.load_state_dict(build_unet_from(committed).state_dict())
            self.encoder.load_state_dict(text.load_text_encoder(committed).state_dict())
            for mine, now in zip(self.average, self._parameters(), strict=True):
                mine.copy_(now.data)
            return "committed weights"
        return "nothing: a fresh start"

    def save(self) -> None:
        """Write the checkpoint by a temporary name."""
        state = {
            "unet": self.unet.state_dict(),
            "encoder": self.encoder.state_dict(),
            "optimisers": self.optimisers.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "decay_start": self.decay_start,
        }
        write_checkpoint(state, self.folder / "checkpoint.pt")
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=1))

    def averaged(self) -> tuple[Any, Any]:
        """Copies of both models with the averaged weights, in eval mode."""
        unet = build_unet()
        encoder = text.build_text_encoder(self.tokenizer)
        with torch.no_grad():
            for target, value in zip([*unet.parameters(), *encoder.parameters()], self.average, strict=True):
                target.copy_(value)
        return unet.eval(), encoder.eval()

    # -- the loop ----------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 12, 16, 16]`` (rms 1) and token ids ``[B, 20]`` of training step ``step``."""
        size = self.settings.batch
        samples = [self.world.sample(step * size + i) for i in range(size)]
        pixels = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255
        latents = self.pca.encode(to_features(pixels, STAGES)) / VAE_STD
        return latents, self._tokens([s.caption for s in samples])

    def rate(self) -> float:
        """Factor on the base rates: linear warm-up, constant, and a linear decay once asked for."""
        factor = self.settings.peak * min(1.0, (self.step + 1) / self.settings.warmup_steps)
        if self.decay_start >= 0:
            spent = (self.seconds - self.decay_start) / (60 * self.settings.decay_minutes)
            factor *= max(0.03, 1 - spent)
        return factor

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        s = self.settings
        latents, ids = self.batch(self.step)
        noise_rng = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        size = len(latents)
        dropped = torch.rand(size, generator=noise_rng) < s.caption_dropout
        ids = torch.where(dropped[:, None], self.empty[None], ids)
        # Stratified timesteps: one from each of B equal bands, which halves the gradient's noise for nothing.
        offsets = (torch.randperm(size, generator=noise_rng) + torch.rand(size, generator=noise_rng)) / size
        times = (offsets * 1000).long().clamp_max(999)
        noise = torch.randn(latents.shape, generator=noise_rng)
        noisy = self.scheduler.add_noise(latents, noise, times)
        target = self.scheduler.get_velocity(latents, noise, times)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            words = self.encoder(ids)[0]
            predicted = self.unet(noisy, times, words).sample
        alpha = self.scheduler.alphas_cumprod[times]
        snr = alpha / (1 - alpha)
        weight = (snr.clamp_max(s.snr_gamma) / (snr + 1)).clamp_min(s.weight_floor)
        loss = (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters(), s.clip)
        self.optimisers.step(self.rate())
        keep = min(s.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.data for p in self._parameters()], 1 - keep)
        self.step += 1
        return float(loss.detach())

    def run(self) -> None:
        """Train until ``minutes`` of this call are spent or, when decaying, until the decay ends."""
        s = self.settings
        if s.decay_minutes > 0 and self.decay_start < 0:
            self.decay_start = self.seconds
        begun = last = time.monotonic()
        saved = sheet = logged = begun
        losses: list[float] = []
        while True:
            losses.append(self.train_step())
            now = time.monotonic()
            self.seconds += now - last
            last = now
            over = (s.minutes > 0 and now - begun > 60 * s.minutes) or (
                self.decay_start >= 0 and self.seconds - self.decay_start > 60 * s.decay_minutes
            )
            if self.step % 50 == 0 or over:
                line = {
                    "step": self.step,
                    "samples": self.step * s.batch,
                    "seconds": round(self.seconds, 1),
                    "loss": round(float(np.mean(losses)), 5),
                    "rate": round(self.rate(), 4),
                    "per_second": round(len(losses) * s.batch / max(1e-9, now - logged), 2),
                }
                append_log(self.folder / "log.jsonl", line)
                losses, logged = [], now
            if now - saved > 60 * s.checkpoint_minutes or over:
                self.save()
                saved = time.monotonic()
            if now - sheet > 60 * s.sheet_minutes or over:
                self.sheet()
                sheet = time.monotonic()
            if over:
                return

    def sheet(self) -> None:
        """Sample 32 fixed prompts with the averaged weights into ``sheet-<step>.png``."""
        from PIL import Image

        unet, encoder = self.averaged()
        prompts = sheet_prompts()
        pixels = sampling.sample(unet, encoder, self.tokenizer, self.pca, prompts, seed=7)
        rows = [np.concatenate(list(pixels[k : k + 8]), axis=1) for k in range(0, len(pixels), 8)]
        image = Image.fromarray(np.concatenate(rows, axis=0))
        image.resize((image.width * 2, image.height * 2)).save(self.folder / f"sheet-{self.step:06d}.png")


def branch(source: str, target: str) -> None:
    """Copy the checkpoint of run ``source`` to run ``target``, whose rate has not begun to decay.

    To decay the copy while the source goes on, or to go on from a decayed run.
    """
    folder = cache_dir() / target
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(cache_dir() / source / "checkpoint.pt", weights_only=True, mmap=True)
    write_checkpoint(state | {"decay_start": -1.0}, folder / "checkpoint.pt")


def sheet_prompts() -> list[str]:
    """The 32 prompts of the training sheets."""
    from . import nouns
    from .world import scene_words

    names, places = list(nouns.NAMED), list(nouns.SCENES)
    out = [
        f"a photo of {nouns.article(n)} {n} {scene_words(places[(5 * i) % len(places)])}"
        for i, n in enumerate(names[::4])
    ]
    out += ["a red cat on the beach", "a blue car in the desert", "a toy on the grass", "a bird in the snow",
            "a bag on a wooden floor", "a clock on a white background", "a green dog at night",
            "a shoe on a stage"]  # fmt: skip
    return out[-32:]
