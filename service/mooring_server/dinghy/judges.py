"""The judges: dinghy-clip (CLIPModel) and dinghy-dino (Dinov2Model), small and trained here.

dinghy-clip learns pictures against captions (symmetric contrast, arXiv 2103.00020). dinghy-dino is
self-distilled: a student must recognise, by the features of its own slowly averaged teacher,
the same object in another scene among the other objects of the batch; no captions, no labels.
Neither sees a held-out subject.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import text
from .device import Compute, plain_attention
from .loop import Batch, Loop, Optimisers, Plan, batches
from .preset import JUDGE_PATCH, JUDGE_PX, Preset
from .render import Renderer
from .world import SCENE_KEYS, Sample, World

SAME_SCENE = 32
"""Pictures of one scene among those that dinghy-clip tells apart."""
MEAN_STD = [0.5, 0.5, 0.5]
CLIP_PLAN = Plan(steps=1500, batch=512, cpu_batch=192, muon_lr=0.005, adam_lr=1e-3, average=0.998)
DINO_PLAN = Plan(steps=1500, batch=384, cpu_batch=192, muon_lr=0.005, adam_lr=1e-3, average=0.998)


def image_processor() -> Any:
    """Bicubic to the judges' size, then (x - 0.5) / 0.5: ``CLIPImageProcessor`` without torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": JUDGE_PX},
        crop_size={"height": JUDGE_PX, "width": JUDGE_PX},
        image_mean=MEAN_STD,
        image_std=MEAN_STD,
        resample=3,
    )


def normalise(pixels: Tensor) -> Tensor:
    """Pictures in [0, 1], drawn at the size that judges see, as their input in -1..1."""
    return (pixels - 0.5) / 0.5


# -- dinghy-clip -------------------------------------------------------------------------------


def build_clip(preset: Preset) -> Any:
    """CLIPModel: 8x8 patches, width 192, six and three layers, projection 128."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = text.build_tokenizer(preset)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "hidden_act": "gelu",
            "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": text.MAX_LENGTH,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "projection_dim": 128,
        },
        vision_config={
            "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 3,
            "hidden_act": "gelu", "image_size": JUDGE_PX, "patch_size": JUDGE_PATCH,
            "projection_dim": 128,
        },
        projection_dim=128,
    )  # fmt: skip
    return CLIPModel(config)


def load_clip(folder: Path) -> Any:
    """The exported dinghy-clip in ``folder``, in float32."""
    from transformers import CLIPModel

    kind: Any = CLIPModel
    return kind.from_pretrained(folder).eval()


class _Only(nn.Module):
    """A module that holds one shared parameter, to hand it to an optimiser."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def clip_loop(
    folder: Path, preset: Preset, compute: Compute, plan: Plan, committed: Path | None = None
) -> tuple[Any, Loop]:
    """dinghy-clip on its device and its loop, at the checkpoint in ``folder`` if there is one.

    Where there is none, it starts from the exported judge in ``committed``.
    """
    torch.manual_seed(4)
    known = load_clip(committed) if committed is not None and committed.exists() else None
    model = build_clip(preset) if known is None else known
    plain_attention(compute, model.to(compute.device))
    heads = [model.visual_projection, model.text_projection, model.text_model.embeddings]
    optimisers = Optimisers(
        [model.vision_model, model.text_model.encoder],
        [*heads, model.text_model.final_layer_norm, _Only(model.logit_scale)],
        plan.muon_lr,
        plan.adam_lr,
    )
    return model, Loop(folder, {"model": model}, optimisers, plan)


