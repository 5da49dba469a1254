"""Prompts without a subject whose pictures a classifier can read: what an adapter may break.

Product code steers and probes on one object in one scene. Here two thirds of the prompts ask for more than
that, two different objects or two or three of one, and some for things of the subject's own kind. On a good
base these are where a change shows first, as a large model's text and hands go before its landscapes do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mooring_server.dinghy import nouns, photo_prompt
from mooring_server.dinghy.classifier import Reading
from mooring_server.dinghy.figures import Ask, fresh_asks, object_right, relation_asks
from mooring_server.dinghy.preset import SHIPPED

ONE, KIN, COUNTED, TWO = "one object", "of its kind", "counted", "two objects"
KINDS = (ONE, KIN, COUNTED, TWO)
"""Of prompts: any object; one that shares the subject's class noun; two or three of one; two different."""

SINGLE, RELATIONS, MOST_KIN = 24, 64, 8
SEED = 4024
"""Of the nouns and scenes that are drawn: not those of the base's own figures."""


def generic_asks(class_noun: str, *, avoid: Collection[str] = (), quick: bool = False) -> list[Ask]:
    """What is asked for beside a subject of the class ``class_noun``, by their kinds.

    Args:
        class_noun: a bird's neighbours are a penguin and a parrot.
        avoid: prompts that the training was steered on.
        quick: eight prompts instead of about a hundred.
    """
    scenes = list(nouns.SCENES)
    kin = [name for name in SHIPPED.names if nouns.NAMED[name][1] == class_noun][:MOST_KIN]
    asks = [*fresh_asks(SHIPPED, SINGLE, SEED), *relation_asks(SHIPPED, RELATIONS, SEED)]
    for i, name in enumerate(kin):
        scene = scenes[5 * i % len(scenes)]
        asks.append(Ask(f"{photo_prompt(name)} {nouns.SCENES[scene]}", (name,), scene))
    unseen = list({ask.prompt: ask for ask in asks if ask.prompt not in avoid}.values())
    unseen.sort(key=lambda ask: KINDS.index(kind(ask, class_noun)))
    return unseen[:: len(unseen) // 8][:8] if quick else unseen


def kind(ask: Ask, class_noun: str) -> str:
    """Which of ``KINDS`` a prompt is."""
    if len(ask.nouns) == 2:
        return TWO
    if ask.count > 1:
        return COUNTED
    return KIN if nouns.NAMED[ask.nouns[0]][1] == class_noun else ONE


def right_by_kind(asks: Sequence[Ask], readings: Sequence[Reading], class_noun: str) -> dict[str, list[bool]]:
    """For every kind, whether each of its pictures shows the object (both, or so many) that was asked for."""
    found: dict[str, list[bool]] = {name: [] for name in KINDS}
    for ask, reading in zip(asks, readings, strict=True):
        found[kind(ask, class_noun)].append(object_right(ask, reading))
    return found
