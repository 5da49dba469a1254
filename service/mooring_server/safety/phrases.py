"""A prompt check by words: a list of phrases with their categories, one a line.

    # comment
    category: phrase of several words      these words, one after the other
    category: nude + child                 all of these words or phrases, anywhere in the prompt

Prompt and phrases are compared in a plain form: compatibility forms of Unicode, no accents, no invisible
characters, lower case, whole words, whatever stands between them. Words are not stemmed: list the forms.

This is a rule that people can read and test, and no more: it knows neither other spellings, nor other
languages than those of its list, nor meaning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mooring_server.errors import MooringError, Reason
from mooring_server.safety.policy import Verdict

PACKAGED = Path(__file__).with_name("phrases.txt")
_LINE = re.compile(r"(?P<category>[a-z][a-z0-9_-]{0,31})\s*:\s*(?P<phrases>\S.*)")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Rule:
    """One line of the list: every phrase, each a sequence of words, has to be in the prompt."""

    category: str
    phrases: tuple[tuple[str, ...], ...]


class PhraseCheck:
    """Refuses prompts that meet a rule.

    Args:
        rules: in the order in which they are tried.
    """

    name = "phrases"

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)

    @staticmethod
    def load(path: str | Path) -> PhraseCheck:
        """Read a list.

        Raises:
            MooringError: INVALID_FIELD: it cannot be read, or a line is none; the message has its number.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise _unusable(f"The list of phrases {path} cannot be read: {error}.") from None
        rules = [_rule(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
        return PhraseCheck([rule for rule in rules if rule is not None])

    def judge(self, prompt: str) -> Verdict:
        """The verdict on one text."""
        text = f" {' '.join(plain_words(prompt))} "
        for rule in self._rules:
            if all(f" {' '.join(phrase)} " in text for phrase in rule.phrases):
                return Verdict(self.name, allowed=False, category=rule.category, score=1.0)
        return Verdict(self.name, allowed=True)


def plain_words(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    # formats first: a zero-width space would part a word in two
    seen = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    bare = "".join(
        letter for letter in unicodedata.normalize("NFKD", seen) if not unicodedata.combining(letter)
    )
    return _WORD.findall(bare.casefold())


def _rule(line: str, where: str) -> Rule | None:
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    match = _LINE.fullmatch(line)
    phrases = tuple(tuple(plain_words(part)) for part in match["phrases"].split("+")) if match else ()
    if match is None or not all(phrases):
        raise _unusable(f"{where}: “{line[:80]}” is no rule.")
    return Rule(match["category"], phrases)


def _unusable(message: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD, message, remedy="A rule is a line such as “minors: nude + child”."
    )
