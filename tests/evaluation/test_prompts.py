"""The prompt that base and judges get must be one and the same, with an adapter and without."""

from __future__ import annotations

import pytest
from mooring_server.evaluation.config import EvaluationConfig


@pytest.mark.parametrize("noun", ["bird", "animal"])
@pytest.mark.parametrize("prompt", ["a photo of a {} on the beach", "an {} at night", "two of a {}", "a dog"])
def test_base_prompt_is_the_same_with_and_without_a_placeholder(noun: str, prompt: str) -> None:
    with_one = EvaluationConfig(class_noun=noun, placeholder="<lobster>")
    without = EvaluationConfig(class_noun=noun)
    assert with_one.base_prompt(prompt) == without.base_prompt(prompt)


def test_articles_follow_the_word_after_them() -> None:
    assert EvaluationConfig(class_noun="animal").adapted_prompt("a {}") == "an animal"
    assert EvaluationConfig(class_noun="animal", placeholder="<x>").adapted_prompt("an {}") == "a <x> animal"
