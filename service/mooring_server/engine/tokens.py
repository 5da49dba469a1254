"""Prompts to token ids, with learned placeholder tokens beside the base's vocabulary.

A placeholder (`<robot>`, one or several vectors) never enters the tokenizer or the embedding table: the
prompt is split at the placeholder, its positions carry a filler id, and `model.py` writes the learned vectors
over the token embeddings of those positions. So the base stays bitwise what it was, two tenants may use the
same placeholder at once, and the end-of-text position that pooled embeddings read (the *highest* id in old
CLIP configurations) is not disturbed by ids above the vocabulary.

Truncation and padding are done here and not by the tokenizer, whose setting of them is shared state and not
thread-safe: prompts are checked on server threads while the engine encodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")


@dataclass(frozen=True)
class Tokens:
    """One prompt as token ids, without begin and end tokens, not cut.

    Args:
        ids: vocabulary ids; placeholder positions carry the begin token as filler.
        spans: character range of each token in the prompt.
        learned: (position in `ids`, placeholder, index of its vector) of every placeholder position.
        unknown: words that the vocabulary has no token for, in order of appearance.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    learned: list[tuple[int, str, int]]
    unknown: list[str]


class PromptTokenizer:
    """A CLIP tokenizer with begin/end tokens, padding and placeholders handled outside of it.

    Args:
        tokenizer: a transformers tokenizer backed by `tokenizers`.
        max_positions: positions of the text encoder.

    Attributes:
        length: tokens of a padded row, begin and end included.
        limit: tokens a prompt may take, begin and end not counted.
    """

    def __init__(self, tokenizer: Any, max_positions: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.length = min(int(tokenizer.model_max_length), max_positions)
        self.limit = self.length - 2
        self._begin = int(tokenizer.bos_token_id)
        self._end = int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        self._unknown = tokenizer.unk_token_id

    def tokenize(self, prompt: str, placeholders: Mapping[str, int]) -> Tokens:
        """Split a prompt into tokens.

        Args:
            prompt: any text; placeholders are matched as whole words, without regard to case (CLIP lowers
                it).
            placeholders: number of learned vectors of each placeholder.
        """
        tokens = Tokens([], [], [], [])
        at = 0
        for match in _occurrences(prompt, placeholders):
            self._append(tokens, prompt, at, match.start())
            name = next(name for name in placeholders if name.lower() == match.group().lower())
            for vector in range(placeholders[name]):
                tokens.learned.append((len(tokens.ids), name, vector))
                tokens.ids.append(self._begin)
                tokens.spans.append(match.span())
            at = match.end()
        self._append(tokens, prompt, at, len(prompt))
        return tokens

    def row(self, tokens: Tokens) -> tuple[list[int], list[int]]:
        """Padded ids and attention mask `[length]`; the prompt must fit (`len(tokens.ids) ≤ limit`)."""
        ids = [self._begin, *tokens.ids, self._end]
        padding = self.length - len(ids)
        assert padding >= 0, "prompts are checked before they are padded"
        return ids + [self._pad] * padding, [1] * len(ids) + [0] * padding

    def _append(self, tokens: Tokens, prompt: str, start: int, end: int) -> None:
        # Also what Python takes for blank: some control characters are tokens to the tokenizer.
        encoded = self._backend.encode(prompt[start:end], add_special_tokens=False)
        for token, (left, right) in zip(encoded.ids, encoded.offsets, strict=True):
            tokens.ids.append(token)
            tokens.spans.append((start + left, start + right))
            if token == self._unknown:
                word = _word_at(prompt, start + left)
                if word and word not in tokens.unknown:
                    tokens.unknown.append(word)


def words_of(prompt: str, placeholders: Mapping[str, int]) -> list[str]:
    """The plain words of a prompt, in order and lower case; placeholders left out."""
    kept: list[str] = []
    at = 0
    for match in _occurrences(prompt, placeholders):
        kept.append(prompt[at : match.start()])
        at = match.end()
    kept.append(prompt[at:])
    return [word.lower() for piece in kept for word in _WORD.findall(piece)]


def _occurrences(prompt: str, placeholders: Mapping[str, int]) -> list[re.Match[str]]:
    """Placeholders in the prompt, longest first where one begins with another, never inside a word."""
    if not placeholders:
        return []
    names = sorted(placeholders, key=len, reverse=True)
    alternatives = "|".join(re.escape(name) for name in names)
    return list(re.finditer(rf"(?<!\w)(?:{alternatives})(?!\w)", prompt, re.IGNORECASE))


def _word_at(prompt: str, position: int) -> str:
    for match in _WORD.finditer(prompt):
        if match.start() <= position < match.end():
            return match.group()
    return ""  # punctuation
