"""The presets of the set: what differs between them, and nothing else.

``dinghy-4``, which ships, has 128 px, 282 nouns and several objects in a picture and was trained on a GPU;
``dinghy-1`` is the small one of 64 px. Everything in the recipe takes a :class:`Preset`; :data:`SHIPPED` is
the one that is used unless another is named. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import nouns

JUDGE_PX = 64
"""Side of the pictures that the judges see; larger ones are reduced first."""
JUDGE_PATCH = 8


@dataclass(frozen=True)
class Pose:
    """How named objects and subjects lie: lengths in 64ths of the picture's side, angle in degrees.

    A small model learns outlines only where they vary little: each doubling of the poses is a doubling of
    what it has to know of every object.
    """

    size: tuple[float, float]
    angle: float
    dx: float
    dy: tuple[float, float]


@dataclass(frozen=True)
class Preset:
    """One size of the set.

    Args:
        version: name of the set; part of its directories' names.
        px: side of its pictures.
        names: the nouns that its world names, keys of ``nouns.NAMED``.
        determiner: whether uncountable nouns take "some" ("some grapes").
        pose: of single named objects and of subjects; extras vary more in both presets.
        shares: of extras, of counted groups and of pairs among the training pictures.
        channels: of the latents, which are 16x16 in all.
        vocabulary: file of its tokenizer's vocabulary.
    """

    version: str
    px: int
    names: tuple[str, ...]
    determiner: bool
    pose: Pose
    shares: tuple[float, float, float]
    channels: int
    vocabulary: str

    @property
    def halvings(self) -> int:
        """Of the side, between pixels and latents."""
        return (self.px // 16).bit_length() - 1

    def article(self, words: str) -> str:
        """The determiner before ``words``: "a", "an" or, in worlds that know it, "some"."""
        found = nouns.article(words)
        return "a" if found == "some" and not self.determiner else found

    def one(self, word: str, tint: str = "") -> str:
        """``word`` with its determiner and, if asked for, its colour: "a red car"."""
        words = f"{tint} {word}".strip()
        return f"{self.article(words)} {words}"

    def words(self) -> frozenset[str]:
        """Every single word that training captions may hold."""
        plurals = [nouns.plural(n) for n in self.names] if self.shares[1] else []
        numbers = [nouns.NUMBERS[2], nouns.NUMBERS[3]] if self.shares[1] else []
        phrases = [*self.names, *plurals, *numbers, *nouns.HYPERNYMS, *nouns.TINTS, *nouns.PLAIN]
        phrases += [*nouns.SCENES.values(), "a an the of on photo drawing picture background"]
        if self.determiner:
            phrases.append("some")
        if self.shares[2]:
            phrases.append("and")
        return frozenset(word for phrase in phrases for word in phrase.split())


LATER = ("tiger", "rabbit", "shark", "tomato", "airplane", "star", "rainbow", "volcano", "laptop")
"""Named since the second weights of dinghy-1; its first vocabulary kept a place for them."""

SMALL = Preset(
    version="dinghy-1",
    px=64,
    names=(*tuple(nouns.NAMED)[:93], *LATER),
    determiner=False,
    pose=Pose(size=(42, 50), angle=4, dx=3, dy=(-2, 4)),
    shares=(0.1, 0.0, 0.0),
    channels=12,
    vocabulary="vocabulary-1.json",
)

LARGE = Preset(
    version="dinghy-4",
    px=128,
    names=tuple(nouns.NAMED),
    determiner=True,
    pose=Pose(size=(40, 52), angle=5, dx=4, dy=(-3, 4)),
    shares=(0.2, 0.08, 0.12),
    channels=24,
    vocabulary="vocabulary-4.json",
)

PRESETS = {preset.version: preset for preset in (SMALL, LARGE)}
SHIPPED = LARGE
