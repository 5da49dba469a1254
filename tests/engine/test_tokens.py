"""Prompts become the tokens that the tokenizer itself gives; placeholders stay outside of it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mooring_server.engine.tokens import PromptTokenizer, words_of
from tiny_bases import MAX_LENGTH, WORDS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OURS = PromptTokenizer(tiny_tokenizer(), MAX_LENGTH)
PROMPTS = st.lists(
    st.sampled_from([*WORDS, "Duck", "xyzzy", "7", "it's", "é", "  ", ","]), max_size=MAX_LENGTH - 2
).map(" ".join)


@given(PROMPTS | st.text(max_size=12))
@example("\x1f")  # blank to Python, a token to the tokenizer
@example("")
@example("  ")
def test_rows_without_placeholders_are_the_tokenizers_own(prompt):
    tokens = OURS.tokenize(prompt, {})
    expected = TOKENIZER(prompt, padding="max_length", max_length=MAX_LENGTH, truncation=True)
    if len(tokens.ids) <= OURS.limit:
        assert OURS.row(tokens) == (expected.input_ids, expected.attention_mask)
    else:
        assert len(TOKENIZER(prompt).input_ids) > MAX_LENGTH


@given(st.lists(st.sampled_from(WORDS), max_size=4), st.lists(st.sampled_from(WORDS), max_size=4))
def test_a_placeholder_takes_one_position_per_vector(before, after):
    prompt = " ".join([*before, "<it>", *after])
    tokens = OURS.tokenize(prompt, {"<it>": 3})
    assert tokens.learned == [(len(before) + k, "<it>", k) for k in range(3)]
    assert len(tokens.ids) == len(before) + 3 + len(after)
    plain = OURS.tokenize(" ".join([*before, *after]), {}).ids
    assert tokens.ids[: len(before)] + tokens.ids[len(before) + 3 :] == plain


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a <it> on grass", ["<it>"]),
        ("a <IT>, red", ["<it>"]),
        ("<it><it>", ["<it>", "<it>"]),
        ("sks and tasks", ["sks"]),
        ("a <it-2> and <it>", ["<it-2>", "<it>"]),
        ("it <its> it>", []),
    ],
)
def test_placeholders_are_whole_words_in_any_case(prompt, found):
    tokens = OURS.tokenize(prompt, {"<it>": 1, "<it-2>": 1, "sks": 1})
    assert [name for _, name, _ in tokens.learned] == found


def test_spans_point_into_the_prompt():
    prompt = "a  red <it> Duck"
    tokens = OURS.tokenize(prompt, {"<it>": 2})
    assert [prompt[left:right] for left, right in tokens.spans] == ["a", "red", "<it>", "<it>", "Duck"]


def test_words_without_any_token_are_reported_once():
    assert OURS.tokenize("a naïve duck, naïve", {}).unknown == ["naïve"]


def test_words_of_a_prompt_leave_placeholders_out():
    assert words_of("A T-shirt with <it>, it's red", {"<it>": 1}) == ["a", "t-shirt", "with", "it's", "red"]
