"""The world: deterministic samples of (what is drawn where, caption, labels) from sprites and scenes.

A sample is a description, not a picture: :mod:`.render` draws whole batches of them on the CPU or a GPU.
Sample ``i`` of a world with seed ``s`` depends on nothing but ``(s, i)`` and the world's version, so training
data need not be stored and a resumed run sees what an uninterrupted one would have seen. Held-out subjects
are never drawn here except by :meth:`World.subject`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from . import nouns
from .preset import Preset
from .sources import Sprites, load_sprites

VARIANTS = 64
"""Drawings kept of every scene; each sample crops and flips one of them."""

TRAIN_STYLES = ("3d", "flat")
"""Styles of the named objects; Noto's drawings of them are held out as a style."""

PHOTO_SHARE = 1 / 3
"""Of the named objects, drawn in 3D for sure; the others in either style. Most prompts ask for a photo."""

SCENE_KEYS = (*nouns.SCENES, *(f"plain-{colour}" for colour in nouns.PLAIN))
"""Every background: the drawn scenes, then the plain colours."""

T = TypeVar("T")
Picture = NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True)
class Placement:
    """How a sprite is put on a scene: lengths in 64ths of the picture's side, angle in degrees."""

    size: float
    angle: float
    dx: float
    dy: float
    flip: bool = False
    aspect: float = 1.0
    shear: float = 0.0


@dataclass(frozen=True)
class Piece:
    """One object of a sample.

    ``tint`` is a key of ``nouns.TINTS`` or ""; ``colour`` multiplies the sprite's RGB (rows of a 3x3
    matrix); ``warp`` bends the sprite by ``x += a·sin(f·y + p)`` and the same in y: (a, f, p, a, f, p).
    """

    sprite: int
    place: Placement
    tint: str = ""
    colour: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1)
    warp: tuple[float, float, float, float, float, float] = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Ground:
    """A crop of one of the drawings of ``scene``: variant, corner as shares of the margin, mirrored."""

    scene: str
    variant: int
    x: float
    y: float
    flip: bool


@dataclass(frozen=True)
class Sample:
    """One scene and what is true of it.

    ``nouns`` are the named objects from left to right (one for a counted group, none for an extra);
    ``count`` says how many objects of a group there are; ``tint`` is that of a single object.
    """

    ground: Ground
    pieces: tuple[Piece, ...]
    caption: str
    nouns: tuple[str, ...]
    hyper: str
    tint: str = ""
    count: int = 1

    @property
    def noun(self) -> str:
        """The first named object, or "" for an extra."""
        return self.nouns[0] if self.nouns else ""

    @property
    def scene(self) -> str:
        """A key of ``nouns.SCENES`` or ``plain-<colour>``."""
        return self.ground.scene


def scene_words(scene: str) -> str:
    """The words that ask for ``scene``, for instance "in the snow" or "on a red background"."""
    if scene.startswith("plain-"):
        colour = scene.removeprefix("plain-")
        return f"on {nouns.article(colour)} {colour} background"
    return nouns.SCENES[scene]


