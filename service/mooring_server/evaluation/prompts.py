"""Prompts of measurements: class templates, generic prompts, and what base and judges may read of a prompt.

A run is steered on one set of prompts and judged on another. Both sets are made the same way (so many generic
prompts, so many of the bare class, out of one list by turns), so that what differs between the two figures is
chance and not composition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import BaseModel

_MEDIA = ("a photo of ", "a picture of ", "a drawing of ", "")
_SCENES = ("", " on the beach", " in the snow", " in the city", " in the desert", " at night")


def _class_templates(half: int) -> tuple[str, ...]:
    """Half of all pairs of medium and scene; each scene comes twice in it, each medium three times."""
    return tuple(
        f"{medium}{{article}} {{subject}}{scene}"
        for s, scene in enumerate(_SCENES)
        for m, medium in enumerate(_MEDIA)
        if (m + s) % 2 == half
    )


STEERING_TEMPLATES = _class_templates(0)
"""Prompts of the bare class for class images and for the probe that a run is steered on."""
HELD_OUT_TEMPLATES = _class_templates(1)
"""Other such prompts, for the probe that an evaluation judges with."""
PROBE_GENERIC = 84
"""Generic prompts of each probe beside its twelve of the class: the 95 % interval is then about ±15 %."""
DRAWN_GENERIC = 24
"""Generic prompts that an evaluation draws where a caller names none."""

_THINGS = (
    "house", "tree", "cup", "car", "boat", "bird", "flower", "chair", "dog", "cat", "horse", "cow", "fish",
    "apple", "banana", "cake", "pizza", "book", "clock", "lamp", "table", "bed", "sofa", "bicycle", "bus",
    "train", "truck", "plane", "ship", "bridge", "tower", "castle", "church", "barn", "window", "door",
    "hat", "shoe", "shirt", "bag", "umbrella", "guitar", "ball",
)  # fmt: skip
_PLACES = ("on the beach", "in the snow", "in the city", "in a field")
_VOWELS = "aeio"  # by spelling; u mostly sounds like a consonant: a unicorn, a uniform


def article(word: str) -> str:
    """The indefinite article, by spelling: good enough for captions."""
    return "an" if word[:1].lower() in _VOWELS else "a"


GENERIC_PROMPTS = tuple(
    # an odd number of things: by turns, each half gets every thing in two of its four places
    f"a photo of {article(thing)} {thing} {_PLACES[(number // 2 + turn) % len(_PLACES)]}"
    for turn in range(len(_PLACES))
    for number, thing in enumerate(_THINGS)
)
"""For bases that come without a list of prompts they are known to draw well."""


@dataclass(frozen=True)
class PromptSets:
    """What a server draws and measures with where a caller names nothing.

    Attributes:
        scenes: subject prompts, `{}` for the subject.
        generic: prompts without a subject, to draw.
        steering: generic prompts of the probe that training is steered on.
        held_out: generic prompts of the probe that evaluation judges with; none of them in `steering`.
    """

    scenes: tuple[str, ...]
    generic: tuple[str, ...]
    steering: tuple[str, ...]
    held_out: tuple[str, ...]

    @staticmethod
    def of(scenes: Sequence[str], generic: Sequence[str]) -> PromptSets:
        """Deal out generic prompts by turns.

        Args:
            scenes: subject prompts.
            generic: different prompts, at least four, `2 * PROBE_GENERIC` at best.
        """
        held_out = tuple(generic[1::2][:PROBE_GENERIC])
        return PromptSets(
            scenes=tuple(scenes),
            generic=held_out[:DRAWN_GENERIC],
            steering=tuple(generic[::2][:PROBE_GENERIC]),
            held_out=held_out,
        )


def class_prompts(
    base: BaseModel, class_noun: str, templates: Sequence[str] = STEERING_TEMPLATES
) -> list[str]:
    """Prompts of the bare class that the base reads in full; see `readable`."""
    prompts = [t.format(article=article(class_noun), subject=class_noun) for t in templates]
    return readable(base, prompts, known=class_noun.split())


def readable(
    base: BaseModel,
    prompts: Sequence[str],
    *,
    known: Iterable[str] = (),
    embeddings: LearnedEmbeddings | None = None,
    least: int = 1,
) -> list[str]:
    """Those of several equivalent prompts that the base reads in full.

    A base with a small vocabulary lists the words it was trained on; prompts with other words are left out,
    unless too few would remain.

    Args:
        base: whose tokenizer and words decide.
        prompts: at least one.
        known: words that count as known, such as class noun and placeholder.
        embeddings: learned tokens in the prompts.
        least: with fewer left than this, prompts with unknown words count as well.

    Raises:
        MooringError: PROMPT_TOO_LONG when even the shortest prompt does not fit.
    """
    counted = {word.lower() for word in known}
    checks = {prompt: base.check_prompt(prompt, embeddings) for prompt in prompts}
    fitting = [prompt for prompt, check in checks.items() if not check.cut]
    if not fitting:
        base.require_prompt_fits(min(prompts, key=len), embeddings, field="class_noun")
    in_full = [p for p in fitting if not {word.lower() for word in checks[p].unknown_words} - counted]
    return in_full if len(in_full) >= least else fitting


def without_placeholder(prompt: str, placeholder: str) -> str:
    """The prompt with the placeholder token removed, spaces closed up and the article before it set right.

    The base and the judges never saw the placeholder: leaving it in would measure how their tokenizers cut
    a nonsense word.
    """
    if not placeholder:
        return prompt
    token, flags = re.escape(placeholder), re.IGNORECASE
    prompt = re.sub(
        rf"\ban?\s+{token}(?!\w)\s+(?=(\w+))", lambda found: f"{article(found[1])} ", prompt, flags=flags
    )
    prompt = re.sub(rf"(?<!\w){token}(?!\w)", " ", prompt, flags=flags)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(prompt.split()))
