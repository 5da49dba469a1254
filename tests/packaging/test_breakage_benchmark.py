"""What `benchmarks.breakage` asks for beside a subject, and what it takes for a right picture of it."""

from __future__ import annotations

import pytest
from mooring_server import dinghy
from mooring_server.dinghy import nouns
from mooring_server.dinghy.classifier import Reading
from mooring_server.dinghy.figures import Ask

from benchmarks.asked import COUNTED, KIN, KINDS, ONE, TWO, generic_asks, kind, right_by_kind
from benchmarks.kept import SUBJECTS, prompt_sets

CLASSES = sorted({one.class_noun for one in dinghy.held_out_subjects() if one.name in SUBJECTS})


@pytest.mark.parametrize("class_noun", CLASSES)
def test_a_subject_is_measured_on_every_kind_of_prompt(class_noun):
    asks = generic_asks(class_noun)
    counts = {name: sum(kind(ask, class_noun) == name for ask in asks) for name in KINDS}
    assert all(count >= 4 for count in counts.values()), counts
    assert len({ask.prompt for ask in asks}) == len(asks)
    assert all(ask.scene in (*nouns.SCENES, *(f"plain-{p}" for p in nouns.PLAIN)) for ask in asks)
    assert not any(dinghy.unknown_words(ask.prompt) for ask in asks)


@pytest.mark.parametrize("class_noun", CLASSES)
def test_no_training_is_steered_on_what_is_read(class_noun):
    steering = prompt_sets(quick=False).steering
    asks = generic_asks(class_noun, avoid=steering)
    assert not set(steering) & {ask.prompt for ask in asks}
    assert len(asks) > 90


def test_prompts_that_a_training_was_steered_on_are_left_out():
    first = generic_asks("bird")[0].prompt
    assert first not in [ask.prompt for ask in generic_asks("bird", avoid=[first])]


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (Ask("", ("penguin",), "snow"), KIN),
        (Ask("", ("car",), "snow"), ONE),
        (Ask("", ("penguin",), "snow", count=3), COUNTED),
        (Ask("", ("penguin", "car"), "snow", count=2), TWO),
    ],
)
def test_the_kind_of_a_prompt(ask, name):
    assert kind(ask, "bird") == name


def test_both_objects_must_be_there_and_as_many_as_asked():
    asks = [Ask("", ("cat", "car"), "snow", count=2)] * 2 + [Ask("", ("cat",), "snow", count=3)] * 2
    readings = [
        Reading(("car", "cat"), "snow", "", 2),
        Reading(("cat", "bus"), "snow", "", 2),
        Reading(("cat", "car"), "snow", "", 3),
        Reading(("cat", "car"), "snow", "", 2),
    ]
    assert right_by_kind(asks, readings, "bird") == {
        ONE: [],
        KIN: [],
        COUNTED: [True, False],
        TWO: [True, False],
    }