def clip_samples(world: World, size: int) -> Callable[[int], list[Sample]]:
    """A function from a training step to its samples; every other step's share their scenes in groups.

    Where every picture has a scene of its own, the scene alone tells most captions apart, and what is learnt
    hardly reads the object.
    """

    def make(step: int) -> list[Sample]:
        rng = np.random.default_rng((4, step))
        scenes = [SCENE_KEYS[int(k)] for k in rng.integers(len(SCENE_KEYS), size=-(-size // SAME_SCENE))]
        return [
            world.sample(step * size + i, scenes[i // SAME_SCENE] if step % 2 else "") for i in range(size)
        ]

    return make


def clip_features(model: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of captions ``[B, 20]`` and pictures ``[B, 3, px, px]``: two ``[B, 128]``."""
    words = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    sight = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return nn.functional.normalize(words.float(), dim=-1), nn.functional.normalize(sight.float(), dim=-1)


def train_clip(
    folder: Path,
    world: World,
    renderer: Renderer,
    compute: Compute,
    plan: Plan = CLIP_PLAN,
    committed: Path | None = None,
) -> tuple[Any, Loop]:
    """Train (or go on) in ``folder``; returns the averaged model and its loop."""
    model, loop = clip_loop(folder, world.preset, compute, plan, committed)
    size = plan.batch
    target = torch.arange(size, device=compute.device)
    itself = torch.eye(size, dtype=torch.bool, device=compute.device)

    def loss(_: int, batch: Batch) -> Tensor:
        pixels, ids = normalise(renderer.draw(batch.layout)), batch.ids.to(compute.device)
        with compute.autocast():
            words, sight = clip_features(model, ids, pixels)
        logits = model.logit_scale.exp().clamp_max(60) * words @ sight.T
        # Two pictures with one caption are no negatives of each other.
        same = (ids[:, None] == ids[None]).all(-1)
        logits = logits.masked_fill(same & ~itself, -1e4)
        losses = [nn.functional.cross_entropy(x, target) for x in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2

    data = batches(clip_samples(world, size), loop.step, compute.workers, preset=world.preset)
    loop.run(data, loss)
    loop.use_average()
    return model.eval(), loop


# -- dinghy-dino -------------------------------------------------------------------------------


def build_vit() -> Any:
    """Dinov2Model: 8x8 patches, width 192, six layers; the feature is the class token."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        image_size=JUDGE_PX, patch_size=JUDGE_PATCH, hidden_size=192, mlp_ratio=3,
        num_hidden_layers=6, num_attention_heads=3, layerscale_value=1.0,
    )  # fmt: skip
    return Dinov2Model(config)


def load_dino(folder: Path) -> Any:
    """The exported dinghy-dino in ``folder``, in float32."""
    from transformers import Dinov2Model

    kind: Any = Dinov2Model
    return kind.from_pretrained(folder).eval()


class Distiller(nn.Module):
    """Student with projector and predictor, and its momentum teacher; both begin as ``known`` if given."""

    def __init__(self, known: Any | None = None) -> None:
        super().__init__()
        self.student = build_vit() if known is None else known
        self.teacher = copy.deepcopy(self.student)
        self.project, self.teacher_project = self._head(192), self._head(192)
        self.predict = self._head(128)
        self.teacher_project.load_state_dict(self.project.state_dict())
        for module in (self.teacher, self.teacher_project):
            module.requires_grad_(requires_grad=False)

    @staticmethod
    def _head(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 128))

    def queries(self, pixels: Tensor) -> Tensor:
        """Student's predictions, unit vectors ``[B, 128]``."""
        cls = self.student(pixel_values=pixels).last_hidden_state[:, 0]
        return nn.functional.normalize(self.predict(self.project(cls)).float(), dim=-1)

    @torch.no_grad()
    def keys(self, pixels: Tensor) -> Tensor:
        """Teacher's projections, unit vectors ``[B, 128]``."""
        cls = self.teacher(pixel_values=pixels).last_hidden_state[:, 0]
        return nn.functional.normalize(self.teacher_project(cls).float(), dim=-1)

    @torch.no_grad()
    def follow(self, momentum: float = 0.99) -> None:
        """Move the teacher a step towards the student."""
        for slow, fast in ((self.teacher, self.student), (self.teacher_project, self.project)):
            torch._foreach_lerp_(
                [p.data for p in slow.parameters()], [p.data for p in fast.parameters()], 1 - momentum
            )


def dino_loop(
    folder: Path, compute: Compute, plan: Plan, committed: Path | None = None
) -> tuple[Distiller, Loop]:
    """The distiller on its device and its loop, at the checkpoint in ``folder`` if there is one.

    Where there is none, student and teacher start from the exported judge in ``committed``.
    """
    torch.manual_seed(5)
    known = load_dino(committed) if committed is not None and committed.exists() else None
    model = Distiller(known)
    model.to(compute.device)
    plain_attention(compute, model)
    optimisers = Optimisers([model.student, model.project, model.predict], [], plan.muon_lr, plan.adam_lr)
    return model, Loop(folder, {"model": model}, optimisers, plan)


def train_dino(
    folder: Path,
    world: World,
    renderer: Renderer,
    compute: Compute,
    plan: Plan = DINO_PLAN,
    committed: Path | None = None,
) -> tuple[Any, Loop]:
    """Train (or go on) in ``folder``; returns the teacher, a Dinov2Model, and the loop."""
    pool = np.array(world.training_sprites())
    model, loop = dino_loop(folder, compute, plan, committed)
    size = plan.batch
    target = torch.arange(size, device=compute.device)

    def make(step: int) -> Sequence[Sample]:
        # two views of each of `size` sprites
        rng = np.random.default_rng((5, step))
        chosen = rng.choice(pool, size=size, replace=False)
        return [world.object_view(int(i), rng) for _ in range(2) for i in chosen]

    def loss(_: int, batch: Batch) -> Tensor:
        one, two = normalise(renderer.draw(batch.layout)).chunk(2)
        with compute.autocast():
            ones, twos = model.queries(one), model.queries(two)
            key_one, key_two = model.keys(one), model.keys(two)
        loss_one = nn.functional.cross_entropy(ones @ key_two.T / 0.1, target)
        return (loss_one + nn.functional.cross_entropy(twos @ key_one.T / 0.1, target)) / 2

    loop.run(batches(make, loop.step, compute.workers), loss, after=model.follow)
    return model.teacher.eval(), loop
