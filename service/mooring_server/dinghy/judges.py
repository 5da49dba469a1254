"""The judges: dinghy-clip (CLIPModel) and dinghy-dino (Dinov2Model), small and trained here.

dinghy-clip learns pictures against captions (symmetric contrast). dinghy-dino is
self-distilled: a student must recognise, by the features of its own slowly averaged teacher,
the same object in another scene among the other objects of the batch; no captions, no labels.
Neither sees a held-out subject.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import export, sources, text
from .loop import Loop, Optimisers, Plan
from .sources import Sprites
from .world import TRAIN_STYLES, Picture, Placement, World, compose

IMAGE_PX = 64
PATCH_PX = 8
MEAN_STD = [0.5, 0.5, 0.5]


def image_processor() -> Any:
    """Bicubic to 64 px, then (x - 0.5) / 0.5: ``CLIPImageProcessor`` without torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX},
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
        image_mean=MEAN_STD,
        image_std=MEAN_STD,
        resample=3,
    )


def normalise(pictures: list[Picture]) -> Tensor:
    """Pictures uint8 ``[64, 64, 3]`` as the judges' input ``[N, 3, 64, 64]`` in -1..1."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.5


# -- dinghy-clip -------------------------------------------------------------------------------


def build_clip() -> Any:
    """CLIPModel: 64 px in patches of 8, width 192, four and two layers, projection 128."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = text.build_tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512, "hidden_act": "gelu",
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": text.MAX_LENGTH,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "projection_dim": 128,
        },
        vision_config={
            "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3,
            "hidden_act": "gelu", "image_size": IMAGE_PX, "patch_size": PATCH_PX, "projection_dim": 128,
        },
        projection_dim=128,
    )  # fmt: skip
    model = CLIPModel(config)
    model.set_attn_implementation("eager")
    return model


def _clip_loop(minutes: float, batch: int) -> tuple[Any, Loop]:
    torch.manual_seed(4)
    model = build_clip()
    plan = Plan(minutes=minutes, muon_lr=0.005, adam_lr=1e-3)
    heads = [model.visual_projection, model.text_projection, model.text_model.embeddings]
    optimisers = Optimisers(
        [model.vision_model, model.text_model.encoder],
        [*heads, model.text_model.final_layer_norm, _Only(model.logit_scale)],
        plan.muon_lr,
        plan.adam_lr,
    )
    return model, Loop(sources.cache_dir() / "clip", {"model": model}, optimisers, plan, batch)


class _Only(nn.Module):
    """A module that holds one shared parameter, to hand it to an optimiser."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def clip_features(model: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of captions ``[B, 20]`` and pictures ``[B, 3, 64, 64]``: two ``[B, 128]``."""
    words = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    sight = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return nn.functional.normalize(words.float(), dim=-1), nn.functional.normalize(sight.float(), dim=-1)


