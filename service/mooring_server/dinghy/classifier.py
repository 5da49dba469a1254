"""The independent ruler: a small residual network that reads nouns, scene, tint and count.

Trained on true scenes only, used for figures and nothing else: it is never a judge and no training
signal, so a good score cannot have been trained towards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import nouns
from .device import Compute
from .loop import Batch, Loop, Optimisers, Plan, batches
from .preset import SHIPPED, Preset
from .render import Renderer, from_uint8
from .world import SCENE_KEYS, Picture, Sample, World

TINT_LABELS = ("", *nouns.TINTS)
COUNTS = (1, 2, 3)
WEIGHTS_FILE = "model.safetensors"
PLAN = Plan(steps=1500, batch=384, muon_lr=0.01, adam_lr=2e-3, average=0.998)


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
    """Pixels ``[B, 3, px, px]`` in [0, 1] to logits over the preset's nouns, scenes, tints and counts."""

    def __init__(self, preset: Preset = SHIPPED) -> None:
        super().__init__()
        self.names = preset.names
        self.body = nn.Sequential(
            # the first stride brings either size to 32x32 after the next block
            nn.Conv2d(3, 32, 5, preset.px // 64, 2),
            nn.ReLU(),
            Block(32, 64, 2),
            Block(64, 64, 1),
            Block(64, 128, 2),
            Block(128, 128, 1),
            Block(128, 192, 2),
            Block(192, 192, 1),
            Block(192, 256, 2),
        )
        sizes = (len(preset.names), len(SCENE_KEYS), len(TINT_LABELS), len(COUNTS))
        self.heads = nn.ModuleList([nn.Linear(256, n) for n in sizes])

    def features(self, pixels: Tensor) -> Tensor:
        """``[B, 256]``: what the heads read, also an encoder that never was a judge."""
        out: Tensor = self.body(pixels * 2 - 1).mean((2, 3))
        return out

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Logits ``[B, nouns]``, ``[B, scenes]``, ``[B, tints]``, ``[B, 3]``."""
        f = self.features(pixels)
        return [head(f) for head in self.heads]


def draw_true(world: World, index: int) -> Sample:
    """Scene ``index`` of the classifier's own stream: named objects only, every third single one tinted.

    Three times the world's shares of several objects: two nouns of one picture are what is hardest to read.
    """
    rng = np.random.default_rng((world.seed, 77, index))
    scene = SCENE_KEYS[int(rng.integers(len(SCENE_KEYS)))]
    names, (_, group, pair) = world.preset.names, world.preset.shares
    noun, other = (names[int(rng.integers(len(names)))] for _ in range(2))
    lot = rng.random()
    if lot < 3 * group and nouns.plural(noun):
        return world.group(noun, int(rng.integers(2, 4)), scene, rng)
    if lot < 3 * (group + pair) and other != noun:
        return world.pair(noun, other, scene, rng)
    tint = TINT_LABELS[1 + int(rng.integers(len(nouns.TINTS)))] if rng.random() < 0.33 else ""
    return world.named(noun, scene, tint, rng)


def labels(preset: Preset) -> Callable[[Sample], tuple[int, ...]]:
    """A function that gives first noun, last noun, scene, tint and count - 1 of a sample as class numbers."""
    numbers = {name: k for k, name in enumerate(preset.names)}

    def label(sample: Sample) -> tuple[int, ...]:
        first, last = numbers[sample.nouns[0]], numbers[sample.nouns[-1]]
        return first, last, SCENE_KEYS.index(sample.scene), TINT_LABELS.index(sample.tint), sample.count - 1

    return label


def classifier_loop(
    folder: Path, preset: Preset, compute: Compute, plan: Plan, committed: Path | None = None
) -> tuple[Classifier, Loop]:
    """The classifier on its device and its loop, at the checkpoint in ``folder`` if there is one.

    Where there is none, training starts from the exported ruler in ``committed``.
    """
    torch.manual_seed(3)
    known = load_ruler(committed, preset) if committed is not None and committed.exists() else None
    model = (Classifier(preset) if known is None else known).to(compute.device)
    optimisers = Optimisers([model.body], [model.heads], plan.muon_lr, plan.adam_lr)
    return model, Loop(folder, {"model": model}, optimisers, plan)


def train_classifier(
    folder: Path,
    world: World,
    renderer: Renderer,
    compute: Compute,
    plan: Plan = PLAN,
    committed: Path | None = None,
) -> tuple[Classifier, Loop]:
    """Train (or go on) in ``folder``; returns the averaged model and its loop."""
    model, loop = classifier_loop(folder, world.preset, compute, plan, committed)
    size = plan.batch

    def make(step: int) -> Sequence[Sample]:
        return [draw_true(world, step * size + i) for i in range(size)]

    def loss(step: int, batch: Batch) -> Tensor:
        pixels = renderer.draw(batch.layout)
        rng = torch.Generator(compute.device).manual_seed(step)
        # Light blur and noise on half of the pictures: a ruler must not measure sharpness.
        soft = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        mix = (torch.rand(size, 1, 1, 1, generator=rng, device=compute.device) * 2 - 1).clamp_min(0)
        pixels = pixels + mix * (soft - pixels)
        pixels = pixels + 0.04 * mix.flip(0) * torch.randn(pixels.shape, generator=rng, device=compute.device)
        told = batch.labels.to(compute.device)
        with compute.autocast():
            noun, scene, tint, count = (x.float() for x in model(pixels))
        entropy = nn.functional.cross_entropy
        objects = (entropy(noun, told[:, 0]) + entropy(noun, told[:, 1])) / 2
        # the tint of a picture of several objects is nobody's
        one = (told[:, 4] == 0).float()
        colours = (entropy(tint, told[:, 3], reduction="none") * one).mean()
        return objects + entropy(scene, told[:, 2]) + colours + entropy(count, told[:, 4])

    loop.run(batches(make, loop.step, compute.workers, labels(world.preset), world.preset), loss)
    loop.use_average()
    return model.eval(), loop


def save_ruler(folder: Path, model: Classifier) -> None:
    """Write the ruler in fp16."""
    tensors = {name: value.cpu().half().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)


def load_ruler(folder: Path, preset: Preset) -> Classifier:
    """The exported ruler in ``folder``, in float32 on the CPU.

    Raises:
        FileNotFoundError: there is none, and the command that trains it.
        ValueError: keys, shapes or values are not those of the preset's ruler.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        command = f"python -m mooring_server.dinghy ruler --preset {preset.version}"
        raise FileNotFoundError(f"{preset.version} has no ruler yet: run `{command}`")
    model, tensors = Classifier(preset), load_file(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is no ruler of {preset.version}: {error}") from error
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise ValueError(f"{path} holds values that are not finite")
    return model.eval()


@dataclass(frozen=True)
class Reading:
    """What the classifier sees in one picture: its two likeliest nouns, best first, scene, tint and count."""

    nouns: tuple[str, str]
    scene: str
    tint: str
    count: int


@torch.no_grad()
def read(model: Classifier, pictures: Picture) -> list[Reading]:
    """Read pictures uint8 ``[N, px, px, 3]``."""
    device = next(model.parameters()).device
    out: list[Reading] = []
    for start in range(0, len(pictures), 128):
        noun, scene, tint, count = model(from_uint8(pictures[start : start + 128], device))
        rows = zip(noun.topk(2).indices.tolist(), scene.argmax(1).tolist(), tint.argmax(1).tolist(),
                   count.argmax(1).tolist(), strict=True)  # fmt: skip
        out += [
            Reading((model.names[n[0]], model.names[n[1]]), SCENE_KEYS[s], TINT_LABELS[t], COUNTS[c])
            for n, s, t, c in rows
        ]
    return out
