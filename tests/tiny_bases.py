"""Makes tiny base models of each layout with random weights, as local directories."""

from __future__ import annotations

from pathlib import Path

import torch

_TEXT = (
    "a an the of on in with photo picture drawing duck robot car dog cat red blue green yellow purple "
    "forest beach snow table grass desert city wood white black small big toy and sleeping running"
)
WORDS = tuple(_TEXT.split())
"""Every word is one token of the tiny tokenizers."""

MAX_LENGTH = 16
"""Tokens of a row of the tiny bases, begin and end included: 14 for the prompt."""


def tiny_tokenizer(pad_token: str = "<|endoftext|>"):
    """Each word is merged from its end, so that no word's merges disturb another word.

    Not trained: `BpeTrainer` breaks ties by hash order, another vocabulary in every process.
    """
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    merges = dict.fromkeys(
        (word[start], word[start + 1 :] + "</w>") for word in WORDS for start in range(len(word) - 2, -1, -1)
    )
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), pad_token]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(special, len(vocab))
    return CLIPTokenizer(
        vocab=vocab,
        merges=list(merges),
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token=pad_token,
        model_max_length=MAX_LENGTH,
    )


def _text_config(tokenizer, width: int, projection: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet_options(width: int) -> dict:
    return {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": width,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }


def save_tiny_sd(root: Path, *, prediction_type: str = "epsilon", vae: str = "kl") -> Path:
    """An SD1.5-layout directory on latents of 8×8.

    Its VAE: "kl" (factor 4, 32 px, 4 channels), "tiny" (AutoencoderTiny, factor 4, 32 px, 6 channels) or
    "deep" (AutoencoderKL, factor 8, 64 px, 16 channels).
    """
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    channels = {"kl": 4, "tiny": 6, "deep": 16}[vae]
    if vae != "tiny":
        widths = (8, 8, 16) if vae == "kl" else (8, 8, 8, 16)
        autoencoder = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=channels,
            norm_num_groups=4,
        )
    else:
        autoencoder = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            scaling_factor=0.7,
        )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 24, 24)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(in_channels=channels, out_channels=channels, **_unet_options(24)),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root)
    return root


def save_tiny_sdxl(root: Path) -> Path:
    """An SDXL-layout directory: two text encoders of different width, pooled embeddings, size ids."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(_text_config(first, 24, 24)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 16, 20)),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
            use_linear_projection=True,
            **_unet_options(24 + 16),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(root)
    return root
