"""Figures and sample sheets of the exported set: what docs/dinghy.md reports.

Everything is measured on the shipped directories, with the independent classifier as ruler
(its own accuracy is always returned beside).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import NEW_SCENES, base_dir, clip_dir, dino_dir, held_out_subjects, nouns, text
from .classifier import Classifier, Reading, draw_true, read
from .device import Compute, plain_attention
from .preset import SHIPPED, Preset
from .render import Renderer, from_uint8
from .sampling import sample
from .world import Picture, Rng, Sample, World, scene_words


@dataclass(frozen=True)
class Ask:
    """A fresh prompt and what a right picture of it shows: one noun, two nouns, or ``count`` of one."""

    prompt: str
    nouns: tuple[str, ...]
    scene: str
    tint: str = ""
    count: int = 1


@dataclass(frozen=True)
class Bench:
    """What measuring needs: the world's pictures, the ruler and the device."""

    world: World
    renderer: Renderer
    ruler: Classifier
    compute: Compute

    @property
    def preset(self) -> Preset:
        """Whose pictures are measured."""
        return self.world.preset

    def world_of(self, seed: int) -> World:
        """The same world with another seed."""
        return World(self.preset, seed, self.world.sprites)


def _scene(rng: Rng) -> str:
    if rng.random() < 0.125:
        return f"plain-{rng.choice(list(nouns.PLAIN))}"
    return str(rng.choice(list(nouns.SCENES)))


def fresh_asks(preset: Preset, count: int, seed: int = 2024) -> list[Ask]:
    """Prompts over all nouns in turn, random scenes (an eighth plain), every fourth with a tint."""
    rng = np.random.default_rng(seed)
    names = preset.names
    order = rng.permutation(len(names))
    asks = []
    for i in range(count):
        noun, scene = names[int(order[i % len(names)])], _scene(rng)
        tint = str(rng.choice(list(nouns.TINTS))) if i % 4 == 3 else ""
        asks.append(Ask(f"a photo of {preset.one(noun, tint)} {scene_words(scene)}", (noun,), scene, tint))
    return asks


def relation_asks(preset: Preset, count: int, seed: int = 2025) -> list[Ask]:
    """Prompts of two or three of one object and of two different ones, in turn; none if none are taught."""
    if not preset.shares[1]:
        return []
    rng = np.random.default_rng(seed)
    names = list(preset.names)
    countable = [n for n in names if nouns.plural(n)]
    asks = []
    for i in range(count):
        scene = _scene(rng)
        if i % 2:
            left, right = (str(n) for n in rng.choice(names, 2, replace=False))
            words = f"a photo of {preset.one(left)} and {preset.one(right)} {scene_words(scene)}"
            asks.append(Ask(words, (left, right), scene, count=2))
        else:
            noun, number = str(rng.choice(countable)), int(rng.integers(2, 4))
            words = f"a photo of {nouns.NUMBERS[number]} {nouns.plural(noun)} {scene_words(scene)}"
            asks.append(Ask(words, (noun,), scene, count=number))
    return asks


