"""The whole recipe in order: codec, text-to-image model, judges, ruler, export, photos, figures."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import base_dir, classifier, clip_dir, dino_dir, judges, sources, subjects, t2i, text, vae, weights_dir
from .device import Compute, choose
from .export import export_base, export_judge, read_figures, write_manifest
from .figures import Bench, all_figures
from .loop import Plan
from .render import Renderer
from .world import World

PX = 128


class Recipe:
    """The steps, on one device, with their runs in ``<cache>/runs``; every step goes on from its checkpoint.

    ``scale`` multiplies every plan's steps (a tenth for a try-out).
    """

    def __init__(self, device: str = "", scale: float = 1.0, batch: int = 0) -> None:
        self.compute: Compute = choose(device)
        self.scale, self.batch = scale, batch
        self.runs = sources.cache_dir() / "runs"
        self.sprites = sources.load_sprites()
        self.renderer = Renderer(self.sprites, PX, self.compute.device)

    def world(self, seed: int) -> World:
        """The world with this seed."""
        return World(seed=seed, sprites=self.sprites)

    def plan(self, plan: Plan) -> Plan:
        """``plan`` at the recipe's scale; on a CPU with small batches, as large ones buy nothing there."""
        if self.compute.device.type == "cpu":
            plan = replace(plan, batch=48)
        if self.batch:
            plan = replace(plan, batch=self.batch)
        return replace(plan, steps=max(1, round(plan.steps * self.scale)))

    def codec(self) -> Any:
        """Train the codec."""
        return vae.train_codec(
            self.runs / "codec", self.world(2), self.renderer, self.compute, self.plan(vae.PLAN)
        )

    def text_to_image(self, codec: Any) -> t2i.Trainer:
        """Train UNet and text encoder."""
        trainer = t2i.Trainer(self.runs / "t2i", self.compute, self.plan(t2i.PLAN))
        trainer.train(self.world(1), self.renderer, codec)
        return trainer

    def base(self) -> None:
        """Codec and text-to-image model, exported into the package data."""
        codec = self.codec()
        trainer = self.text_to_image(codec)
        trainer.loop.use_average()
        export_base(base_dir(), trainer.unet.eval(), trainer.encoder.eval(), codec)
        self.record("training", base=trainer.loop.figures())

    def judge(self) -> None:
        """dinghy-clip and dinghy-dino, exported into the package data."""
        clip, clip_loop = judges.train_clip(
            self.runs / "clip", self.world(4), self.renderer, self.compute, self.plan(judges.CLIP_PLAN)
        )
        export_judge(clip_dir(), clip, [text.build_tokenizer(), judges.image_processor()])
        dino, dino_loop = judges.train_dino(
            self.runs / "dino", self.world(5), self.renderer, self.compute, self.plan(judges.DINO_PLAN)
        )
        export_judge(dino_dir(), dino, [judges.image_processor()])
        self.record("training", clip=clip_loop.figures(), dino=dino_loop.figures())

    def ruler(self) -> None:
        """The independent classifier, kept in the cache."""
        classifier.train_classifier(
            self.runs / "classifier", self.world(3), self.renderer, self.compute, self.plan(classifier.PLAN)
        )

    def photos(self) -> int:
        """The held-out subjects' photos, into the package data."""
        return subjects.make_photos(Path(__file__).parent / "subjects", self.world(0), self.renderer)

    def bench(self) -> Bench:
        """What figures are measured with."""
        ruler = classifier.load_classifier(self.runs / "classifier", self.compute)
        return Bench(self.world(6), self.renderer, ruler, self.compute)

    def figures(self, count: int, out: Path) -> dict[str, Any]:
        """Measure the exported set; figures go into the manifest, sheets into ``out``."""
        measured = all_figures(self.bench(), count, out)
        self.record("measured", **measured)
        return measured

    def record(self, section: str, **figures: Any) -> None:
        """Put figures into the manifest and bring its digests up to date."""
        known = read_figures(weights_dir())
        known[section] = known.get(section, {}) | figures
        write_manifest(weights_dir(), known)

    def everything(self, count: int, out: Path) -> None:
        """All steps in order, with the clock printed after each."""
        begun = time.monotonic()
        self.photos()
        for step in (self.ruler, self.base, self.judge):
            step()
            print(f"{step.__name__} done at {time.monotonic() - begun:.0f} s", flush=True)
        print(self.figures(count, out), flush=True)
