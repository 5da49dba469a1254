"""Photos of the held-out subjects: rendered from the artwork, shipped as package data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import PHOTO_SCENES, nouns
from .preset import SMALL
from .render import Renderer
from .sources import PACKAGES, Sprites
from .world import Picture, World

PHOTOS = 12
PHOTO_PX = 128


def photos(name: str, sprites: Sprites, renderer: Renderer, style: str = "3d") -> Picture:
    """The twelve pictures of a held-out subject: uint8 ``[12, px, px, 3]`` of ``renderer``.

    Four on every scene of ``PHOTO_SCENES``, never tinted (a tinted photo teaches a purple duck). The same for
    every preset, and in every style but for the drawing.

    Raises:
        ValueError: the subject is not drawn in ``style``.
    """
    if not sprites.where("held", (style,), name):
        raise ValueError(f"there is no {name} in the style {style!r}")
    index = next(k for k, subject in enumerate(nouns.HELD_OUT) if subject.name == name)
    rng = np.random.default_rng((4711, index))
    world = World(SMALL, 0, sprites)
    samples = [world.subject(name, PHOTO_SCENES[k % len(PHOTO_SCENES)], rng, style) for k in range(PHOTOS)]
    return renderer.pictures(samples)


def make_photos(out: Path, sprites: Sprites, renderer: Renderer) -> int:
    """Write ``out/<subject>/photo_XX.png`` and ``subject.json`` for every held-out subject.

    Returns the number of pictures.
    """
    package = PACKAGES["3d"]
    for subject in nouns.HELD_OUT:
        folder = out / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for k, picture in enumerate(photos(subject.name, sprites, renderer)):
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
