"""The names that other tools give a base's layers.

Every name is built from the base's own modules and looked up whole: a name is never taken apart at its
underscores, where `to_q` and `attn1_to_q` cannot be told from one another. The names:

- diffusers: `unet.<module>`, `text_encoder.<module>`, `text_encoder_2.<module>`; older files write the
  UNet's modules without prefix, and attention layers as `….processor.to_q_lora`;
- PEFT: `base_model.model.<module>` of whichever model was wrapped;
- kohya: `lora_unet_<module>`, `lora_te_<module>` (`lora_te1_`, `lora_te2_` for two text encoders), dots
  written as underscores. SDXL's UNet goes by the names of the original latent-diffusion code there
  (`input_blocks_4_1_…`, Rombach et al. 2022).

Text encoders' modules are called with and without `text_model.`, as transformers did before and does since
version 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from mooring_server.engine.adapters import ALL_TARGETS, adaptable_layers, layer_shapes
from mooring_server.engine.model import BaseModel

_ATTENTION_PROCESSOR = ("to_q", "to_k", "to_v", "to_out")
_LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class LayerNames:
    """Layers by every name they go by.

    Args:
        shapes: adaptable layer → (out, in).
        kernels: convolution among them → (channels, height, width) of its kernels.
        known: foreign name → the layer's path in adapter files (`unet.….to_q`).
        kinds: path of every linear and convolution layer → "linear" or "convolution".
    """

    shapes: dict[str, tuple[int, int]]
    kernels: dict[str, tuple[int, ...]]
    known: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> str | None:
        """The layer's path; None for a name that this base has no layer for."""
        return self.known.get(name)

    def why_not(self, path: str) -> str | None:
        """What keeps a layer of the base from being adapted, in two words; None for an adaptable one."""
        if path in self.shapes:
            return None
        return (
            "convolution" if self.kinds[path] == "convolution" else "layer outside attention and feed-forward"
        )


def layer_names(base: BaseModel) -> LayerNames:
    """All names of all layers of a base that a low-rank adapter could be made for.

    Raises:
        AssertionError: two layers share a name, so that files could not be read unambiguously.
    """
    kernels = {
        path: tuple(module.weight.shape[1:])
        for path, module in adaptable_layers(base, ALL_TARGETS).items()
        if isinstance(module, nn.Conv2d)
    }
    names = LayerNames(layer_shapes(base), kernels)
    for module, kind in _layers(base.unet):
        path = f"unet.{module}"
        names.kinds[path] = kind
        flat = {f"lora_unet_{name}".replace(".", "_") for name in (module, _ldm_name(base.unet, module))}
        for name in {path, module, f"base_model.model.{module}", *_processor_names(path), *flat}:
            _add(names, name, path)
    for index, encoder in enumerate(base.text_encoders):
        prefix = f"text_encoder_{index + 1}" if index else "text_encoder"
        short = [f"lora_te{index + 1}_"] if index else ["lora_te_", "lora_te1_"]
        for module, kind in _layers(encoder):
            bare = module.removeprefix("text_model.")
            path = f"{prefix}.{bare}"
            names.kinds[path] = kind
            for written in (bare, f"text_model.{bare}"):
                _add(names, f"{prefix}.{written}", path)
                for start in short:
                    _add(names, start + written.replace(".", "_"), path)
                if index == 0:  # a wrapped model does not say which encoder it was
                    _add(names, f"base_model.model.{written}", path)
    return names


def _layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, "linear"
        elif isinstance(module, nn.Conv2d):
            yield name, "convolution"


def _add(names: LayerNames, name: str, path: str) -> None:
    other = names.known.setdefault(name, path)
    assert other == path, f"{name} names both {other} and {path}"


def _processor_names(path: str) -> Iterator[str]:
    """`….attn1.to_out.0` as `….attn1.processor.to_out_lora`."""
    parent, _, projection = path.removesuffix(".0").rpartition(".")
    if projection in _ATTENTION_PROCESSOR:
        yield f"{parent}.processor.{projection}_lora"
        yield f"{parent.removeprefix('unet.')}.processor.{projection}_lora"


def _ldm_name(unet: nn.Module, module: str) -> str:
    """A UNet module's name in the original latent-diffusion code; its own name where that has none."""
    if module in _LDM_OUTSIDE:
        return _LDM_OUTSIDE[module]
    parts = module.split(".")
    tail = ".".join(parts[4:])
    match parts:
        case ["down_blocks", block, "downsamplers", "0", "conv"]:
            return f"input_blocks.{(int(block) + 1) * _stride(unet)}.0.op"
        case ["down_blocks", block, ("resnets" | "attentions") as part, place, *_]:
            number = 1 + int(block) * _stride(unet) + int(place)
            return f"input_blocks.{number}.{_inner(part, tail)}"
        case ["up_blocks", block, "upsamplers", "0", "conv"]:
            after = 2 if hasattr(unet.get_submodule(f"up_blocks.{block}"), "attentions") else 1
            return f"output_blocks.{(int(block) + 1) * _stride(unet) - 1}.{after}.conv"
        case ["up_blocks", block, ("resnets" | "attentions") as part, place, *_]:
            number = int(block) * _stride(unet) + int(place)
            return f"output_blocks.{number}.{_inner(part, tail)}"
        case ["mid_block", "attentions", "0", *_]:
            return ".".join(["middle_block.1", *parts[3:]])
        case ["mid_block", "resnets", place, *_]:
            name = ".".join(parts[3:])
            return f"middle_block.{2 * int(place)}.{_LDM_RESNET.get(name, name)}"
        case _:
            return module


def _inner(part: str, tail: str) -> str:
    return f"0.{_LDM_RESNET.get(tail, tail)}" if part == "resnets" else f"1.{tail}"


def _stride(unet: nn.Module) -> int:
    """Numbers that a block takes: its layers and the resampler after them."""
    return int(unet.config.layers_per_block) + 1  # type: ignore[union-attr, arg-type]
