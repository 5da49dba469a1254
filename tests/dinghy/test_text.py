"""The tokenizer: one token per word of the world, nothing vanishes, placeholders survive a save."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.dinghy import nouns, unknown_words
from mooring_server.dinghy.text import MAX_LENGTH, build_text_encoder, build_tokenizer
from transformers import CLIPTokenizer

TOKENIZER = build_tokenizer()


def test_every_word_is_one_token():
    for word in nouns.vocabulary_words():
        if word.isalpha():
            assert len(TOKENIZER.tokenize(word)) == 1, word


def test_building_is_deterministic():
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


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
    assert len(ids) == len(words) + 2


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
