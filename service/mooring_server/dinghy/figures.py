"""Figures and sample sheets of the exported set: what docs/dinghy.md reports.

Everything is measured on the shipped directories, with the independent classifier as ruler
(its own accuracy is always returned beside).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from . import NEW_SCENES, base_dir, clip_dir, dino_dir, held_out_subjects, nouns, sources
from .classifier import Classifier, Reading, load_classifier, own_accuracy, read
from .sampling import sample
from .world import World, scene_words

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Ask:
    """A fresh prompt and what a right picture of it shows."""

    prompt: str
    noun: str
    scene: str
    tint: str


def fresh_asks(count: int, seed: int = 2024) -> list[Ask]:
    """Prompts over all nouns in turn, random scenes (an eighth plain), every fourth with a tint."""
    rng = np.random.default_rng(seed)
    names = list(nouns.NAMED)
    order = rng.permutation(len(names))
    asks = []
    for i in range(count):
        noun = names[int(order[i % len(names)])]
        scene = str(rng.choice(list(nouns.SCENES)))
        if rng.random() < 0.125:
            scene = f"plain-{rng.choice(list(nouns.PLAIN))}"
        tint = str(rng.choice(list(nouns.TINTS))) if i % 4 == 3 else ""
        words = f"{tint} {noun}".strip()
        asks.append(Ask(f"a photo of {nouns.article(words)} {words} {scene_words(scene)}", noun, scene, tint))
    return asks


def load_base(directory: Path | None = None) -> Any:
    """The shipped base as a plain StableDiffusionPipeline, in eval mode and silent."""
    from diffusers import StableDiffusionPipeline

    kind: Any = StableDiffusionPipeline  # diffusers ships no types
    pipeline = kind.from_pretrained(directory or base_dir(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: Any, prompts: list[str], *, seed: int = 0, steps: int = 30, guidance: float = 4.0
) -> Pictures:
    """Pictures uint8 ``[N, 64, 64, 3]`` of ``prompts`` by the pipeline's own parts."""
    return sample(
        pipeline.unet,
        pipeline.text_encoder,
        pipeline.tokenizer,
        pipeline.vae,
        prompts,
        seed=seed,
        steps=steps,
        guidance=guidance,
    )


def true_pictures(world: World, asks: list[Ask], seed: int = 5) -> Pictures:
    """Rendered scenes of the same asks."""
    out = []
    for i, ask in enumerate(asks):
        rng = np.random.default_rng((seed, i))
        out.append(world.named(ask.noun, ask.scene, ask.tint, rng, styles=("3d",)).image)
    return np.stack(out)


def shares(asks: list[Ask], readings: list[Reading]) -> dict[str, float]:
    """Shares of nouns, scenes and asked tints that the classifier finds right."""
    pairs = list(zip(asks, readings, strict=True))
    tinted = [(a, r) for a, r in pairs if a.tint]
    return {
        "noun": sum(a.noun == r.noun for a, r in pairs) / len(pairs),
        "scene": sum(a.scene == r.scene for a, r in pairs) / len(pairs),
        "tint": sum(a.tint == r.tint for a, r in tinted) / max(1, len(tinted)),
    }


