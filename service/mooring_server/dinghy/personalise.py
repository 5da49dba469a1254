"""A plain LoRA of one held-out subject on the shipped base: can the base be personalised at all?

This is the base's own check, with peft and diffusers only; the product trains by its engine. The question
put to the pictures: does an encoder that never was a judge (the classifier's body) find the subject among
twenty look-alikes?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from . import (
    NEW_SCENES,
    HeldOutSubject,
    codec,
    held_out_subjects,
    new_scene_prompts,
    photo_prompt,
    subjects,
    text,
)
from .figures import Bench, generate, grid, load_base
from .render import from_uint8
from .t2i import build_scheduler
from .world import Picture

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
LOOK_ALIKES = 20
EIGHT = ("rocket", "duck", "robot", "teapot", "owl", "snowman", "teddy", "backpack")


def subject(name: str) -> HeldOutSubject:
    """The shipped held-out subject of this name."""
    return next(s for s in held_out_subjects() if s.name == name)


def photos_of(one: HeldOutSubject, bench: Bench, style: str = "3d") -> Picture:
    """The subject's photos at the base's size, uint8 ``[12, px, px, 3]``: those that ship, or in ``style``.

    Raises:
        ValueError: the subject is not drawn in ``style``.
    """
    if style != "3d":
        return subjects.photos(one.name, bench.world.sprites, bench.renderer, style)
    size = (bench.preset.px, bench.preset.px)
    images = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BOX) for path in one.photos]
    return np.stack([np.asarray(image) for image in images])


def train_lora(
    one: HeldOutSubject,
    photos: Picture,
    bench: Bench,
    *,
    moments: Sequence[int] = (400,),
    rank: int = 8,
    lr: float = 1e-3,
    batch: int = 4,
    targets: Sequence[str] = (*ATTENTION, *FEED_FORWARD),
    seed: int = 0,
) -> Iterator[tuple[int, Any]]:
    """An unprotected LoRA and a placeholder embedding on ``photos`` of a subject, uint8 ``[N, px, px, 3]``.

    Yields the adapted pipeline (always the same one) after each number of steps in ``moments``.
    """
    from peft import LoraConfig

    device = bench.compute.device
    torch.manual_seed(seed)
    pipeline = load_base(bench.compute, bench.preset)
    unet, encoder, tokenizer, vae = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.vae
    for module in (unet, encoder, vae):
        module.requires_grad_(False)
    tokenizer.add_tokens([one.placeholder])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    token = tokenizer.convert_tokens_to_ids(one.placeholder)
    table = encoder.get_input_embeddings()
    with torch.no_grad():
        # Starting from the class noun's own vector: the placeholder means "a toy" before it means this toy.
        noun = tokenizer(one.class_noun)["input_ids"][1]
        table.weight[token] = table.weight[noun]
    table.weight.requires_grad_(True)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    )
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [{"params": lora, "lr": lr}, {"params": [table.weight], "lr": lr}], weight_decay=0.0
    )
    with torch.no_grad():
        latents = codec.encode(vae, from_uint8(photos, device))
    ids = text.tokens(tokenizer, [photo_prompt(one.class_noun, one.placeholder)]).to(device)
    scheduler = build_scheduler()
    keep = torch.zeros_like(table.weight)
    keep[token] = 1
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, max(moments) + 1):
        unet.train()
        clean = latents[torch.randint(len(latents), (batch,), generator=generator).to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        times = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        noisy = scheduler.add_noise(clean, noise, times)
        target: Tensor = scheduler.get_velocity(clean, noise, times)
        with bench.compute.autocast():
            words = encoder(ids.expand(batch, -1))[0]
            predicted = unet(noisy, times, words).sample
        loss = nn.functional.mse_loss(predicted.float(), target)
        torch.autograd.backward(loss)
        if table.weight.grad is not None:
            table.weight.grad.mul_(keep)
        nn.utils.clip_grad_norm_(lora, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step in moments:
            unet.eval()
            yield step, pipeline


@torch.no_grad()
def _features(bench: Bench, pictures: Picture) -> Tensor:
    pixels = from_uint8(pictures, bench.compute.device)
    found = torch.cat([bench.ruler.features(p) for p in torch.split(pixels, 128)])
    return found.float()


@dataclass(frozen=True)
class Pool:
    """What a subject can be mistaken for: every sprite of a style.

    ``means`` is ``[len(sprites), 256]``, each over the same six new scenes.
    """

    style: str
    sprites: list[int]
    means: Tensor

    @staticmethod
    def of(bench: Bench, style: str = "3d") -> Pool:
        """The pool of a world; some thousand pictures are drawn and read."""
        every = bench.world.sprites
        found = [i for role in ("named", "extra", "held") for i in every.where(role, (style,))]
        return Pool(style, found, torch.stack([_mean_feature(bench, sprite, 6) for sprite in found]))

    def look_alikes(self, own: int, count: int = LOOK_ALIKES) -> list[int]:
        """Sprite ``own``, then the ``count`` - 1 others nearest to it for the encoder."""
        unit = nn.functional.normalize(self.means - self.means.mean(0), dim=-1)
        order = (unit @ unit[self.sprites.index(own)]).argsort(descending=True).tolist()
        nearest = [self.sprites[k] for k in order if self.sprites[k] != own]
        return [own, *nearest[: count - 1]]


def _views(bench: Bench, sprite: int, count: int, stream: int) -> Picture:
    """True pictures of a sprite, on the new scenes in turn."""
    samples = [
        bench.world.view(sprite, NEW_SCENES[k % len(NEW_SCENES)], np.random.default_rng((stream, k)))
        for k in range(count)
    ]
    return bench.renderer.pictures(samples)


def _mean_feature(bench: Bench, sprite: int, count: int) -> Tensor:
    return _features(bench, _views(bench, sprite, count, 17)).mean(0)


class LineUp:
    """Twenty look-alikes, the subject among them, that pictures are told apart by."""

    def __init__(self, bench: Bench, name: str, pool: Pool) -> None:
        self.own = bench.world.sprites.where("held", (pool.style,), name)[0]
        candidates = torch.stack([_mean_feature(bench, s, 24) for s in pool.look_alikes(self.own)])
        self.bench, self.centre = bench, candidates.mean(0)
        self.unit = nn.functional.normalize(candidates - self.centre, dim=-1)

    def recognised(self, pictures: Picture) -> float:
        """Share of ``pictures`` whose nearest look-alike is the subject itself."""
        found = nn.functional.normalize(_features(self.bench, pictures) - self.centre, dim=-1)
        return float(((found @ self.unit.T).argmax(1) == 0).float().mean())

    def own_accuracy(self) -> float:
        """What :meth:`recognised` gives for true pictures of the subject: the ruler's own accuracy."""
        return self.recognised(_views(self.bench, self.own, 48, 19))


