"""Tokenizer and text encoder of dinghy: one token per word of the world, pieces for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .preset import SHIPPED, Preset

MAX_LENGTH = 20
"""Tokens of a prompt, begin and end included."""

_END = "</w>"


def build_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair vocabulary and merges in which every word of ``words`` is a single token.

    Trained to exhaustion on the words themselves: a word
    that is not among them falls into known pieces and at worst into letters, never into nothing.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import BpeTrainer

    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")
    tokenizer = Tokenizer(BPE(end_of_word_suffix=_END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix=_END,
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(sorted(words), trainer)
    import json

    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = alphabet + [c + _END for c in alphabet] + [a + b for a, b in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return vocab, [(str(a), str(b)) for a, b in merges]


def build_tokenizer(preset: Preset = SHIPPED) -> Any:
    """The tokenizer of a preset: an ordinary ``transformers.CLIPTokenizer``."""
    from transformers import CLIPTokenizer

    # read, never rebuilt: BpeTrainer breaks ties by hash order, so every process would number the words anew
    committed = json.loads(Path(__file__).with_name(preset.vocabulary).read_text())
    vocab, merges = committed["vocab"], [tuple(pair) for pair in committed["merges"]]
    kind: Any = CLIPTokenizer  # its hints know merges as lines of text only
    return kind(
        vocab=vocab,
        merges=merges,
        unk_token="<|endoftext|>",  # noqa: S106
        bos_token="<|startoftext|>",  # noqa: S106
        eos_token="<|endoftext|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        model_max_length=MAX_LENGTH,
    )


def tokens(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Token ids ``[N, 20]`` int64 of prompts, padded and cut to the model's length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )["input_ids"]


def build_text_encoder(tokenizer: Any, width: int = 256, layers: int = 3) -> Any:
    """A freshly initialised CLIPTextModel, ``[B, 20] -> [B, 20, width]``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 4,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_text_encoder(base: Path) -> Any:
    """The text encoder of an exported base, in float32."""
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(base / "text_encoder")


def unknown_words(prompt: str, placeholders: Sequence[str] = ()) -> list[str]:
    """Words of ``prompt`` that no training caption held, in order; ``placeholders`` count as known."""
    known = SHIPPED.words()
    tokens = re.findall(r"<[^\s<>]+>|[^\W_]+(?:[-'][^\W_]+)*", prompt.lower())
    marks = {p.lower() for p in placeholders}
    return [t for t in tokens if t not in known and t not in marks]
