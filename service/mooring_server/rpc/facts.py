"""What a call did, for its canonical log line.

Handlers note facts while they work; the outermost interceptor writes them as the call ends. The dictionary is
made per call and shared with the tasks that a call starts, so what they note counts too. A prompt is noted as
a hash only: equal prompts can be found, and none can be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

FACTS: ContextVar[dict[str, Any]] = ContextVar("mooring_facts")
_LISTED = 8


def begin() -> dict[str, Any]:
    """The facts of a call that begins in this context."""
    facts: dict[str, Any] = {}
    FACTS.set(facts)
    return facts


def note(**facts: Any) -> None:
    """Say something about this call; nothing outside of one."""
    FACTS.get({}).update(facts)


def add(name: str, amount: float) -> None:
    """Add to a sum, over the requests of a batch."""
    facts = FACTS.get({})
    facts[name] = round(facts.get(name, 0) + amount, 6)


def note_request(prompt: str, digests: Iterable[str]) -> None:
    """What a generation asks for: prompt hash and adapter digests, the first few of a batch's each."""
    facts = FACTS.get({})
    for name, values in (("prompt_hash", [prompt_hash(prompt)]), ("adapter_digest", list(digests))):
        known = [value for value in str(facts.get(name, "")).split(",") if value]
        new = [value for value in dict.fromkeys(values) if value not in known]
        facts[name] = ",".join([*known, *new][:_LISTED])


def prompt_hash(prompt: str) -> str:
    """`sha256:…` of a prompt."""
    return "sha256:" + hashlib.sha256(prompt.encode()).hexdigest()