@torch.no_grad()
def kernel_distance(model: Classifier, a: Pictures, b: Pictures) -> float:
    """KID (unbiased squared MMD, kernel (x·y/d + 1)³) times 1000, on the classifier's features."""

    def features(images: Pictures) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return torch.cat([model.features(p) for p in torch.split(pixels, 128)]).double()

    x, y = features(a), features(b)
    both = torch.cat([x, y])
    mean, scale = both.mean(0), both.std(0).clamp_min(1e-6)
    x, y = (x - mean) / scale, (y - mean) / scale

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = (kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (n * (n - 1))
    within_y = (kernel(y, y).sum() - kernel(y, y).diagonal().sum()) / (m * (m - 1))
    return float(1000 * (within_x + within_y - 2 * kernel(x, y).mean()))


def grid(images: Pictures, columns: int, scale: int = 1) -> Image.Image:
    """Pictures ``[N, h, w, 3]`` in rows of ``columns``."""
    n, height, width = len(images), images.shape[1], images.shape[2]
    rows = (n + columns - 1) // columns
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * height, (i % columns) * width
        sheet[y : y + height, x : x + width] = image
    out = Image.fromarray(sheet)
    return out.resize((out.width * scale, out.height * scale), Image.Resampling.NEAREST) if scale > 1 else out


def side_by_side(true: Pictures, made: Pictures, columns: int = 12) -> Image.Image:
    """Rows of true pictures, each above the generated row of the same prompts."""
    rows = []
    for start in range(0, len(true) - columns + 1, columns):
        rows += [true[start : start + columns], made[start : start + columns]]
    return grid(np.concatenate(rows), columns, 2)


def measure_base(
    count: int, out: Path, directory: Path | None = None, guidance: float = 4.0
) -> dict[str, Any]:
    """Scene, object and tint shares on ``count`` fresh prompts; writes two sheets into ``out``."""
    world, ruler = World(seed=6), load_classifier()
    asks = fresh_asks(count)
    made = generate(load_base(directory), [a.prompt for a in asks], guidance=guidance)
    true = true_pictures(world, asks)
    # The two sets share their prompts, which biases the estimate: what counts is the excess over
    # a second set of true pictures of the same prompts.
    again = true_pictures(world, asks, seed=55)
    readings = read(ruler, made)
    wrong = [i for i, (a, r) in enumerate(zip(asks, readings, strict=True)) if a.noun != r.noun]
    out.mkdir(parents=True, exist_ok=True)
    side_by_side(true[:72], made[:72]).save(out / "dinghy-true-generated.png", optimize=True)
    if wrong:
        pick = wrong[:24]
        side_by_side(true[pick], made[pick], min(12, len(pick))).save(
            out / "dinghy-failures.png", optimize=True
        )
    misread = sorted({f"{asks[i].noun}->{readings[i].noun}" for i in wrong})
    return {
        "prompts": count,
        "guidance": guidance,
        "steps": 30,
        "generated": shares(asks, readings),
        "true": shares(asks, read(ruler, true)),
        "kid_x1000_over_true": kernel_distance(ruler, made, true) - kernel_distance(ruler, true, again),
        "misread": misread,
    }


def measure_codec(count: int = 400) -> dict[str, float]:
    """PSNR in dB of the shipped codec on fresh training-like scenes and on scenes of held-out subjects."""
    from .vae import psnr

    vae = load_base().vae
    world = World(seed=7)
    rng = np.random.default_rng(7)
    held = [
        world.subject(s.name, str(rng.choice(list(nouns.SCENES))), rng)
        for s in nouns.HELD_OUT
        for _ in range(max(1, count // 28))
    ]
    groups = {"world": [world.sample(i).image for i in range(count)], "held_out": held}
    tensors = {k: torch.from_numpy(np.stack(v)).permute(0, 3, 1, 2).float() / 255 for k, v in groups.items()}
    return {k: psnr(vae, v) for k, v in tensors.items()}


def _eval(model: Any) -> Any:
    return model.eval()


@torch.no_grad()
def measure_clip(trials: int = 10) -> dict[str, float]:
    """Top-1 retrieval of the true caption among 100 distinct ones, on fresh scenes of the world."""
    from transformers import CLIPModel, CLIPTokenizer

    from .judges import clip_features, normalise

    model = _eval(CLIPModel.from_pretrained(clip_dir()))
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir())
    world = World(seed=8)
    hits = {"all": 0, "named": 0, "named_count": 0}
    index = 0
    for _ in range(trials):
        chosen: dict[str, Any] = {}
        while len(chosen) < 100:
            s = world.sample(index)
            index += 1
            # One caption for one meaning: otherwise several among the hundred would be true.
            meaning = f"{s.noun or s.hyper} {s.scene} {s.tint}"
            if s.scene in nouns.SCENES:
                chosen.setdefault(meaning, s)
        samples = list(chosen.values())
        captions = [f"a photo of a {s.tint} {s.noun or s.hyper} {scene_words(s.scene)}" for s in samples]
        captions = [" ".join(c.split()) for c in captions]
        ids = tokenizer(captions, padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
        words, sight = clip_features(model, ids, normalise([s.image for s in samples]))
        right = (sight @ words.T).argmax(1) == torch.arange(100)
        named = torch.tensor([bool(s.noun) for s in samples])
        hits["all"] += int(right.sum())
        hits["named"] += int((right & named).sum())
        hits["named_count"] += int(named.sum())
    return {"top1_among_100": hits["all"] / (100 * trials), "named_only": hits["named"] / hits["named_count"]}


@torch.no_grad()
def measure_dino(each: int = 28) -> dict[str, float]:
    """Nearest-neighbour subject accuracy: held-out subjects in new scenes against their shipped photos."""
    from transformers import AutoModel

    from .judges import image_processor, normalise

    model = _eval(AutoModel.from_pretrained(dino_dir()))
    processor = image_processor()
    world = World(seed=9)

    def features(pixels: Tensor) -> Tensor:
        cls = torch.cat([model(pixel_values=p).last_hidden_state[:, 0] for p in torch.split(pixels, 128)])
        return nn.functional.normalize(cls, dim=-1)

    bank, owners = [], []
    for k, subject in enumerate(held_out_subjects()):
        photos = [Image.open(p).convert("RGB") for p in subject.photos]
        bank.append(features(processor(photos, return_tensors="pt")["pixel_values"]))
        owners += [k] * len(photos)
    reference = torch.cat(bank)
    right = total = 0
    for k, subject in enumerate(held_out_subjects()):
        rng = np.random.default_rng((9, k))
        new = [world.subject(subject.name, NEW_SCENES[i % len(NEW_SCENES)], rng) for i in range(each)]
        nearest = (features(normalise(new)) @ reference.T).argmax(1)
        right += sum(owners[int(n)] == k for n in nearest)
        total += each
    return {"nearest_neighbour": right / total, "subjects": float(len(bank)), "pictures": float(total)}


def all_figures(count: int, out: Path) -> dict[str, Any]:
    """Every figure of the shipped set; also written to ``<cache>/figures.json``."""
    figures = {
        "classifier_on_true": own_accuracy(load_classifier()),
        "base": measure_base(count, out),
        "codec_psnr_db": measure_codec(),
        "clip": measure_clip(),
        "dino": measure_dino(),
    }
    (sources.cache_dir() / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures
