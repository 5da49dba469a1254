"""The independent ruler: a small residual network that reads noun, scene and tint.

Trained on true scenes only, used for figures and nothing else: it is never shipped, never a
judge and no training signal, so a good score cannot have been trained towards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import nouns, sources
from .loop import Loop, Optimisers, Plan
from .world import Sample, World

SCENE_LABELS = (*nouns.SCENES, *(f"plain-{c}" for c in nouns.PLAIN))
NOUN_LABELS = tuple(nouns.NAMED)
TINT_LABELS = ("", *nouns.TINTS)


class Block(nn.Module):
    """Two 3x3 convolutions around a skip; ``stride`` 2 halves the picture."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inner, outer, 3, stride, 1)
        self.two = nn.Conv2d(outer, outer, 3, 1, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)])
        self.skip = nn.Conv2d(inner, outer, 1, stride) if stride > 1 or inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inner, H, W] -> [B, outer, H/stride, W/stride]``."""
        y = torch.relu(self.norms[0](self.one(x)))
        out: Tensor = torch.relu(self.norms[1](self.two(y)) + self.skip(x))
        return out


class Classifier(nn.Module):
    """Pixels ``[B, 3, 64, 64]`` in [0, 1] to logits over nouns, scenes and tints."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.ReLU(),
            Block(32, 48, 1),
            Block(48, 96, 2),
            Block(96, 96, 1),
            Block(96, 192, 2),
            Block(192, 192, 1),
            Block(192, 256, 2),
        )
        sizes = (len(NOUN_LABELS), len(SCENE_LABELS), len(TINT_LABELS))
        self.heads = nn.ModuleList([nn.Linear(256, n) for n in sizes])

    def features(self, pixels: Tensor) -> Tensor:
        """``[B, 256]``: what the heads read, also an encoder that never was a judge."""
        out: Tensor = self.body(pixels * 2 - 1).mean((2, 3))
        return out

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, 93]``, ``[B, 26]``, ``[B, 9]``."""
        f = self.features(pixels)
        return self.heads[0](f), self.heads[1](f), self.heads[2](f)


def draw_true(world: World, index: int) -> Sample:
    """Scene ``index`` of the classifier's own stream: named objects only, every third one tinted."""
    rng = np.random.default_rng((world.seed, 77, index))
    noun = NOUN_LABELS[int(rng.integers(len(NOUN_LABELS)))]
    tint = TINT_LABELS[1 + int(rng.integers(len(nouns.TINTS)))] if rng.random() < 0.33 else ""
    return world.named(noun, SCENE_LABELS[int(rng.integers(len(SCENE_LABELS)))], tint, rng)


def _pixels(samples: list[Sample]) -> Tensor:
    return torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255


def _loop(minutes: float, batch: int) -> tuple[Classifier, Loop]:
    torch.manual_seed(3)
    model = Classifier()
    plan = Plan(minutes=minutes, muon_lr=0.01, adam_lr=2e-3)
    optimisers = Optimisers([model.body], [model.heads], plan.muon_lr, plan.adam_lr)
    return model, Loop(sources.cache_dir() / "classifier", {"model": model}, optimisers, plan, batch)


def train_classifier(minutes: float, batch: int = 64) -> Classifier:
    """Train (or go on) in ``<cache>/classifier``; returns the averaged model."""
    world = World(seed=3)
    model, loop = _loop(minutes, batch)

    def loss(step: int) -> Tensor:
        samples = [draw_true(world, step * batch + i) for i in range(batch)]
        pixels = _pixels(samples)
        generator = torch.Generator().manual_seed(step)
        # Light blur and noise on half of the pictures: a ruler must not measure sharpness.
        soft = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        mix = (torch.rand(batch, 1, 1, 1, generator=generator) * 2 - 1).clamp_min(0)
        pixels = pixels + mix * (soft - pixels)
        pixels = pixels + 0.04 * mix.flip(0) * torch.randn(pixels.shape, generator=generator)
        targets = (
            torch.tensor([NOUN_LABELS.index(s.noun) for s in samples]),
            torch.tensor([SCENE_LABELS.index(s.scene) for s in samples]),
            torch.tensor([TINT_LABELS.index(s.tint) for s in samples]),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pixels)
        parts = [nn.functional.cross_entropy(x.float(), y) for x, y in zip(logits, targets, strict=True)]
        return torch.stack(parts).sum()

    loop.run(loss)
    loop.use_average()
    return model.eval()


def load_classifier() -> Classifier:
    """The classifier of the cache's last checkpoint, averaged weights."""
    model, loop = _loop(1.0, 64)
    if loop.step == 0:
        raise RuntimeError("no classifier yet: run `python -m mooring_server.dinghy classifier`")
    loop.use_average()
    return model.eval()


@dataclass(frozen=True)
class Reading:
    """What the classifier sees in one picture."""

    noun: str
    scene: str
    tint: str


@torch.no_grad()
def read(model: Classifier, images: NDArray[np.uint8]) -> list[Reading]:
    """Read pictures uint8 ``[N, 64, 64, 3]``."""
    out: list[Reading] = []
    for start in range(0, len(images), 128):
        pixels = torch.from_numpy(images[start : start + 128]).permute(0, 3, 1, 2).float() / 255
        picks = [logits.argmax(1).tolist() for logits in model(pixels)]
        labels = (NOUN_LABELS, SCENE_LABELS, TINT_LABELS)
        words = [[names[k] for k in pick] for names, pick in zip(labels, picks, strict=True)]
        out += [Reading(*row) for row in zip(*words, strict=True)]
    return out


def own_accuracy(model: Classifier, count: int = 1500) -> dict[str, float]:
    """Shares right on fresh true pictures; the tint's only where one was drawn."""
    world = World(seed=1003)
    samples = [draw_true(world, i) for i in range(count)]
    readings = read(model, np.stack([s.image for s in samples]))
    pairs = list(zip(samples, readings, strict=True))
    tinted = [(s, r) for s, r in pairs if s.tint]
    return {
        "noun": sum(s.noun == r.noun for s, r in pairs) / len(pairs),
        "scene": sum(s.scene == r.scene for s, r in pairs) / len(pairs),
        "tint": sum(s.tint == r.tint for s, r in tinted) / len(tinted),
    }
