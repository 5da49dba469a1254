"""The hook: checks of prompts and of pictures, for which tenants, and what comes of them.

A check gives verdicts. A prompt that one refuses is an error before anything is drawn (PROMPT_REFUSED); a
picture that one refuses is drawn and withheld (IMAGE_WITHHELD where it was all that was asked for). What was
checked and found is told with the answer, so that a caller can tell "checked" from "not checked".

A check that cannot do its work raises, and the request fails with it: an error never lets anything through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooring_server.errors import FieldViolation, MooringError, Reason

Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        check: name of the check, for example "phrases".
        allowed: whether what it looked at may pass.
        category: what kind of content it found most of; "" where it found none.
        score: how sure it is of that category, 0 to 1.
    """

    check: str
    allowed: bool
    category: str = ""
    score: float = 0.0

    def to_json(self) -> dict[str, object]:
        """For manifests; the score with four digits, which is what a reader can use."""
        return {**asdict(self), "score": round(self.score, 4)}


class PromptCheck(Protocol):
    """Judges a prompt. Thread-safe."""

    def judge(self, prompt: str) -> Verdict:
        """The verdict on one text."""


class ImageCheck(Protocol):
    """Judges a picture. Thread-safe; blocking."""

    def judge(self, pixels: Pixels) -> Verdict:
        """The verdict on one picture, `[H, W, 3]` uint8."""


@dataclass(frozen=True)
class SafetyPolicy:
    """Which checks apply to whom.

    Attributes:
        prompt_checks: asked in order; the first refusal counts.
        image_checks: as well.
        exempt: tenants that are not checked.
    """

    prompt_checks: Sequence[PromptCheck] = ()
    image_checks: Sequence[ImageCheck] = ()
    exempt: Collection[str] = frozenset()

    def checks_images(self, tenant: str) -> bool:
        """Whether pictures of a tenant are judged."""
        return bool(self.image_checks) and tenant not in self.exempt

    def require_prompts(self, tenant: str, prompts: Iterable[tuple[str, str]]) -> tuple[Verdict, ...]:
        """Judge the prompts of a request. Negative prompts are none: they say what shall not be seen.

        Args:
            tenant: who asks.
            prompts: field and text of each.

        Raises:
            MooringError: PROMPT_REFUSED. The message names the category, never the phrase that was found.
        """
        if tenant in self.exempt:
            return ()
        verdicts = []
        for field, text in prompts:
            for check in self.prompt_checks:
                verdict = check.judge(text)
                if not verdict.allowed:
                    message = f"{field} is refused by the content policy ({verdict.category})."
                    raise MooringError(
                        Reason.PROMPT_REFUSED,
                        message,
                        remedy="Ask for something else; whoever runs the server decides on the policy.",
                        metadata={"category": verdict.category, "check": verdict.check},
                        fields=[FieldViolation(field, message)],
                    )
                verdicts.append(verdict)
        return tuple(dict.fromkeys(verdicts))

    def judge_image(self, tenant: str, pixels: Pixels) -> tuple[Verdict, ...]:
        """The verdicts on a picture, up to the first refusal. Blocking."""
        if tenant in self.exempt:
            return ()
        verdicts: list[Verdict] = []
        for check in self.image_checks:
            verdicts.append(check.judge(pixels))
            if not verdicts[-1].allowed:
                break
        return tuple(verdicts)


def refusal(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The verdict that refuses; None when all allow."""
    return next((verdict for verdict in verdicts if not verdict.allowed), None)


def withheld(verdict: Verdict) -> MooringError:
    """The error of a picture that is not handed out."""
    return MooringError(
        Reason.IMAGE_WITHHELD,
        f"The image was drawn and is withheld by the content policy ({verdict.category}).",
        remedy="Change prompt or seed; whoever runs the server decides on the policy.",
        metadata={"category": verdict.category, "check": verdict.check},
    )
