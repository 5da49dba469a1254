"""The presets of the set: what differs between them, and nothing else.

``dinghy-1`` is what two CPU cores can train from nothing, ``dinghy-3``, which ships, grows from it to 128 px
and to several objects in a picture, ``dinghy-2`` needs a GPU. Everything in the recipe takes a
:class:`Preset`; :data:`SHIPPED` is the one that is used unless another is named. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import nouns


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
    mirrored: bool


@dataclass(frozen=True)
class Preset:
    """One size of the set.

    Args:
        version: name of the set; part of its directories' names.
        px: side of its pictures.
        judge_px: side of the pictures that the judges see; larger ones are reduced first.
        patch: side of the judges' patches.
        names: the nouns that its world names, keys of ``nouns.NAMED``.
        determiner: whether uncountable nouns take "some" ("some grapes").
        pose: of single named objects and of subjects; extras vary more in both presets.
        shares: of extras, of counted groups and of pairs among the training pictures.
        codec: "patches" (PCA of pixel patches, AutoencoderTiny) or "variational" (AutoencoderKL).
        channels: of the latents, which are 16x16 in all.
        widths: of the UNet's three levels.
        vocabulary: file of its tokenizer's vocabulary.
    """

    version: str
    px: int
    judge_px: int
    patch: int
    names: tuple[str, ...]
    determiner: bool
    pose: Pose
    shares: tuple[float, float, float]
    codec: str
    channels: int
    widths: tuple[int, int, int]
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
    judge_px=64,
    patch=8,
    names=(*tuple(nouns.NAMED)[:93], *LATER),
    determiner=False,
    pose=Pose(size=(42, 50), angle=4, dx=3, dy=(-2, 4), mirrored=False),
    shares=(0.1, 0.0, 0.0),
    codec="patches",
    channels=12,
    widths=(64, 128, 192),
    vocabulary="vocabulary-1.json",
)

GROWN = replace(
    SMALL,
    version="dinghy-3",
    px=128,
    shares=(0.1, 0.06, 0.1),
    channels=20,
    vocabulary="vocabulary-3.json",
)
"""Started from dinghy-1's weights (:mod:`.grow`); its tokenizer knows the plurals beside dinghy-1's words."""

LARGE = Preset(
    version="dinghy-2",
    px=128,
    judge_px=128,
    patch=16,
    names=tuple(nouns.NAMED),
    determiner=True,
    pose=Pose(size=(38, 52), angle=6, dx=5, dy=(-3, 5), mirrored=True),
    shares=(0.25, 0.08, 0.1),
    codec="variational",
    channels=16,
    widths=(96, 160, 224),
    vocabulary="vocabulary-2.json",
)

PRESETS = {preset.version: preset for preset in (SMALL, GROWN, LARGE)}
SHIPPED = GROWN