def jitter(rng: Rng) -> tuple[float, ...]:
    """A colour matrix that turns the hue and changes saturation and brightness, against memorising."""
    angle = float(rng.uniform(-math.pi, math.pi)) if rng.random() < 0.35 else float(rng.normal(0, 0.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # Rotation about the grey axis: a linear, cheap stand-in for turning the hue.
    third, root = (1 - cos) / 3, sin / math.sqrt(3)
    turn = np.array(
        [[cos + third, third - root, third + root], [third + root, cos + third, third - root],
         [third - root, third + root, cos + third]])  # fmt: skip
    saturation, brightness = float(rng.uniform(0.75, 1.25)), float(rng.uniform(0.82, 1.15))
    grey = np.full((3, 3), 1 / 3)
    matrix = (grey + (np.eye(3) - grey) * saturation) @ turn * brightness
    return tuple(matrix.ravel().tolist())


class World:
    """Describes samples from the sprites' table; see the module's docstring.

    The preset says which nouns are named and what share of the pictures shows an unnamed object under its
    hypernym, two or three of one kind, or two different named objects; the rest shows one named object.
    """

    def __init__(self, preset: Preset, seed: int = 0, sprites: Sprites | None = None) -> None:
        self.preset, self.seed = preset, seed
        self.sprites = sprites or load_sprites()
        self._named: dict[str, dict[str, int]] = {n: {} for n in preset.names}
        self._held: dict[tuple[str, str], int] = {}
        self._extras: dict[str, list[int]] = {}
        for i, role in enumerate(self.sprites.role):
            if role == "named" and self.sprites.noun[i] in self._named:
                self._named[self.sprites.noun[i]][self.sprites.style[i]] = i
            elif role in ("named", "extra"):
                self._extras.setdefault(self.sprites.hyper[i], []).append(i)
            else:
                self._held[self.sprites.noun[i], self.sprites.style[i]] = i
        self._names = list(preset.names)
        self._countable = [n for n in self._names if nouns.plural(n)]
        self._tints, self._scenes, self._plain = list(nouns.TINTS), list(nouns.SCENES), list(nouns.PLAIN)
        self._hypers = sorted(self._extras)
        self._all_extras = [i for group in self._extras.values() for i in group]

    # -- parts -------------------------------------------------------------------------------

    def ground(self, scene: str, rng: Rng) -> Ground:
        """A random drawing of ``scene``, cropped and mirrored at random."""
        return Ground(
            scene, int(rng.integers(VARIANTS)), float(rng.random()), float(rng.random()), rng.random() < 0.5
        )

    def pick_scene(self, rng: Rng) -> str:
        """A drawn scene (85 %) or a plain background."""
        if rng.random() < 0.85:
            return _pick(self._scenes, rng)
        return f"plain-{_pick(self._plain, rng)}"

    def sprite_of(self, noun: str, styles: tuple[str, ...], rng: Rng) -> int:
        """A sprite of the named object in one of ``styles``."""
        drawn = self._named[noun]
        return _pick([drawn[s] for s in styles if s in drawn], rng)

    def _place(self, rng: Rng) -> Placement:
        pose = self.preset.pose
        return Placement(
            size=_u(rng, *pose.size), angle=_u(rng, -pose.angle, pose.angle), dx=_u(rng, -pose.dx, pose.dx),
            dy=_u(rng, *pose.dy),
        )  # fmt: skip

    # -- samples -----------------------------------------------------------------------------

    def sample(self, index: int, scene: str = "") -> Sample:
        """Training sample ``index``, on the background ``scene`` if one is asked for."""
        rng = np.random.default_rng((self.seed, nouns.WORLD_VERSION, index))
        extra, group, pair = self.preset.shares
        lot = rng.random()
        if lot < extra:
            return self._extra(rng, scene)
        if lot < extra + group:
            noun, count = _pick(self._countable, rng), int(rng.integers(2, 4))
            return self.group(noun, count, scene or self.pick_scene(rng), rng)
        if lot < extra + group + pair:
            left, right = rng.choice(len(self._names), 2, replace=False)
            return self.pair(self._names[left], self._names[right], scene or self.pick_scene(rng), rng)
        tint = _pick(self._tints, rng) if rng.random() < 0.25 else ""
        styles = ("3d",) if rng.random() < PHOTO_SHARE else TRAIN_STYLES
        noun = _pick(self._names, rng)
        return self.named(noun, scene or self.pick_scene(rng), tint, rng, styles=styles)

    def named(
        self, noun: str, scene: str, tint: str, rng: Rng, *, styles: tuple[str, ...] = TRAIN_STYLES
    ) -> Sample:
        """A scene with the named object in one of ``styles`` ("noto" is the style no model has seen)."""
        sprite = self.sprite_of(noun, styles, rng)
        place = self._place(rng)
        word = self.sprites.hyper[sprite] if not tint and rng.random() < 0.06 else noun
        words = caption(self.preset.one(word, tint), scene, self.sprites.style[sprite], rng)
        return Sample(
            self.ground(scene, rng),
            (Piece(sprite, place, tint),),
            words,
            (noun,),
            self.sprites.hyper[sprite],
            tint,
        )

    def group(
        self, noun: str, count: int, scene: str, rng: Rng, *, styles: tuple[str, ...] = TRAIN_STYLES
    ) -> Sample:
        """``count`` (2 or 3) of one object side by side, in one style."""
        sprite = self.sprite_of(noun, styles, rng)
        size = {2: (25, 31), 3: (18.5, 21.5)}[count]
        step = {2: 31.0, 3: 21.0}[count]
        pose, pieces = self.preset.pose, []
        for k in range(count):
            place = Placement(
                size=_u(rng, *size), angle=_u(rng, -pose.angle, pose.angle),
                dx=(k - (count - 1) / 2) * step + _u(rng, -1, 1), dy=_u(rng, *pose.dy),
            )  # fmt: skip
            pieces.append(Piece(sprite, place))
        thing = f"{nouns.NUMBERS[count]} {nouns.plural(noun)}"
        words = caption(thing, scene, self.sprites.style[sprite], rng)
        return Sample(
            self.ground(scene, rng), tuple(pieces), words, (noun,), self.sprites.hyper[sprite], count=count
        )

    def pair(
        self, left: str, right: str, scene: str, rng: Rng, *, styles: tuple[str, ...] = TRAIN_STYLES
    ) -> Sample:
        """Two named objects, the one named first on the left, in one style where both are drawn in it."""
        style = _pick(list(styles), rng)
        pose, pieces, things = self.preset.pose, [], []
        for k, noun in enumerate((left, right)):
            wanted = (style,) if style in self._named[noun] else styles
            tint = _pick(self._tints, rng) if rng.random() < 0.12 else ""
            place = Placement(
                size=_u(rng, 25, 32), angle=_u(rng, -pose.angle, pose.angle),
                dx=(k - 0.5) * 31 + _u(rng, -1.5, 1.5), dy=_u(rng, *pose.dy),
            )  # fmt: skip
            pieces.append(Piece(self.sprite_of(noun, wanted, rng), place, tint))
            things.append(self.preset.one(noun, tint))
        words = caption(" and ".join(things), scene, style, rng)
        return Sample(
            self.ground(scene, rng), tuple(pieces), words, (left, right), nouns.NAMED[left][1], count=2
        )

    def _extra(self, rng: Rng, scene: str) -> Sample:
        # Half of the extras are drawn by hypernym, so that a small class (clock, bag) is not drowned
        # by a large one (thing), half over all of them.
        group = self._extras[_pick(self._hypers, rng)] if rng.random() < 0.5 else self._all_extras
        sprite = _pick(group, rng)
        tint = _pick(self._tints, rng) if rng.random() < 0.12 else ""
        place = Placement(
            size=_u(rng, 34, 54), angle=float(rng.normal(0, 9)), dx=_u(rng, -6, 6), dy=_u(rng, -4, 6),
            flip=rng.random() < 0.5, aspect=float(np.exp(rng.normal(0, 0.14))),
            shear=float(rng.normal(0, 0.1)),
        )  # fmt: skip
        warp = (0.0,) * 6
        if rng.random() < 0.6:
            # Smooth bending: outlines vary without end, so that none can be learnt by heart.
            warp = (float(rng.normal(0, 0.06)), _u(rng, 1.5, 4), _u(rng, 0, 6.3),
                    float(rng.normal(0, 0.06)), _u(rng, 1.5, 4), _u(rng, 0, 6.3))  # fmt: skip
        piece = Piece(sprite, place, tint, (1, 0, 0, 0, 1, 0, 0, 0, 1) if tint else jitter(rng), warp)
        scene = scene or self.pick_scene(rng)
        hyper = self.sprites.hyper[sprite]
        word = "thing" if rng.random() < 0.1 else hyper
        words = caption(self.preset.one(word, tint), scene, self.sprites.style[sprite], rng)
        return Sample(self.ground(scene, rng), (piece,), words, (), hyper, tint)

    def subject(self, name: str, scene: str, rng: Rng, style: str = "3d") -> Sample:
        """A picture of a held-out subject. For judges' tests and photos only."""
        return self.view(self._held[name, style], scene, rng)

    def view(self, sprite: int, scene: str, rng: Rng) -> Sample:
        """Any sprite on ``scene``, lying as named objects do, its colours untouched."""
        piece = Piece(sprite, self._place(rng))
        return Sample(self.ground(scene, rng), (piece,), "", (), self.sprites.hyper[sprite])

    def object_view(self, sprite: int, rng: Rng) -> Sample:
        """Sprite ``sprite`` somewhere: strong changes of place, size, turn and scene, none of colour."""
        place = Placement(
            size=_u(rng, 30, 56), angle=float(rng.normal(0, 10)), dx=_u(rng, -9, 9), dy=_u(rng, -7, 9),
            flip=rng.random() < 0.5, aspect=float(np.exp(rng.normal(0, 0.06))),
        )  # fmt: skip
        ground = self.ground(self.pick_scene(rng), rng)
        return Sample(ground, (Piece(sprite, place),), "", (), self.sprites.hyper[sprite])

    def training_sprites(self) -> list[int]:
        """Sprites that a judge may see: named ones in the training styles and all extras."""
        named = [drawn[s] for drawn in self._named.values() for s in TRAIN_STYLES if s in drawn]
        return named + self._all_extras


def world_samples(world: World, size: int) -> Callable[[int], list[Sample]]:
    """A function from a training step to its ``size`` samples."""
    return lambda step: [world.sample(step * size + i) for i in range(size)]


def caption(thing: str, scene: str, style: str, rng: Rng) -> str:
    """A template caption of ``thing`` ("a red car", "two cats"); "photo" goes with the 3D style only."""
    bare = (
        thing.split(" ", 1)[1] if thing.startswith(("a ", "an ", "some ")) and " and " not in thing else thing
    )
    lead = float(rng.random())
    if lead < 0.4:
        phrase = f"a {'photo' if style == '3d' else 'drawing'} of {thing}"
    elif lead < 0.55:
        phrase = f"a picture of {thing}"
    elif lead < 0.62:
        phrase = f"the {bare}"
    elif lead < 0.95:
        phrase = thing
    else:
        phrase = bare
    # Sometimes the scene is left unsaid: a prompt without a scene must give a picture all the same.
    return phrase if rng.random() < 0.04 else f"{phrase} {scene_words(scene)}"


def _u(rng: Rng, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _pick(items: list[T], rng: Rng) -> T:
    return items[int(rng.integers(len(items)))]
