"""Bases that the engine's benchmarks run on, and diffusers pipelines on the very same weights.

dinghy ships with Mooring. "sd15" and "sdxl" are random weights in the shapes of Stable Diffusion 1.5 and XL:
how long a step takes does not depend on what the weights know, and nothing has to be downloaded. "sdxl-small"
is XL with 2 instead of 10 transformer blocks a level and 4 text layers, for machines without a GPU. Their
images are noise; that ours equal the peer's is checked on them all the same.

A peer that changes modules (PEFT, diffusers' LoRA loader) gets modules of its own whose tensors are ours, so
that a base is in memory once.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mooring_server import dinghy
from mooring_server.engine.base import BaseModel, load_base
from torch import nn

SHAPES = ("dinghy", "sd15", "sdxl", "sdxl-small")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def load(name: str, *, device: str = "cpu", dtype: str = "float32") -> BaseModel:
    """A base of `SHAPES`, or one from a directory.

    Args:
        name: one of `SHAPES`, or a directory in diffusers layout.
        device: torch device.
        dtype: "float32" or "bfloat16", of UNet and text encoders.
    """
    if name in SHAPES[1:]:
        return _random(name, device, _DTYPES[dtype])
    return load_base(dinghy.base_dir() if name == "dinghy" else name, device=device, dtype=_DTYPES[dtype])


def directory(name: str, base: BaseModel, folder: Path) -> Path:
    """Where a server finds the base; random ones are written to `folder`."""
    if name == "dinghy":
        return dinghy.base_dir()
    if name not in SHAPES:
        return Path(name)
    pipeline(base, shared=False).save_pretrained(folder)
    return folder


def prompts(base: BaseModel) -> list[str]:
    """Prompts without a subject that this base can read to their end."""
    return [p for p in dinghy.generic_prompts() if not base.check_prompt(p).cut] or ["a photo of a dog"]


def twin(module: nn.Module) -> Any:
    """The same module structure anew, on the same tensors and without our hooks."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, shared)
    for part in made.modules():
        part._forward_hooks.clear()  # noqa: SLF001 - hooks are copied with a module and would run twice
    return made


def pipeline(base: BaseModel, *, shared: bool = True) -> Any:
    """A diffusers pipeline on a base's weights, with its DDIM scheduler and a silent progress bar.

    Args:
        base: the base.
        shared: on twins of UNet and text encoders, for peers that change modules; else on ours themselves.
    """
    import diffusers

    kinds: Any = diffusers  # ships no types
    own = twin if shared else lambda module: module
    # diffusers hands the VAE latents in the pipeline's dtype; ours keeps its VAE in float32
    vae = base.vae if base.dtype == torch.float32 else copy.deepcopy(base.vae).to(base.dtype)
    parts: dict[str, Any] = {
        "vae": vae,
        "unet": own(base.unet),
        "scheduler": base.new_scheduler("ddim"),
        "text_encoder": own(base.text_encoders[0]),
        "tokenizer": copy.deepcopy(base.tokenizers[0]),  # a call leaves its padding switched on in the object
    }
    if base.kind == "sdxl":
        made = kinds.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=own(base.text_encoders[1]),
            tokenizer_2=copy.deepcopy(base.tokenizers[1]),
            force_zeros_for_empty_prompt=base.zero_negative,
            add_watermarker=False,
        )
    else:
        made = kinds.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def _random(name: str, device: str, dtype: torch.dtype) -> BaseModel:
    """Random weights in a network's shapes; the same on every call on one kind of device."""
    import diffusers
    import transformers

    networks: Any = diffusers  # ships no types
    texts: Any = transformers
    # any tokenizer will do: tokens are drawn from a small vocabulary, rows have the usual 77
    tokenizer = texts.CLIPTokenizer.from_pretrained(dinghy.base_dir() / "tokenizer", model_max_length=77)
    torch.manual_seed(0)
    xl = name.startswith("sdxl")
    with torch.device(device):
        unet_options = dict(_SDXL_UNET if xl else _SD15_UNET)
        if name == "sdxl-small":
            unet_options["transformer_layers_per_block"] = (1, 2, 2)
        unet = networks.UNet2DConditionModel(in_channels=4, out_channels=4, **unet_options).to(dtype)
        vae = networks.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.13025 if xl else 0.18215,
        )
        encoders = [texts.CLIPTextModel(_text(tokenizer, 768, 12, 768)).to(dtype)]
        if xl:
            second = texts.CLIPTextModelWithProjection(
                _text(tokenizer, 1280, 4 if name == "sdxl-small" else 32, 1280)
            )
            encoders.append(second.to(dtype))
    return BaseModel(
        kind="sdxl" if xl else "sd",
        digest=f"sha256:random-{name}",
        unet=unet,
        text_encoders=encoders,
        tokenizers=[tokenizer] * len(encoders),
        vae=vae,
        scheduler_config=_SCHEDULER,
        zero_negative=xl,
    )


def _text(tokenizer: Any, width: int, layers: int, projection: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


_SD15_UNET = {
    "sample_size": 64,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
_SDXL_UNET = {
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
