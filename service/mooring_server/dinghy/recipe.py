"""The whole recipe in order: photos, ruler, text-to-image model, its decoder, judges, figures."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from . import (
    base_dir,
    classifier,
    clip_dir,
    codec,
    dino_dir,
    judges,
    patches,
    ruler_dir,
    sources,
    subjects,
    t2i,
    text,
    weights_dir,
)
from .device import Compute, choose
from .export import export_base, export_judge, export_ruler, read_figures, save_codec, write_manifest
from .figures import Bench, all_figures, load_base
from .loop import Plan
from .preset import JUDGE_PX, SHIPPED, Preset
from .render import Renderer
from .sampling import redrawing
from .world import World


class Recipe:
    """The steps for one preset on one device; every step goes on from its checkpoint in ``<cache>/<preset>``.

    ``scale`` multiplies every plan's steps (a hundredth for a try-out); ``batch`` overrides every plan's.
    Where a part has no checkpoint, training goes on from the preset's committed weights if there are any.
    """

    def __init__(
        self, preset: Preset = SHIPPED, device: str = "", *, scale: float = 1.0, batch: int = 0
    ) -> None:
        self.preset, self.scale, self.batch = preset, scale, batch
        self.compute: Compute = choose(device)
        self.runs = sources.cache_dir() / preset.version
        self.sprites = sources.load_sprites()
        self.renderer = Renderer(self.sprites, preset.px, self.compute.device)

    @cached_property
    def for_judges(self) -> Renderer:
        """Draws at the size that judges see."""
        return Renderer(self.sprites, JUDGE_PX, self.compute.device)

    def world(self, seed: int) -> World:
        """The preset's world with this seed."""
        return World(self.preset, seed, self.sprites)

    def plan(self, plan: Plan, **changes: Any) -> Plan:
        """``plan`` at the recipe's scale and batch, with ``changes``."""
        cpu = self.compute.device.type == "cpu"
        batch = self.batch or (plan.cpu_batch if cpu else plan.batch)
        planned = plan.cpu_steps if cpu and plan.cpu_steps else plan.steps
        steps = max(1, round(planned * self.scale))
        warmup = max(1, min(plan.warmup_steps, steps // 10))
        return replace(plan, steps=steps, warmup_steps=warmup, batch=batch, **changes)

    def codec(self) -> Any:
        """The preset's committed codec, else the one that was fitted here: its decoder may be untrained."""
        known = base_dir(self.preset.version)
        if not self._committed():
            known = self.runs
            if not (known / "vae").exists():
                save_codec(known, patches.fit_codec(self.world(2), self.renderer))
        return codec.load(known).to(self.compute.device)

    def decoder(self) -> None:
        """Train the codec's decoder on what the base draws; its latents, and so the rest of the base, stay.

        Raises:
            typer.BadParameter: there is no base yet.
        """
        if not self._committed():
            raise typer.BadParameter(f"{self.preset.version} has no base yet: train it first (`base`)")
        pipeline, plan = load_base(self.compute, self.preset), self.plan(patches.PLAN)
        mend = redrawing(pipeline, self.compute)
        vae, loop = patches.train_decoder(
            self.runs / "codec", pipeline.vae, self.world(2), self.renderer, self.compute, plan, mend
        )
        export_base(base_dir(self.preset.version), self.preset, pipeline.unet, pipeline.text_encoder, vae)
        self.record("training", decoder=loop.figures())

    def _export_clip(self, model: Any) -> None:
        parts = [text.build_tokenizer(self.preset), judges.image_processor()]
        export_judge(clip_dir(), model, parts)

    def _export_dino(self, model: Any) -> None:
        export_judge(dino_dir(), model, [judges.image_processor()])

    def _committed(self) -> bool:
        return (base_dir(self.preset.version) / "unet").exists()

    def base(self, **changes: Any) -> None:
        """The text-to-image model on the codec's latents, exported into the package data."""
        vae = self.codec()
        plan = self.plan(t2i.PLAN, **changes)
        folder = base_dir(self.preset.version)
        trainer = t2i.Trainer(self.runs / "t2i", self.compute, plan, folder, self.preset)
        typer.echo(f"text-to-image: from {trainer.started}")
        trainer.train(self.world(1), self.renderer, vae)
        trainer.loop.use_average()
        export_base(folder, self.preset, trainer.unet.eval(), trainer.encoder.eval(), vae)
        self.record("training", base=trainer.loop.figures())

    def clip(self) -> None:
        """dinghy-clip, exported into the package data: every preset's, trained on the shipped one's world."""
        plan, folder = self.plan(judges.CLIP_PLAN), clip_dir()
        model, loop = judges.train_clip(
            self.runs / "clip", self.world(4), self.for_judges, self.compute, plan, folder
        )
        self._export_clip(model)
        self.record("training", clip=loop.figures())

    def dino(self) -> None:
        """dinghy-dino, exported into the package data: every preset's, trained on the shipped one's world."""
        plan, folder = self.plan(judges.DINO_PLAN), dino_dir()
        model, loop = judges.train_dino(
            self.runs / "dino", self.world(5), self.for_judges, self.compute, plan, folder
        )
        self._export_dino(model)
        self.record("training", dino=loop.figures())

    def ruler(self) -> None:
        """The independent classifier, exported beside the models that it measures."""
        plan, folder = self.plan(classifier.PLAN), ruler_dir(self.preset.version)
        model, loop = classifier.train_classifier(
            self.runs / "classifier", self.world(3), self.renderer, self.compute, plan, folder
        )
        export_ruler(folder, model)
        self.record("training", ruler=loop.figures())

    def photos(self) -> int:
        """The held-out subjects' photos, into the package data: the same for every preset."""
        renderer = Renderer(self.sprites, subjects.PHOTO_PX, self.compute.device)
        return subjects.make_photos(Path(__file__).parent / "subjects", self.sprites, renderer)

    def bench(self) -> Bench:
        """What figures are measured with."""
        ruler = classifier.load_ruler(ruler_dir(self.preset.version), self.preset)
        return Bench(self.world(6), self.renderer, ruler.to(self.compute.device), self.compute)

    def figures(self, count: int, out: Path) -> dict[str, Any]:
        """Measure the exported set; figures go into the manifest, sheets into ``out``."""
        measured = all_figures(self.bench(), count, out)
        self.record("measured", **measured)
        return measured

    def record(self, section: str, **figures: Any) -> None:
        """Put figures into the manifest, at its top for the shipped set, and bring its digests up to date."""
        known = read_figures(weights_dir())
        own = known if self.preset is SHIPPED else known.setdefault(self.preset.version, {})
        own[section] = own.get(section, {}) | figures
        write_manifest(weights_dir(), SHIPPED, known)

    def everything(self, count: int, out: Path) -> None:
        """All steps in order, with the clock printed after each."""
        begun = time.monotonic()
        steps = [self.photos, self.ruler, self.base, self.decoder]
        if self.preset is SHIPPED:
            steps += [self.clip, self.dino]
        for step in steps:
            step()
            typer.echo(f"{step.__name__} done at {time.monotonic() - begun:.0f} s")
        typer.echo(self.figures(count, out))
