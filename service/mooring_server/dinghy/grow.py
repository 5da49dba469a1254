"""Starts a preset's models from the exported ones of a smaller: fewer words, fewer channels, half the side.

What the small model has learnt keeps its place and what is new starts at zero, so that the grown model draws
at once about what the small one drew (larger, without the new detail), and training goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import codec, judges, nouns, patches, text
from .preset import Preset
from .t2i import build_unet, load_unet


def widen(state: dict[str, Tensor], model: nn.Module) -> None:
    """Load ``state`` into ``model``, each tensor into the corner of its own; the rest of it becomes zero.

    Raises:
        ValueError: a tensor is missing or larger than the model's, or has another number of axes.
    """
    grown = {}
    for name, own in model.state_dict().items():
        small = state.get(name)
        if (
            small is None
            or small.ndim != own.ndim
            or any(s > o for s, o in zip(small.shape, own.shape, strict=True))
        ):
            found = "nothing" if small is None else tuple(small.shape)
            raise ValueError(f"{name}: {found} does not fit into {tuple(own.shape)}")
        grown[name] = torch.zeros_like(own)
        grown[name][tuple(slice(n) for n in small.shape)] = small
    model.load_state_dict(grown)


def name_plurals(embedding: Tensor, tokenizer: Any, preset: Preset, first: int) -> None:
    """Let the words of plurals from id ``first`` on mean what their singulars mean; the rest a mean token.

    ``embedding`` is ``[tokens, width]``, changed in place.
    """
    embedding[first:] = embedding[:first].mean(0)
    for noun in preset.names:
        for one, many in zip(noun.split(), nouns.plural(noun).split(), strict=False):
            pieces = tokenizer(many, add_special_tokens=False)["input_ids"]
            if len(pieces) == 1 and pieces[0] >= first:
                own = tokenizer(one, add_special_tokens=False)["input_ids"]
                embedding[pieces[0]] = embedding[own].mean(0)


def unet(small: Path, preset: Preset) -> Any:
    """The preset's UNet from that of the exported base ``small``."""
    model = build_unet(preset)
    widen(load_unet(small).state_dict(), model)
    return model


def text_encoder(small: Path, preset: Preset) -> Any:
    """The preset's text encoder from that of the exported base ``small``, whose tokens keep their numbers."""
    known = text.load_text_encoder(small)
    tokenizer = text.build_tokenizer(preset)
    model = text.build_text_encoder(tokenizer)
    widen(known.state_dict(), model)
    with torch.no_grad():
        name_plurals(model.get_input_embeddings().weight, tokenizer, preset, known.config.vocab_size)
    return model


def clip(small: Path, preset: Preset) -> Any:
    """The preset's dinghy-clip from the exported one ``small``, whose tokens keep their numbers."""
    from transformers import CLIPConfig

    known, tokenizer = judges.load_clip(small), text.build_tokenizer(preset)
    # its own depth, which need not be the one that the recipe builds today
    config, words = known.config.to_dict(), known.config.text_config.vocab_size
    config["text_config"]["vocab_size"] = len(tokenizer)
    model = type(known)(CLIPConfig.from_dict(config))
    widen(known.state_dict(), model)
    with torch.no_grad():
        name_plurals(model.text_model.embeddings.token_embedding.weight, tokenizer, preset, words)
    return model


def vae(small: Path, preset: Preset, pixels: Tensor) -> Any:
    """The preset's patch codec from that of the exported base ``small``, which halves once less often.

    The PCA of the new channels is fitted on ``pixels`` ``[N, 3, px, px]`` in [0, 1]. The decoder sees what
    the small one sees, every cell of its last layers four times.
    """
    known = codec.load(small)
    half = patches.read_pca(known)
    model = patches.build_vae(patches.fit_pca(pixels, preset.halvings, preset.channels, half))
    old, new = list(known.decoder.layers), list(model.decoder.layers)
    # the last two layers of the new one: a convolution at the new size, which passes everything on, and the
    # convolution to pixels; before them the old layers with one more doubling
    enlarge, to_pixels = new[-2:]
    for mine, theirs in zip([*new[: len(old) - 1], to_pixels], old, strict=True):
        if mine.state_dict():
            widen(theirs.state_dict(), mine)
    with torch.no_grad():
        nn.init.dirac_(enlarge.weight)
    return model
