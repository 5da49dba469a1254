"""The world: deterministic samples of (picture, caption, labels) from sprites and scenes.

Sample ``i`` of a world with seed ``s`` depends on nothing but ``(s, i)`` and the world's
version, so training data need not be stored and a resumed run sees what an uninterrupted
one would have seen. Held-out subjects are never drawn here except by :meth:`World.subject`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import nouns, scenes
from .sources import Sprites, load_sprites

VARIANTS = 64
"""Drawings kept of every scene; each sample crops and flips one of them."""

TRAIN_STYLES = ("3d", "flat")
"""Styles of the named objects; Noto's drawings of them are held out as a style."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One scene: uint8 ``[px, px, 3]``, its caption and what is true of it.

    ``noun`` is "" for an extra and ``tint`` "" for an object in its own colours;
    ``scene`` is a key of ``nouns.SCENES`` or ``plain-<colour>``; ``sprite`` the sprite's index.
    """

    image: Picture
    caption: str
    noun: str
    hyper: str
    scene: str
    tint: str
    style: str
    sprite: int


def scene_words(scene: str) -> str:
    """The words that ask for ``scene``, for instance "in the snow" or "on a red background"."""
    if scene.startswith("plain-"):
        colour = scene.removeprefix("plain-")
        return f"on {nouns.article(colour)} {colour} background"
    return nouns.SCENES[scene]


def tint_sprite(sprite: Picture, tint: str) -> Picture:
    """``sprite`` (uint8 ``[h, w, 4]``) recoloured in one hue, its shading and lines kept."""
    rgb = sprite[..., :3].astype(np.float32) / 255
    alpha = sprite[..., 3:].astype(np.float32) / 255
    lum = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    inside = alpha[..., 0] > 0.5
    low, high = np.percentile(lum[inside], (3, 97)) if inside.any() else (0.0, 1.0)
    t = np.clip((lum - low) / max(float(high - low), 0.25), 0, 1)[..., None]
    colour = np.asarray(nouns.TINTS[tint], np.float32) / 255
    dark, light = colour * 0.35, colour + (1 - colour) * 0.3
    mixed = np.where(
        t < 0.6, dark + (colour - dark) * (t / 0.6), colour + (light - colour) * ((t - 0.6) / 0.4)
    )
    return np.concatenate([(mixed * 255).astype(np.uint8), sprite[..., 3:]], axis=-1)


def jitter_colour(sprite: Picture, rng: np.random.Generator) -> Picture:
    """Turn the hue and change saturation and brightness of an extra, against memorising it."""
    rgb = sprite[..., :3].astype(np.float32)
    angle = float(rng.uniform(-math.pi, math.pi)) if rng.random() < 0.35 else float(rng.normal(0, 0.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # Rotation about the grey axis: a linear, cheap stand-in for turning the hue.
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    turn = np.array(
        [[cos + third, third - root, third + root], [third + root, cos + third, third - root],
         [third - root, third + root, cos + third]], np.float32)  # fmt: skip
    rgb = rgb @ turn.T
    grey = rgb.mean(-1, keepdims=True)
    rgb = (grey + (rgb - grey) * float(rng.uniform(0.75, 1.25))) * float(rng.uniform(0.82, 1.15))
    return np.concatenate([np.clip(rgb, 0, 255).astype(np.uint8), sprite[..., 3:]], axis=-1)


@dataclass(frozen=True)
class Placement:
    """How a sprite is put on a scene: sizes in pixels of a 64 px picture, angle in degrees."""

    size: float
    angle: float
    dx: float
    dy: float
    flip: bool
    aspect: float = 1.0
    shear: float = 0.0


def compose(background: Picture, sprite: Picture, place: Placement) -> Picture:
    """Draw ``sprite`` (uint8 ``[s, s, 4]``) on ``background`` (uint8 ``[px, px, 3]``)."""
    px = background.shape[0]
    unit = px / 64
    image = Image.fromarray(sprite)
    if place.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(4, round(place.size * unit))
    width, height = max(3, round(side * min(1.0, place.aspect))), max(3, round(side / max(1.0, place.aspect)))
    # Twice the final size before turning: the turn then costs no visible sharpness.
    image = image.resize((width * 2, height * 2), Image.Resampling.BOX, reducing_gap=2.0)
    if abs(place.angle) > 0.5 or place.shear:
        rad = math.radians(place.angle)
        cos, sin = math.cos(rad), math.sin(rad)
        extent = int(2 * side * 1.3) // 2 * 2
        a, b = cos, sin + place.shear
        d, e = -sin, cos
        cx, cy, ox, oy = extent / 2, extent / 2, width, height
        matrix = (a, b, ox - a * cx - b * cy, d, e, oy - d * cx - e * cy)
        image = image.transform((extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
    canvas = Image.fromarray(background).copy()
    x = round(px / 2 + place.dx * unit - image.width / 2)
    y = round(px / 2 + place.dy * unit - image.height / 2)
    canvas.paste(image, (x, y), image)
    return np.asarray(canvas)


class World:
    """Draws samples at ``px`` pixels from cached sprites; see the module's docstring."""

    def __init__(
        self, px: int = 64, seed: int = 0, sprites: Sprites | None = None, extra_share: float = 0.25
    ) -> None:
        self.px, self.seed, self.extra_share = px, seed, extra_share
        self.sprites = sprites or load_sprites()
        self._named: dict[str, list[int]] = {n: [] for n in nouns.NAMED}
        self._extras: dict[str, list[int]] = {}
        for i, role in enumerate(self.sprites.role):
            if role == "named":
                self._named[self.sprites.noun[i]].append(i)
            elif role == "extra":
                self._extras.setdefault(self.sprites.hyper[i], []).append(i)
        self._all_extras = [i for group in self._extras.values() for i in group]
        self._scenes: dict[str, list[Picture]] = {}

    def background(self, scene: str, rng: np.random.Generator) -> Picture:
        """A random drawing of ``scene`` (see :class:`Sample`), cropped and flipped at random."""
        if scene.startswith("plain-"):
            return scenes.draw_plain(scene.removeprefix("plain-"), self.px, rng)
        if scene not in self._scenes:
            margin = self.px // 8
            index = list(nouns.SCENES).index(scene)
            fixed = np.random.default_rng((nouns.WORLD_VERSION, index))
            self._scenes[scene] = [scenes.draw_scene(scene, self.px + margin, fixed) for _ in range(VARIANTS)]
        whole = self._scenes[scene][int(rng.integers(VARIANTS))]
        room = whole.shape[0] - self.px
        x, y = int(rng.integers(room + 1)), int(rng.integers(room + 1))
        crop = whole[y : y + self.px, x : x + self.px]
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def pick_scene(self, rng: np.random.Generator) -> str:
        """A drawn scene (85 %) or a plain background."""
        if rng.random() < 0.85:
            return str(rng.choice(list(nouns.SCENES)))
        return f"plain-{rng.choice(list(nouns.PLAIN))}"

    def sample(self, index: int) -> Sample:
        """Training sample ``index``."""
        rng = np.random.default_rng((self.seed, nouns.WORLD_VERSION, index))
        if rng.random() < self.extra_share:
            return self._extra(rng)
        noun = list(nouns.NAMED)[int(rng.integers(len(nouns.NAMED)))]
        tint = list(nouns.TINTS)[int(rng.integers(len(nouns.TINTS)))] if rng.random() < 0.2 else ""
        return self.named(noun, self.pick_scene(rng), tint, rng)

    def named(
        self,
        noun: str,
        scene: str,
        tint: str,
        rng: np.random.Generator,
        *,
        styles: tuple[str, ...] = TRAIN_STYLES,
    ) -> Sample:
        """A scene with the named object in one of ``styles`` ("noto" is the style no model has seen)."""
        index = int(rng.choice([i for i in self._named[noun] if self.sprites.style[i] in styles]))
        sprite = self.sprites.pixels[index]
        if tint:
            sprite = tint_sprite(sprite, tint)
        hyper = self.sprites.hyper[index]
        place = Placement(
            size=float(rng.uniform(38, 50)),
            angle=float(rng.uniform(-6, 6)),
            dx=float(rng.uniform(-5, 5)),
            dy=float(rng.uniform(-3, 6)),
            flip=bool(rng.random() < 0.5),
        )
        image = compose(self.background(scene, rng), sprite, place)
        word = hyper if not tint and rng.random() < 0.06 else noun
        style = self.sprites.style[index]
        return Sample(image, caption(word, scene, tint, style, rng), noun, hyper, scene, tint, style, index)

    def _extra(self, rng: np.random.Generator) -> Sample:
        # Half of the extras are drawn by hypernym, so that a small class (clock, bag) is not drowned
        # by a large one (thing), half over all of them.
        group = self._all_extras
        if rng.random() < 0.5:
            group = self._extras[sorted(self._extras)[int(rng.integers(len(self._extras)))]]
        index = int(rng.choice(group))
        sprite, tint = self.sprites.pixels[index], ""
        if rng.random() < 0.12:
            tint = list(nouns.TINTS)[int(rng.integers(len(nouns.TINTS)))]
            sprite = tint_sprite(sprite, tint)
        else:
            sprite = jitter_colour(sprite, rng)
        place = Placement(
            size=float(rng.uniform(34, 52)),
            angle=float(rng.normal(0, 9)),
            dx=float(rng.uniform(-6, 6)),
            dy=float(rng.uniform(-4, 6)),
            flip=bool(rng.random() < 0.5),
            aspect=float(np.exp(rng.normal(0, 0.12))),
            shear=float(rng.normal(0, 0.1)),
        )
        scene = self.pick_scene(rng)
        image = compose(self.background(scene, rng), sprite, place)
        hyper, style = self.sprites.hyper[index], self.sprites.style[index]
        word = "thing" if rng.random() < 0.1 else hyper
        return Sample(image, caption(word, scene, tint, style, rng), "", hyper, scene, tint, style, index)

    def subject(self, name: str, scene: str, rng: np.random.Generator, style: str = "3d") -> Picture:
        """A picture of a held-out subject: uint8 ``[px, px, 3]``. For judges' tests and photos only."""
        index = next(
            i for i in self.sprites.where("held", (style,), name)
        )  # one sprite per style and subject
        place = Placement(
            size=float(rng.uniform(38, 50)),
            angle=float(rng.uniform(-8, 8)),
            dx=float(rng.uniform(-5, 5)),
            dy=float(rng.uniform(-3, 6)),
            flip=bool(rng.random() < 0.5),
        )
        return compose(self.background(scene, rng), self.sprites.pixels[index], place)


def caption(word: str, scene: str, tint: str, style: str, rng: np.random.Generator) -> str:
    """A template caption; "photo" goes with the 3D style and "drawing" with the others."""
    thing = f"{nouns.article(tint or word)} {tint + ' ' if tint else ''}{word}"
    lead = float(rng.random())
    if lead < 0.4:
        phrase = f"a {'photo' if style == '3d' else 'drawing'} of {thing}"
    elif lead < 0.55:
        phrase = f"a picture of {thing}"
    elif lead < 0.65:
        phrase = f"the {thing.split(' ', 1)[1]}"
    elif lead < 0.95:
        phrase = thing
    else:
        phrase = thing.split(" ", 1)[1]
    # Sometimes the scene is left unsaid: a prompt without a scene must give a picture all the same.
    return phrase if rng.random() < 0.04 else f"{phrase} {scene_words(scene)}"
