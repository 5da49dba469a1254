"""Photos of the held-out subjects: rendered from the artwork, shipped as package data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import PHOTO_SCENES, nouns
from .sources import PACKAGES, Artwork, cache_dir
from .world import Placement, World, compose

PHOTO_PX = 128
PHOTOS = 12


def make_photos(out: Path, cache: Path | None = None) -> int:
    """Write ``out/<subject>/photo_XX.png`` and ``subject.json`` for every held-out subject.

    Twelve pictures each, four on every scene of ``PHOTO_SCENES``, never tinted: a tinted photo
    teaches a purple duck. Returns the number of pictures.
    """
    art = Artwork(cache or cache_dir())
    world = World(px=PHOTO_PX)
    package = PACKAGES["3d"]
    for index, subject in enumerate(nouns.HELD_OUT):
        rng = np.random.default_rng((4711, index))
        sprite = art.read("3d", subject.code, 2 * PHOTO_PX)
        if sprite is None:
            raise RuntimeError(f"no artwork for {subject.name}")
        folder = out / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(PHOTOS):
            place = Placement(
                size=float(rng.uniform(40, 50)),
                angle=float(rng.uniform(-8, 8)),
                dx=float(rng.uniform(-5, 5)),
                dy=float(rng.uniform(-3, 6)),
                flip=bool(rng.random() < 0.3),
            )
            background = world.background(PHOTO_SCENES[k % len(PHOTO_SCENES)], rng)
            Image.fromarray(compose(background, np.asarray(sprite), place)).save(
                folder / f"photo_{k:02d}.png", optimize=True
            )
        card = {
            "name": subject.name,
            "class_noun": subject.class_noun,
            "placeholder": f"<{subject.name}>",
            "source": f"{package.name} {package.version} (Fluent Emoji), code point {subject.code}",
            "licence": package.licence,
        }
        (folder / "subject.json").write_text(json.dumps(card, indent=2) + "\n")
    return len(nouns.HELD_OUT) * PHOTOS