def train_clip(minutes: float, call_minutes: float | None = None, batch: int = 160) -> Any:
    """Train (or go on) in ``<cache>/clip``; returns the averaged model."""
    world = World(seed=4)
    model, loop = _clip_loop(minutes, batch)
    tokenizer = text.build_tokenizer()

    def loss(step: int) -> Tensor:
        samples = [world.sample(step * batch + i) for i in range(batch)]
        captions = [s.caption for s in samples]
        ids = tokenizer(captions, padding="max_length", max_length=text.MAX_LENGTH, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            words, sight = clip_features(model, ids["input_ids"], normalise([s.image for s in samples]))
        logits = model.logit_scale.exp().clamp_max(60) * words @ sight.T
        # Two pictures with one caption are no negatives of each other.
        _, numbers = np.unique(captions, return_inverse=True)
        same = torch.from_numpy(numbers[:, None] == numbers[None, :])
        logits = logits.masked_fill(same & ~torch.eye(batch, dtype=torch.bool), -1e4)
        target = torch.arange(batch)
        losses = [nn.functional.cross_entropy(x, target) for x in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2

    loop.run(loss, minutes=call_minutes)
    loop.use_average()
    return model.eval()


# -- dinghy-dino -------------------------------------------------------------------------------


def build_vit() -> Any:
    """Dinov2Model: 64 px in patches of 8, width 192, four layers; the feature is the class token."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        image_size=IMAGE_PX, patch_size=PATCH_PX, hidden_size=192, mlp_ratio=3,
        num_hidden_layers=4, num_attention_heads=3, layerscale_value=1.0,
    )  # fmt: skip
    model = Dinov2Model(config)
    model.set_attn_implementation("eager")
    return model


class Distiller(nn.Module):
    """Student with projector and predictor, and its momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = build_vit(), build_vit()
        self.project, self.teacher_project = self._head(192), self._head(192)
        self.predict = self._head(128)
        self.teacher.load_state_dict(self.student.state_dict())
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
        pairs = ((self.teacher, self.student), (self.teacher_project, self.project))
        for slow, fast in pairs:
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                a.lerp_(b, 1 - momentum)


def object_view(world: World, index: int, rng: np.random.Generator) -> Picture:
    """Sprite ``index`` somewhere: strong changes of place, size, turn and scene, none of colour."""
    place = Placement(
        size=float(rng.uniform(32, 54)),
        angle=float(rng.normal(0, 10)),
        dx=float(rng.uniform(-8, 8)),
        dy=float(rng.uniform(-6, 8)),
        flip=bool(rng.random() < 0.5),
        aspect=float(np.exp(rng.normal(0, 0.06))),
    )
    return compose(world.background(world.pick_scene(rng), rng), world.sprites.pixels[index], place)


def training_sprites(sprites: Sprites) -> list[int]:
    """Sprites that dinghy-dino may see: named ones in the training styles and all extras."""
    return sprites.where("named", TRAIN_STYLES) + sprites.where("extra")


def _dino_loop(minutes: float, batch: int) -> tuple[Distiller, Loop]:
    torch.manual_seed(5)
    model = Distiller()
    plan = Plan(minutes=minutes, muon_lr=0.005, adam_lr=1e-3)
    optimisers = Optimisers([model.student, model.project, model.predict], [], plan.muon_lr, plan.adam_lr)
    return model, Loop(sources.cache_dir() / "dino", {"model": model}, optimisers, plan, batch)


def train_dino(minutes: float, call_minutes: float | None = None, batch: int = 96) -> Any:
    """Train (or go on) in ``<cache>/dino``; returns the teacher, a Dinov2Model."""
    world = World(seed=5)
    pool = np.array(training_sprites(world.sprites))
    model, loop = _dino_loop(minutes, batch)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((5, step))
        chosen = rng.choice(pool, size=batch, replace=False)
        one = normalise([object_view(world, int(i), rng) for i in chosen])
        two = normalise([object_view(world, int(i), rng) for i in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ones, twos = model.queries(one), model.queries(two)
            key_one, key_two = model.keys(one), model.keys(two)
        target = torch.arange(batch)
        loss_one = nn.functional.cross_entropy(ones @ key_two.T / 0.1, target)
        return (loss_one + nn.functional.cross_entropy(twos @ key_one.T / 0.1, target)) / 2

    loop.run(loss, after=model.follow, minutes=call_minutes)
    return model.teacher.eval()


def export_judges(clip_out: Path, dino_out: Path) -> dict[str, Any]:
    """Write both judges from the cache's checkpoints; returns their training figures."""
    clip, clip_loop = _clip_loop(1.0, 160)
    clip_loop.use_average()
    export.export_judge(clip_out, clip.eval(), [text.build_tokenizer(), image_processor()])
    dino, dino_loop = _dino_loop(1.0, 96)
    export.export_judge(dino_out, dino.teacher.eval(), [image_processor()])
    return {
        name: {"steps": loop.step, "samples": loop.step * loop.batch, "minutes": round(loop.seconds / 60, 1)}
        for name, loop in (("clip", clip_loop), ("dino", dino_loop))
    }
