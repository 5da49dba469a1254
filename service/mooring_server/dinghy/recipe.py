"""The whole recipe in order: photos, ruler, codec, text-to-image model, judges, export, figures."""

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
    grow,
    judges,
    sources,
    subjects,
    t2i,
    text,
    weights_dir,
)
from .device import Compute, choose
from .export import export_base, export_judge, read_figures, write_manifest
from .figures import Bench, all_figures, load_base
from .loop import Plan
from .patches import fitting_pictures
from .preset import PRESETS, SHIPPED, Preset
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
        return Renderer(self.sprites, self.preset.judge_px, self.compute.device)

    def world(self, seed: int) -> World:
        """The preset's world with this seed."""
        return World(self.preset, seed, self.sprites)

    def plan(self, plan: Plan, **changes: Any) -> Plan:
        """``plan`` at the recipe's scale and batch, with ``changes``."""
        cpu = self.compute.device.type == "cpu"
        batch = self.batch or (plan.cpu_batch if cpu else plan.batch)
        steps = max(1, round(plan.steps * self.scale))
        warmup = max(1, min(plan.warmup_steps, steps // 10))
        return replace(plan, steps=steps, warmup_steps=warmup, batch=batch, **changes)

    def codec(self) -> Any:
        """The preset's committed codec, else one trained here."""
        if self._committed():
            return codec.load(base_dir(self.preset.version)).to(self.compute.device)
        return self._trained_codec()

    def _trained_codec(self, pipeline: Any | None = None) -> Any:
        """The codec of ``pipeline`` with its decoder trained on for what that draws, else a new one."""
        plan, folder = self.plan(codec.plan(self.preset)), self.runs / "codec"
        known = None if pipeline is None else pipeline.vae
        mend = None if pipeline is None else redrawing(pipeline, self.compute)
        return codec.train(folder, self.world(2), self.renderer, self.compute, plan, known, mend)

    def decoder(self) -> None:
        """Go on training the committed codec's decoder; its latents, and so the rest of the base, stay."""
        if self.preset.codec != "patches" or not self._committed():
            raise typer.BadParameter(f"{self.preset.version} has no committed codec of patches to go on from")
        pipeline = load_base(self.compute, self.preset)
        vae = self._trained_codec(pipeline)
        export_base(base_dir(self.preset.version), self.preset, pipeline.unet, pipeline.text_encoder, vae)
        self.record("training")

    def _check_half(self, small: str) -> None:
        """Raise BadParameter unless the preset grows from the version ``small``."""
        half = PRESETS.get(small)
        alike = half is not None and half.codec == self.preset.codec == "patches"
        if half is None or not alike or half.halvings != self.preset.halvings - 1:
            raise typer.BadParameter(
                f"{self.preset.version} does not grow from {small!r}, only from half its side"
            )
        if not (base_dir(small) / "unet").exists():
            raise typer.BadParameter(f"{small} has no committed base")

    def grow(self, small: str) -> None:
        """Start the preset's base from that of the version ``small``."""
        self._check_half(small)
        base = base_dir(small)
        vae = grow.vae(base, self.preset, fitting_pictures(self.world(2), self.renderer))
        unet, encoder = grow.unet(base, self.preset), grow.text_encoder(base, self.preset)
        export_base(base_dir(self.preset.version), self.preset, unet, encoder, vae)
        self.record("training", grown_from=small)

    def grow_judges(self, small: str) -> None:
        """Start the preset's judges from those of the version ``small``.

        dinghy-clip gets the preset's further words; dinghy-dino reads none and is taken as it is.
        """
        self._check_half(small)
        self._export_clip(grow.clip(clip_dir(small), self.preset))
        self._export_dino(judges.load_dino(dino_dir(small)))
        self.record("training", judges_grown_from=small)

    def _export_clip(self, model: Any) -> None:
        parts = [text.build_tokenizer(self.preset), judges.image_processor(self.preset)]
        export_judge(clip_dir(self.preset.version), model, parts)

    def _export_dino(self, model: Any) -> None:
        export_judge(dino_dir(self.preset.version), model, [judges.image_processor(self.preset)])

    def _committed(self) -> bool:
        return (base_dir(self.preset.version) / "unet").exists()

    def base(self, **changes: Any) -> None:
        """Codec and text-to-image model, exported into the package data."""
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
        """dinghy-clip, exported into the package data."""
        plan = self.plan(judges.CLIP_PLAN)
        folder = clip_dir(self.preset.version)
        model, loop = judges.train_clip(
            self.runs / "clip", self.world(4), self.for_judges, self.compute, plan, folder
        )
        self._export_clip(model)
        self.record("training", clip=loop.figures())

    def dino(self) -> None:
        """dinghy-dino, exported into the package data."""
        plan = self.plan(judges.DINO_PLAN)
        folder = dino_dir(self.preset.version)
        model, loop = judges.train_dino(
            self.runs / "dino", self.world(5), self.for_judges, self.compute, plan, folder
        )
        self._export_dino(model)
        self.record("training", dino=loop.figures())

    def ruler(self) -> None:
        """The independent classifier, kept in the cache."""
        classifier.train_classifier(
            self.runs / "classifier", self.world(3), self.renderer, self.compute, self.plan(classifier.PLAN)
        )

    def photos(self) -> int:
        """The held-out subjects' photos, into the package data."""
        renderer = Renderer(self.sprites, subjects.PHOTO_PX, self.compute.device)
        return subjects.make_photos(Path(__file__).parent / "subjects", self.world(0), renderer)

    def bench(self) -> Bench:
        """What figures are measured with."""
        ruler = classifier.load_classifier(self.runs / "classifier", self.preset, self.compute)
        return Bench(self.world(6), self.renderer, ruler, self.compute)

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
        for step in (self.photos, self.ruler, self.base, self.clip, self.dino):
            step()
            typer.echo(f"{step.__name__} done at {time.monotonic() - begun:.0f} s")
        typer.echo(self.figures(count, out))