def measure(
    bench: Bench,
    names: Sequence[str],
    out: Path,
    *,
    moments: Sequence[int] = (200, 400, 800),
    targets: Sequence[str] = (*ATTENTION, *FEED_FORWARD),
    style: str = "3d",
) -> dict[str, dict[str, float]]:
    """For each subject the share recognised after each number of steps; a sheet of the best into ``out``.

    In the style "noto" subject and look-alikes are drawn as no named object was in training. The sheet has a
    row of photos above a row of new scenes for every subject.
    """
    rows: list[Picture] = []
    table: dict[str, dict[str, float]] = {}
    pool = Pool.of(bench, style)
    for name in names:
        subject_, line_up = subject(name), LineUp(bench, name, pool)
        photos = photos_of(subject_, bench, style)
        table[name] = {"true": line_up.own_accuracy()}
        best: tuple[float, Picture] | None = None
        prompts = new_scene_prompts(subject_.class_noun, subject_.placeholder)
        for steps, pipeline in train_lora(subject_, photos, bench, moments=moments, targets=targets):
            made = np.concatenate([generate(bench, pipeline, prompts, seed=s) for s in range(3)])
            table[name][str(steps)] = share = line_up.recognised(made)
            if best is None or share > best[0]:
                best = (share, made)
        assert best is not None
        typer.echo(f"{name}: {table[name]}", err=True)
        rows += [photos[:10], best[1][:10]]
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(np.concatenate(rows), 10).save(out, optimize=True)
    return table
