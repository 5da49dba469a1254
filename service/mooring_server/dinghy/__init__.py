"""dinghy: the small base model that ships with Mooring, its judges, and the recipe of all three.

This module is free of torch: it says where things lie and which prompts to measure with.
``python -m mooring_server.dinghy --help`` is the recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from . import nouns
from .preset import PRESETS, SHIPPED, Preset

VERSION = SHIPPED.version
"""Version of the shipped set; an adapter made for another version is refused."""

_ROOT = Path(__file__).resolve().parent

PHOTO_SCENES = ("wood", "plain-white", "grass")
"""Where the held-out subjects' photos were taken; every other scene is new to their adapters."""

NEW_SCENES = tuple(s for s in nouns.SCENES if s not in PHOTO_SCENES)


def packaged(base: str) -> Preset | None:
    """The preset that a server's setting ``base`` names, the shipped one if empty; None for another model."""
    return PRESETS.get(base or VERSION)


def weights_dir() -> Path:
    """Directory of everything trained: bases, their judges, ``MANIFEST.json``."""
    return _ROOT / "weights"


def base_dir(version: str = VERSION) -> Path:
    """Directory of a set's base model, in the layout of ``StableDiffusionPipeline.from_pretrained``."""
    return weights_dir() / version


def clip_dir() -> Path:
    """Directory of the judge dinghy-clip (transformers ``CLIPModel``, tokenizer, image processor).

    The judges see every picture at 64 px and know every preset's words: all presets share them.
    """
    return weights_dir() / VERSION.replace("dinghy", "dinghy-clip")


def dino_dir() -> Path:
    """Directory of the judge dinghy-dino (transformers ``Dinov2Model``, image processor)."""
    return weights_dir() / VERSION.replace("dinghy", "dinghy-dino")


def ruler_dir(version: str = VERSION) -> Path:
    """Directory of the classifier that measures a set (``classifier.load_ruler``); not for product code."""
    return weights_dir() / version.replace("dinghy", "dinghy-ruler")


@dataclass(frozen=True)
class HeldOutSubject:
    """A shipped subject that no model of the set has seen.

    ``photos`` are PNG files in order; ``placeholder`` is a suggestion.
    """

    name: str
    class_noun: str
    placeholder: str
    photos: tuple[Path, ...]
    source: str
    licence: str


def subject_dirs() -> list[Path]:
    """Directories of the shipped held-out subjects (``photo_00.png`` …, ``subject.json``), by name."""
    root = _ROOT / "subjects"
    return sorted(p.parent for p in root.glob("*/subject.json"))


def held_out_subjects() -> list[HeldOutSubject]:
    """The shipped held-out subjects, by name."""
    found = []
    for folder in subject_dirs():
        card = json.loads((folder / "subject.json").read_text())
        photos = tuple(sorted(folder.glob("photo_*.png")))
        found.append(HeldOutSubject(photos=photos, **card))
    return found


def photo_prompt(class_noun: str, placeholder: str = "") -> str:
    """The caption of a subject's training photo: "a photo of a <duck> bird"."""
    words = f"{placeholder} {class_noun}".strip()
    return f"a photo of {SHIPPED.one(words)}"


def new_scene_prompts(class_noun: str, placeholder: str = "") -> list[str]:
    """One prompt for each scene that the photos do not show; the base alone is asked without placeholder."""
    return [f"{photo_prompt(class_noun, placeholder)} {nouns.SCENES[s]}" for s in NEW_SCENES]


def generic_prompts(count: int = 60, preset: Preset = SHIPPED) -> list[str]:
    """Prompts about things the base knows, none of them a subject: what an adapter must not break.

    Deterministic, spread over the nouns and scenes, every fifth with a colour. Two neighbours share their
    scene and differ in their noun: dealt out by turns, each half gets every scene.
    """
    names, places, tints = preset.names, list(nouns.SCENES), list(nouns.TINTS)
    prompts = []
    for i in range(count):
        noun = names[(i * 37) % len(names)]
        words = f"{tints[(i // 5) % len(tints)]} {noun}" if i % 5 == 4 else noun
        prompts.append(f"a photo of {preset.one(words)} {nouns.SCENES[places[(i // 2 * 7) % len(places)]]}")
    return prompts


def unknown_words(prompt: str, placeholders: tuple[str, ...] = ()) -> list[str]:
    """Words of ``prompt`` that no training caption held, in order; ``placeholders`` count as known."""
    from .text import unknown_words as words

    return words(prompt, placeholders)
