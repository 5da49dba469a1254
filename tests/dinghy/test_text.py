"""The tokenizer: one token per word of the world, nothing vanishes, placeholders survive a save."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.dinghy import nouns, unknown_words
from mooring_server.dinghy.preset import LARGE, PRESETS
from mooring_server.dinghy.text import MAX_LENGTH, build_text_encoder, build_tokenizer
from transformers import CLIPTokenizer

TOKENIZER = build_tokenizer(LARGE)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_word_of_a_preset_is_one_token(preset):
    tokenizer = build_tokenizer(preset)
    for word in preset.words():
        assert len(tokenizer.tokenize(word)) == 1, word


def test_the_large_vocabulary_keeps_room_for_more_words():
    for word in nouns.vocabulary_words():
        if word.isalpha():
            assert len(TOKENIZER.tokenize(word)) == 1, word


def test_building_is_deterministic():
    assert build_tokenizer(LARGE).get_vocab() == TOKENIZER.get_vocab()


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_unknown_words_fall_into_pieces_never_into_nothing(word):
    pieces = TOKENIZER.tokenize(word)
    assert "".join(pieces).replace("</w>", "") == word
    assert TOKENIZER.unk_token not in pieces


@given(st.lists(st.sampled_from(sorted(nouns.NAMED)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_known_prompts_decode_to_themselves(words):
    prompt = " ".join(words)
    ids = TOKENIZER(prompt)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True).strip() == prompt
    assert len(ids) == len(prompt.split()) + 2


def test_length_is_bounded_and_padded():
    encoded = TOKENIZER("cat " * 40, padding="max_length", truncation=True)
    assert len(encoded["input_ids"]) == MAX_LENGTH == TOKENIZER.model_max_length


def test_case_and_placeholders(tmp_path):
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("A CAT") == tokenizer.tokenize("a cat")
    assert tokenizer.add_tokens(["<rocket>"]) == 1
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.tokenize("a photo of a <rocket> toy") == tokenizer.tokenize("a photo of a <rocket> toy")
    assert "<rocket>" in again.tokenize("a <rocket> toy")
    assert again.model_max_length == MAX_LENGTH
    assert again.pad_token_id == again.eos_token_id


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of a cat in the snow", []),
        ("a xylophone in the snow", ["xylophone"]),
        ("A Cat, on the BEACH!", []),
        ("a <rocket> toy", ["<rocket>"]),
        ("some red grapes and two ice creams at night", []),
        ("several harpsichords at dawn", ["several", "harpsichords", "dawn"]),
        ("two penguins and a crown on the beach", []),
        ("", []),
    ],
)
def test_unknown_words_are_reported(prompt, expected):
    assert unknown_words(prompt) == expected


def test_text_encoder_reads_the_tokens():
    encoder = build_text_encoder(TOKENIZER, width=32, layers=1).eval()
    ids = TOKENIZER(["a cat", "a dog"], padding="max_length", return_tensors="pt")["input_ids"]
    out = encoder(ids)
    assert out.last_hidden_state.shape == (2, MAX_LENGTH, 32)
    assert not out.pooler_output[0].equal(out.pooler_output[1])


@pytest.mark.parametrize(
    ("noun", "determiner", "plural"),
    [
        ("mouse", "a", "mice"), ("sheep", "a", "sheep"), ("fish", "a", "fish"), ("box", "a", "boxes"),
        ("butterfly", "a", "butterflies"), ("monkey", "a", "monkeys"), ("peach", "a", "peaches"),
        ("paintbrush", "a", "paintbrushes"), ("maple leaf", "a", "maple leaves"), ("bus", "a", "buses"),
        ("unicorn", "a", "unicorns"), ("hourglass", "an", "hourglasses"), ("umbrella", "an", "umbrellas"),
        ("ice cream", "an", "ice creams"), ("hot dog", "a", "hot dogs"), ("wolf", "a", "wolves"),
        ("grapes", "some", ""), ("scissors", "some", ""), ("corn", "some", ""),
    ],
)  # fmt: skip
def test_nouns_have_the_right_determiner_and_plural(noun, determiner, plural):
    assert noun in nouns.NAMED
    assert nouns.article(noun) == determiner
    assert nouns.plural(noun) == plural


def test_a_colour_before_the_noun_decides_the_article():
    assert nouns.article("orange cat") == "an"
    assert nouns.article("red apple") == "a"
    assert nouns.article("orange grapes") == "some"


def test_no_object_is_named_twice_or_held_out():
    codes = [code for code, _ in nouns.NAMED.values()]
    assert len(nouns.NAMED) >= 256
    assert len(set(codes)) == len(codes)
    assert not set(codes) & (nouns.EXCLUDED_CODES | {s.code for s in nouns.HELD_OUT})
    assert not set(nouns.NAMED) & (set(nouns.TINTS) | set(nouns.PLAIN) | set(nouns.SCENES))
    assert set(nouns.PLURAL) | nouns.UNCOUNTABLE <= set(nouns.NAMED)
