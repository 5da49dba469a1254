"""Photos of the held-out subjects: rendered from the artwork, shipped as package data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import PHOTO_SCENES, nouns
from .render import Renderer
from .sources import PACKAGES
from .world import World

PHOTOS = 12
PHOTO_PX = 128


def make_photos(out: Path, world: World, renderer: Renderer) -> int:
    """Write ``out/<subject>/photo_XX.png`` and ``subject.json`` for every held-out subject.

    Twelve pictures each, four on every scene of ``PHOTO_SCENES``, never tinted: a tinted photo
    teaches a purple duck. Returns the number of pictures.
    """
    package = PACKAGES["3d"]
    for index, subject in enumerate(nouns.HELD_OUT):
        rng = np.random.default_rng((4711, index))
        folder = out / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        samples = [
            world.subject(subject.name, PHOTO_SCENES[k % len(PHOTO_SCENES)], rng) for k in range(PHOTOS)
        ]
        for k, picture in enumerate(renderer.pictures(samples)):
            Image.fromarray(picture).save(folder / f"photo_{k:02d}.png", optimize=True)
        card = {
            "name": subject.name,
            "class_noun": subject.class_noun,
            "placeholder": f"<{subject.name}>",
            "source": f"{package.name} {package.version} (Fluent Emoji), code point {subject.code}",
            "licence": package.licence,
        }
        (folder / "subject.json").write_text(json.dumps(card, indent=2) + "\n")
    return len(nouns.HELD_OUT) * PHOTOS
