"""What `benchmarks.breakage` reads out of a prompt."""

from __future__ import annotations

import pytest
from mooring_server.dinghy import generic_prompts, nouns
from mooring_server.dinghy.preset import SHIPPED

from benchmarks.breakage import object_of, scene_of


@pytest.mark.parametrize(
    ("prompt", "noun"),
    [
        ("a photo of a tree in the snow", "tree"),
        ("a photo of a palm tree on the beach", "palm tree"),
        ("a photo of a red race car at night", "race car"),
        ("a photo of some grapes on a wooden floor", "grapes"),
    ],
)
def test_the_whole_noun_is_found(prompt, noun):
    assert object_of(prompt) == noun


def test_every_generic_prompt_names_an_object_and_a_scene():
    names = SHIPPED.names
    for i, prompt in enumerate(generic_prompts(len(names))):
        assert object_of(prompt) == names[i * 37 % len(names)]
        assert prompt.endswith(nouns.SCENES[scene_of(prompt)])
