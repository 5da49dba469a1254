"""A plain LoRA of one held-out subject on the shipped base: can the base be personalised at all?

This is the base's own check, with peft and diffusers only; the product trains by its engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from . import HeldOutSubject, base_dir, held_out_subjects, new_scene_prompts, photo_prompt
from .figures import Pictures, generate, grid, load_base
from .t2i import build_scheduler

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


def subject(name: str) -> HeldOutSubject:
    """The shipped held-out subject of this name."""
    return next(s for s in held_out_subjects() if s.name == name)


def photo_array(one: HeldOutSubject, px: int = 64) -> NDArray[np.uint8]:
    """The subject's photos, reduced: uint8 ``[12, px, px, 3]``."""
    images = [Image.open(p).convert("RGB").resize((px, px), Image.Resampling.BOX) for p in one.photos]
    return np.stack([np.asarray(i) for i in images])


def train_lora(
    one: HeldOutSubject,
    *,
    steps: int = 400,
    rank: int = 8,
    lr: float = 1e-3,
    batch: int = 4,
    feed_forward: bool = True,
    seed: int = 0,
    directory: Path | None = None,
) -> Any:
    """An unprotected LoRA and a placeholder embedding on the photos; returns the adapted pipeline."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    pipeline = load_base(directory or base_dir())
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
    targets = [*ATTENTION, *(FEED_FORWARD if feed_forward else ())]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    )
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [{"params": lora, "lr": lr}, {"params": [table.weight], "lr": lr}], weight_decay=0.0
    )
    pixels = torch.from_numpy(photo_array(one)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latents * vae.config.scaling_factor
    prompt = photo_prompt(one.class_noun, one.placeholder)
    ids = tokenizer([prompt], padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
    scheduler = build_scheduler()
    keep = torch.zeros_like(table.weight)
    keep[token] = 1
    generator = torch.Generator().manual_seed(seed)
    unet.train()
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, times)
        target: Tensor = scheduler.get_velocity(clean, noise, times)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            words = encoder(ids.expand(batch, -1))[0]
            predicted = unet(noisy, times, words).sample
        loss = nn.functional.mse_loss(predicted.float(), target)
        torch.autograd.backward(loss)
        if table.weight.grad is not None:
            table.weight.grad.mul_(keep)
        nn.utils.clip_grad_norm_(lora, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    unet.eval()
    return pipeline


def sheet(names: list[str], out: Path, *, steps: int = 400, feed_forward: bool = True) -> list[Pictures]:
    """For each subject a row of photos above a row of new scenes, written to ``out``; returns the latter."""
    rows, results = [], []
    for name in names:
        one = subject(name)
        pipeline = train_lora(one, steps=steps, feed_forward=feed_forward)
        made = generate(pipeline, new_scene_prompts(one.class_noun, one.placeholder)[:12], guidance=4.0)
        rows += [photo_array(one), made]
        results.append(made)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(np.concatenate(rows), 12, 2).save(out, optimize=True)
    return results
