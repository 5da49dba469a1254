"""Prompts of measurements: class templates, articles, and what base and judges may read of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import BaseModel

CLASS_TEMPLATES = (
    "a photo of {article} {subject}",
    "a picture of {article} {subject}",
    "a drawing of {article} {subject}",
    "{article} {subject}",
)
"""Prompts of the bare class: for class images and for the class half of the drift probe."""

_VOWELS = "aeio"  # by spelling; u mostly sounds like a consonant: a unicorn, a uniform


def article(word: str) -> str:
    """The indefinite article, by spelling: good enough for captions."""
    return "an" if word[:1].lower() in _VOWELS else "a"


def class_prompts(base: BaseModel, class_noun: str) -> list[str]:
    """Prompts of the bare class that the base reads in full; see `readable`."""
    prompts = [t.format(article=article(class_noun), subject=class_noun) for t in CLASS_TEMPLATES]
    return readable(base, prompts, known=class_noun.split())


def readable(
    base: BaseModel,
    prompts: Sequence[str],
    *,
    known: Iterable[str] = (),
    embeddings: LearnedEmbeddings | None = None,
) -> list[str]:
    """Those of several equivalent prompts that the base reads in full.

    A base with a small vocabulary lists the words it was trained on; prompts with other words are left out,
    unless nothing would remain.

    Args:
        base: whose tokenizer and words decide.
        prompts: at least one.
        known: words that count as known, such as class noun and placeholder.
        embeddings: learned tokens in the prompts.

    Raises:
        MooringError: PROMPT_TOO_LONG when even the shortest prompt does not fit.
    """
    counted = {word.lower() for word in known}
    checks = {prompt: base.check_prompt(prompt, embeddings) for prompt in prompts}
    fitting = [prompt for prompt, check in checks.items() if not check.cut]
    if not fitting:
        base.require_prompt_fits(min(prompts, key=len), embeddings, field="class_noun")
    in_full = [p for p in fitting if not {word.lower() for word in checks[p].unknown_words} - counted]
    return in_full or fitting


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