def load_base(compute: Compute, preset: Preset) -> Any:
    """The preset's base as a plain StableDiffusionPipeline, in eval mode and silent."""
    from diffusers import StableDiffusionPipeline

    kind: Any = StableDiffusionPipeline  # diffusers ships no types
    pipeline = kind.from_pretrained(base_dir(preset.version), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    plain_attention(compute, pipeline.unet)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.to(compute.device)
    return pipeline


def generate(
    bench: Bench, pipeline: Any, prompts: Sequence[str], *, seed: int = 0, guidance: float = 4.0
) -> Picture:
    """Pictures uint8 ``[N, px, px, 3]`` of ``prompts``, 30 steps."""
    return sample(pipeline, prompts, bench.compute, seed=seed, guidance=guidance)


def true_samples(world: World, asks: Sequence[Ask], seed: int = 5) -> list[Sample]:
    """Rendered scenes of the same asks, in the 3D style."""
    out = []
    for i, ask in enumerate(asks):
        rng = np.random.default_rng((seed, i))
        if len(ask.nouns) == 2:
            out.append(world.pair(*ask.nouns, ask.scene, rng, styles=("3d",)))
        elif ask.count > 1:
            out.append(world.group(ask.nouns[0], ask.count, ask.scene, rng, styles=("3d",)))
        else:
            out.append(world.named(ask.nouns[0], ask.scene, ask.tint, rng, styles=("3d",)))
    return out


def object_right(ask: Ask, reading: Reading) -> bool:
    """Whether the asked noun (or both) is what the classifier finds likeliest, and as many of it."""
    if len(ask.nouns) == 2:
        return set(reading.nouns) == set(ask.nouns)
    return reading.nouns[0] == ask.nouns[0] and ask.count in {1, reading.count}


def shares(asks: Sequence[Ask], readings: Sequence[Reading]) -> dict[str, float]:
    """Shares of objects, scenes and asked tints that the classifier finds right; of what was asked for."""
    both = list(zip(asks, readings, strict=True))
    groups: dict[str, tuple[list[tuple[Ask, Reading]], Callable[[Ask, Reading], bool]]] = {
        "object": ([p for p in both if p[0].count == 1], object_right),
        "two objects": ([p for p in both if len(p[0].nouns) == 2], object_right),
        "count": ([p for p in both if p[0].count > 1 and len(p[0].nouns) == 1], object_right),
        "scene": (both, lambda a, r: a.scene == r.scene),
        "tint": ([p for p in both if p[0].tint], lambda a, r: a.tint == r.tint),
    }
    return {
        name: sum(right(a, r) for a, r in pairs) / len(pairs)
        for name, (pairs, right) in groups.items()
        if pairs
    }


def own_accuracy(bench: Bench, count: int = 3000) -> dict[str, float]:
    """The ruler's shares on fresh true pictures of its own training distribution."""
    world = bench.world_of(1003)
    samples = [draw_true(world, i) for i in range(count)]
    asks = [Ask("", s.nouns, s.scene, s.tint, s.count) for s in samples]
    return shares(asks, read(bench.ruler, bench.renderer.pictures(samples)))


@torch.no_grad()
def kernel_distance(model: Classifier, a: Picture, b: Picture) -> float:
    """KID (unbiased squared MMD, kernel (x·y/d + 1)³; arXiv 1801.01401) times 1000."""
    device = next(model.parameters()).device

    def features(pictures: Picture) -> Tensor:
        parts = torch.split(torch.from_numpy(pictures), 128)
        return torch.cat([model.features(from_uint8(p.numpy(), device)) for p in parts]).double()

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


def grid(images: Picture, columns: int, scale: int = 1) -> Image.Image:
    """Pictures ``[N, h, w, 3]`` in rows of ``columns``."""
    n, height, width = len(images), images.shape[1], images.shape[2]
    rows = (n + columns - 1) // columns
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * height, (i % columns) * width
        sheet[y : y + height, x : x + width] = image
    out = Image.fromarray(sheet)
    return out.resize((out.width * scale, out.height * scale), Image.Resampling.NEAREST) if scale > 1 else out


def sheet_name(preset: Preset) -> str:
    """What the names of a preset's sheets begin with: "dinghy" for the shipped one's."""
    return "dinghy" if preset is SHIPPED else preset.version


def side_by_side(true: Picture, made: Picture, columns: int = 10) -> Image.Image:
    """Rows of true pictures, each above the generated row of the same prompts."""
    rows = []
    for start in range(0, len(true) - columns + 1, columns):
        rows += [true[start : start + columns], made[start : start + columns]]
    return grid(np.concatenate(rows), columns)


def measure_base(bench: Bench, count: int, out: Path, guidance: float = 4.0) -> dict[str, Any]:
    """Shares right on ``count`` fresh prompts of one object and 0.4 as many relations."""
    asks, relations = fresh_asks(bench.preset, count), relation_asks(bench.preset, count * 2 // 5)
    every = [*asks, *relations]
    pipeline = load_base(bench.compute, bench.preset)
    made = generate(bench, pipeline, [a.prompt for a in every], guidance=guidance)
    true = bench.renderer.pictures(true_samples(bench.world, every))
    # The two sets share their prompts, which biases the estimate: what counts is the excess over
    # a second set of true pictures of the same prompts.
    again = bench.renderer.pictures(true_samples(bench.world, asks, seed=55))
    readings = read(bench.ruler, made)
    wrong = [i for i, (a, r) in enumerate(zip(every, readings, strict=True)) if not object_right(a, r)]
    out.mkdir(parents=True, exist_ok=True)
    name = sheet_name(bench.preset)
    side_by_side(true[:40], made[:40]).save(out / f"{name}-true-generated.png", optimize=True)
    if relations:
        side_by_side(true[count : count + 20], made[count : count + 20]).save(
            out / f"{name}-relations.png", optimize=True
        )
    failures = out / f"{name}-failures.png"
    failures.unlink(missing_ok=True)  # of weights that were measured before
    if wrong:
        pick = wrong[:20]
        side_by_side(true[pick], made[pick], min(10, len(pick))).save(failures, optimize=True)
    ruler, single, again_true = bench.ruler, made[:count], true[:count]
    return {
        "prompts": len(asks),
        "relation_prompts": len(relations),
        "guidance": guidance,
        "steps": 30,
        "generated": shares(every, readings),
        "true": shares(every, read(ruler, true)),
        "kid_x1000_over_true": kernel_distance(ruler, single, again_true)
        - kernel_distance(ruler, again_true, again),
        "misread": sorted({f"{every[i].nouns[0]}->{readings[i].nouns[0]}" for i in wrong if i < count}),
    }


def measure_codec(bench: Bench, count: int = 400) -> dict[str, float]:
    """PSNR in dB of the shipped codec on fresh training-like scenes and on scenes of held-out subjects."""
    from .codec import load, psnr

    vae = load(base_dir(bench.preset.version)).to(bench.compute.device)
    rng = np.random.default_rng(7)
    world = bench.world_of(7)
    held = [
        world.subject(s.name, str(rng.choice(list(nouns.SCENES))), rng)
        for s in nouns.HELD_OUT
        for _ in range(max(1, count // 28))
    ]
    groups = {"world": [world.sample(i) for i in range(count)], "held_out": held}
    return {
        k: psnr(vae, from_uint8(bench.renderer.pictures(v), bench.compute.device)) for k, v in groups.items()
    }


def _seen(bench: Bench, pictures: Iterable[Picture | Image.Image]) -> Tensor:
    """Pictures of any size as the judges' own processor hands them over."""
    from .judges import image_processor

    every = [Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in pictures]
    pixels: Tensor = image_processor()(every, return_tensors="pt")["pixel_values"]
    return pixels.to(bench.compute.device)


@torch.no_grad()
def measure_clip(bench: Bench, trials: int = 10) -> dict[str, float]:
    """Top-1 retrieval of the true caption among 100 distinct ones, on fresh scenes of the world."""
    from transformers import CLIPTokenizer

    from .judges import clip_features, load_clip

    folder = clip_dir()
    model = load_clip(folder).to(bench.compute.device)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    world = bench.world_of(8)
    hits = {"all": 0, "named": 0, "named_count": 0}
    index = 0
    for _ in range(trials):
        chosen: dict[str, tuple[str, Sample]] = {}
        while len(chosen) < 100:
            s = world.sample(index)
            index += 1
            # One caption for one meaning: otherwise several among the hundred would be true.
            if s.scene in nouns.SCENES:
                prompt = f"a photo of {_meaning(bench.preset, s)} {scene_words(s.scene)}"
                chosen.setdefault(prompt, (prompt, s))
        captions, samples = zip(*chosen.values(), strict=True)
        ids = text.tokens(tokenizer, captions).to(bench.compute.device)
        pixels = _seen(bench, bench.renderer.pictures(samples))
        words, sight = clip_features(model, ids, pixels)
        right = ((sight @ words.T).argmax(1) == torch.arange(100, device=words.device)).cpu()
        named = torch.tensor([bool(s.nouns) for s in samples])
        hits["all"] += int(right.sum())
        hits["named"] += int((right & named).sum())
        hits["named_count"] += int(named.sum())
    return {"top1_among_100": hits["all"] / (100 * trials), "named_only": hits["named"] / hits["named_count"]}


def _meaning(preset: Preset, s: Sample) -> str:
    if len(s.nouns) == 2:
        return " and ".join(
            preset.one(noun, piece.tint) for noun, piece in zip(s.nouns, s.pieces, strict=True)
        )
    if s.count > 1:
        return f"{nouns.NUMBERS[s.count]} {nouns.plural(s.noun)}"
    return preset.one(s.noun or s.hyper, s.tint)


@torch.no_grad()
def measure_dino(bench: Bench, each: int = 28) -> dict[str, float]:
    """Nearest-neighbour subject accuracy: held-out subjects in new scenes against their shipped photos."""
    from .judges import load_dino

    model = load_dino(dino_dir()).to(bench.compute.device)
    world = bench.world_of(9)

    def features(pictures: Iterable[Picture | Image.Image]) -> Tensor:
        parts = torch.split(_seen(bench, pictures), 128)
        cls = torch.cat([model(pixel_values=p).last_hidden_state[:, 0] for p in parts])
        return nn.functional.normalize(cls, dim=-1)

    bank, owners = [], []
    for k, subject in enumerate(held_out_subjects()):
        photos = [Image.open(p).convert("RGB") for p in subject.photos]
        bank.append(features(photos))
        owners += [k] * len(photos)
    reference = torch.cat(bank)
    right = total = 0
    for k, subject in enumerate(held_out_subjects()):
        rng = np.random.default_rng((9, k))
        new = [world.subject(subject.name, NEW_SCENES[i % len(NEW_SCENES)], rng) for i in range(each)]
        nearest = (features(bench.renderer.pictures(new)) @ reference.T).argmax(1)
        right += sum(owners[int(n)] == k for n in nearest)
        total += each
    return {"nearest_neighbour": right / total, "subjects": float(len(bank)), "pictures": float(total)}


def all_figures(bench: Bench, count: int, out: Path) -> dict[str, Any]:
    """Every figure of the shipped set."""
    found = {
        "classifier_on_true": own_accuracy(bench),
        "base": measure_base(bench, count, out),
        "codec_psnr_db": measure_codec(bench),
    }
    judges = {"clip": (clip_dir(), measure_clip), "dino": (dino_dir(), measure_dino)}
    for name, (folder, measure) in judges.items():
        if folder.exists():  # not yet trained, where the base has just been
            found[name] = measure(bench)
    return found
