"""Adapters as values and as files: low-rank factors and learned token embeddings for one base.

The file is one safetensors with diffusers' own key names (`unet.….to_q.lora_A.weight`), the scale folded into
B, so its LoRA part loads elsewhere as it is. Reading is strict and allocates nothing before the header has
been checked: size cap, allow-listed keys, shapes, dtypes, the base's digest, then finiteness. A key that this
base has no layer for is an error that names it: an adapter that silently does nothing is the most reported
fault of today's tools. `formats` converts the files of other makers. Left out: convolution layers.

Shape legend: r rank, n vectors of a placeholder, width of a text encoder's token embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mooring_server.errors import MooringError, Reason

if TYPE_CHECKING:
    from mooring_server.engine.model import BaseModel

FORMAT = "mooring.adapter.v1"
HEADER_KEY = "mooring"
"""The entry of the safetensors metadata that holds our header, as JSON."""

MAX_ADAPTER_BYTES = 512 * 2**20
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_LAYER = "text_encoder"
"""What the paths of text encoders' layers begin with: `text_encoder.…`, `text_encoder_2.…`."""
TARGETS = ("attention", "attention+ff", "attention+ff+text", "all")
"""Each one covers the layers of those before it."""
ALL_TARGETS = TARGETS[-1]
Adaptable = torch.nn.Linear | torch.nn.Conv2d
_TEXT_ENDINGS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
_UNET_LAYER = "unet."
_MAX_HEADER_BYTES = 8 * 2**20
FACTOR_DTYPES = frozenset({"F32", "F16", "BF16"})
"""What factors and embeddings may be stored as; they are read as float32."""
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4}
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_EMBEDDING = re.compile(r"embeddings\.(?P<index>[0-9]{1,9})\.(?P<encoder>[0-9])")
_SHOWN = 5
"""Offending keys named in a message; the rest is counted."""
_CLIP = 240
"""Characters of one name that are shown."""


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """ΔW = B·A of one layer, float32; LoRA's scale is folded into B.

    Args:
        A: `[r, in]`; of a convolution the kernels to r channels, flattened.
        B: `[out, r]`.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class LearnedEmbeddings:
    """Token embeddings of placeholder tokens.

    Args:
        tokens: placeholder → one `[n, width]` per text encoder, the same n in each.
    """

    tokens: Mapping[str, tuple[Tensor, ...]]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Vectors of each placeholder."""
        return {name: int(vectors[0].shape[0]) for name, vectors in self.tokens.items()}


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """What training yields, immutable.

    Args:
        base_digest: the base that the factors were trained on.
        rank: largest rank among the layers.
        layers: module path (`unet.….to_q`) → factors.
        embeddings: learned placeholder tokens, or None.
        metadata: short strings kept with the file (subject, method, certificate …); not part of the digest.
    """

    base_digest: str
    rank: int
    layers: Mapping[str, LayerFactors]
    embeddings: LearnedEmbeddings | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """`sha256:…` over base digest, names, shapes and float32 bytes of all tensors, in sorted order."""
        return self._digest(_tensors(self))

    @cached_property
    def has_text_layers(self) -> bool:
        """Whether it changes layers of a text encoder."""
        return any(layer.startswith(TEXT_LAYER) for layer in self.layers)

    @cached_property
    def text_digest(self) -> str:
        """As `digest`, over what changes prompts' embeddings alone: text-encoder layers, learned tokens.

        Adapters of one text digest encode every prompt alike; "" encodes them as the base does.
        """
        text = {key: tensor for key, tensor in _tensors(self).items() if not key.startswith(_UNET_LAYER)}
        return self._digest(text) if text else ""

    def _digest(self, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(f"{FORMAT}\0{self.base_digest}\0".encode())
        for key, tensor in sorted(tensors.items()):
            digest.update(f"{key}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.numpy().tobytes())
        for name in sorted(self.embeddings.tokens if self.embeddings else ()):
            digest.update(f"{name}\0".encode())
        return "sha256:" + digest.hexdigest()


@dataclass(frozen=True)
class _Header:
    """What an adapter file says about itself."""

    format: str
    base_digest: str
    placeholders: list[str]
    metadata: dict[str, str]


def layer_shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Every layer of the base that an adapter may change → (out, in), see `matrix_shape`."""
    return {name: matrix_shape(module) for name, module in adaptable_layers(base, ALL_TARGETS).items()}


def matrix_shape(module: Adaptable) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix; a convolution's in is channels × kernel height × width."""
    return module.weight.shape[0], module.weight[0].numel()


def adaptable_layers(base: BaseModel, targets: str = "attention+ff") -> dict[str, Adaptable]:
    """The layers that adapters may change, by the path used in adapter files.

    Args:
        base: the base model.
        targets: one of `TARGETS`: "attention" (to_q, to_k, to_v, to_out of the UNet's transformer blocks),
            "attention+ff" (also their feed-forward layers), "attention+ff+text" (also attention and
            feed-forward of the text encoders), "all" (also every other linear layer and convolution of the
            UNet).

    Raises:
        ValueError: for another `targets`.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets are one of {', '.join(TARGETS)}, not {targets!r}")
    endings: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    if targets != "attention":
        endings = (*endings, "ff.net.0.proj", "ff.net.2")
    found: dict[str, Adaptable] = {
        f"unet.{name}": module
        for name, module in base.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name and name.endswith(endings)
    }
    for index, encoder in enumerate(base.text_encoders if targets in TARGETS[2:] else ()):
        prefix = f"{TEXT_LAYER}_{index + 1}" if index else TEXT_LAYER
        found |= {
            f"{prefix}.{name.removeprefix('text_model.')}": module
            for name, module in encoder.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(_TEXT_ENDINGS)
        }
    if targets == ALL_TARGETS:
        others = {
            f"{_UNET_LAYER}{name}": module
            for name, module in base.unet.named_modules()
            if isinstance(module, torch.nn.Linear)
            or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
        }
        found |= {name: module for name, module in others.items() if name not in found}
    return found


def to_safetensors(weights: AdapterWeights) -> bytes:
    """Serialise an adapter (inverse: `from_safetensors`); equal weights and metadata give equal bytes."""
    from safetensors.torch import save

    header = {
        "format": FORMAT,
        "base_digest": weights.base_digest,
        "digest": weights.digest,
        "placeholders": sorted(weights.embeddings.tokens) if weights.embeddings else [],
        "metadata": dict(weights.metadata),
    }
    # one metadata entry: safetensors writes several of them in an order that differs from call to call
    return bytes(save(_tensors(weights), metadata={HEADER_KEY: json.dumps(header, sort_keys=True)}))


def from_safetensors(
    data: bytes, base: BaseModel, *, max_bytes: int = MAX_ADAPTER_BYTES, max_rank: int | None = None
) -> AdapterWeights:
    """Read an adapter file that must fit this base.

    Args:
        data: the whole file.
        base: the base it is for.
        max_bytes: larger files are refused unread.
        max_rank: larger ranks are refused; None for no limit.

    Raises:
        MooringError: ADAPTER_TOO_LARGE, ADAPTER_KEYS_UNMATCHED (not such a file, unknown or unpaired keys,
            shapes, dtypes), BASE_DIGEST_MISMATCH, ADAPTER_RANK_TOO_LARGE, ADAPTER_NOT_FINITE.
    """
    if len(data) > max_bytes:
        raise too_large(len(data), max_bytes)
    entries, metadata = read_header(data)
    header = _header(metadata.get(HEADER_KEY))
    if header.base_digest != base.digest:
        raise MooringError(
            Reason.BASE_DIGEST_MISMATCH,
            f"The adapter was trained on base {clipped(header.base_digest)}, this server runs {base.digest}.",
            remedy="Train it again on this base, or serve the base it belongs to.",
            metadata={"expected": base.digest, "found": clipped(header.base_digest)},
        )
    placeholders = header.placeholders
    ranks = _check_entries(entries, base, placeholders)
    rank = max(ranks.values(), default=0)
    if max_rank is not None and rank > max_rank:
        raise rank_too_large(rank, max_rank)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = {key: tensor.float() for key, tensor in load(data).items()}
    except SafetensorError as error:
        raise unmatched(f"The file is damaged: {clipped(str(error))}.") from error
    require_finite(tensors)
    embeddings = {
        name: tuple(tensors[f"embeddings.{index}.{encoder}"] for encoder in range(len(base.text_encoders)))
        for index, name in enumerate(placeholders)
    }
    return AdapterWeights(
        base_digest=base.digest,
        rank=rank,
        layers={
            layer: LayerFactors(tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"])
            for layer in ranks
        },
        embeddings=LearnedEmbeddings(embeddings) if embeddings else None,
        metadata=header.metadata,
    )


def export_diffusers(weights: AdapterWeights, base: BaseModel | None = None) -> dict[str, bytes]:
    """Files that `load_lora_weights` and `load_textual_inversion` take.

    The scale is folded into B, so no alpha is written: diffusers then takes alpha = rank, a scale of 1.

    Args:
        weights: the adapter.
        base: gives the kernels of convolutions their shape; needed for an adapter that changes some.

    Returns:
        File name → content: `pytorch_lora_weights.safetensors`; per placeholder and text encoder a
        `learned_embeds….safetensors` (the first one without suffix, as diffusers looks for it); `README.txt`
        with the lines that load them.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    known = {} if base is None else adaptable_layers(base, ALL_TARGETS)
    for layer, factors in weights.layers.items():
        component, _, path = layer.partition(".")
        # text encoders' modules by their older name: diffusers takes it with every version of transformers
        name = layer if f"{component}." == _UNET_LAYER else f"{component}.text_model.{path}"
        A, B = (factor.detach().float().cpu().contiguous() for factor in (factors.A, factors.B))
        if isinstance(module := known.get(layer), torch.nn.Conv2d):
            A, B = A.reshape(-1, *module.weight.shape[1:]), B[:, :, None, None]
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B.contiguous()
    files = {LORA_FILE: bytes(save(tensors, metadata={"format": "pt"}))}
    lines = [f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")']
    for index, name in enumerate(sorted(weights.embeddings.tokens) if weights.embeddings else ()):
        assert weights.embeddings is not None
        for encoder, vectors in enumerate(weights.embeddings.tokens[name]):
            file = _embedding_file(name, index, encoder)
            files[file] = bytes(save({name: vectors.detach().float().cpu().contiguous()}))
            which = f"text_encoder{f'_{encoder + 1}' if encoder else ''}"
            which = (
                f", text_encoder=pipe.{which}, tokenizer=pipe.{which.replace('text_encoder', 'tokenizer')}"
            )
            lines.append(
                f'pipe.load_textual_inversion(folder, weight_name="{file}"{which if encoder else ""})'
            )
    files["README.txt"] = _readme(weights, lines).encode()
    return files


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinity.

    Raises:
        MooringError: ADAPTER_NOT_FINITE, naming the keys.
    """
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise MooringError(
            Reason.ADAPTER_NOT_FINITE,
            f"The adapter holds NaN or infinite values in {listed(bad)}.",
            remedy="Train it again with a lower learning rate, or repair the file.",
        )


def rank_too_large(rank: int, limit: int) -> MooringError:
    """The error for an adapter whose rank exceeds the bank's."""
    return MooringError(
        Reason.ADAPTER_RANK_TOO_LARGE,
        f"The adapter has rank {rank}; this server's slots hold rank {limit}.",
        remedy=f"Train with rank {limit} or less, or start the server with rank {rank}.",
        metadata={"rank": str(rank), "limit": str(limit)},
    )


def _tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    """File keys → contiguous float32 CPU tensors."""
    named: dict[str, Tensor] = {}
    for layer, factors in weights.layers.items():
        named[f"{layer}.lora_A.weight"] = factors.A
        named[f"{layer}.lora_B.weight"] = factors.B
    if weights.embeddings is not None:
        for index, name in enumerate(sorted(weights.embeddings.tokens)):
            for encoder, vectors in enumerate(weights.embeddings.tokens[name]):
                named[f"embeddings.{index}.{encoder}"] = vectors
    return {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in named.items()}


def too_large(size: int, limit: int) -> MooringError:
    """The error for a file, or its float32 form, that exceeds the limit; both in bytes."""
    return MooringError(
        Reason.ADAPTER_TOO_LARGE,
        f"The file has {size} bytes; adapters may have {limit}.",
        remedy="Use a smaller rank or fewer layers, or raise the server's max_adapter_bytes.",
        metadata={"size": str(size), "limit": str(limit)},
    )


def read_header(data: bytes) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """Key → (dtype, shape) and the metadata of a safetensors file, without touching the tensors.

    Raises:
        MooringError: ADAPTER_KEYS_UNMATCHED for other files, and for tensors larger than the file.
    """
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 < length <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise unmatched("The file is no safetensors file: its header length is impossible.")
    try:
        document: dict[str, Any] = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
        metadata = {str(key): str(value) for key, value in document.pop("__metadata__", {}).items()}
        entries = {
            str(key): (clipped(str(entry["dtype"])), [int(size) for size in entry["shape"]])
            for key, entry in document.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise unmatched(f"The file is no safetensors file: {clipped(str(error))}.") from error
    # none beyond the file: products of larger ones have more digits than Python prints
    if any(not 0 <= size <= len(data) for _, shape in entries.values() for size in shape):
        raise unmatched("The file declares sizes that no tensor of it can have.")
    declared = sum(_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in entries.values())
    if declared > len(data) - 8 - length:
        raise unmatched(f"The file declares {declared} bytes of tensors and has {len(data) - 8 - length}.")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a name twice could be read as another one than was checked."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _check_entries(
    entries: Mapping[str, tuple[str, list[int]]], base: BaseModel, placeholders: Sequence[str]
) -> dict[str, int]:
    """Match every key with the base; gives each layer's rank."""
    expected = layer_shapes(base)
    ranks: dict[str, dict[str, int]] = {}
    unknown: list[str] = []
    wrong: list[str] = []
    for key, (dtype, shape) in entries.items():
        factor, embedding = _FACTOR.fullmatch(key), _EMBEDDING.fullmatch(key)
        if dtype not in FACTOR_DTYPES or len(shape) != 2:
            wrong.append(f"{key} ({dtype} {shape}, expected a floating-point matrix)")
        elif factor and factor["layer"] in expected:
            out, in_ = expected[factor["layer"]]
            rank, width, wanted = (*shape, in_) if factor["factor"] == "A" else (*reversed(shape), out)
            ranks.setdefault(factor["layer"], {})[factor["factor"]] = rank
            if width != wanted or rank < 1:
                wrong.append(f"{key} ({shape}, expected {wanted} beside the rank)")
        elif embedding and int(embedding["index"]) < len(placeholders):
            encoder = int(embedding["encoder"])
            if encoder >= len(base.text_encoders):
                unknown.append(key)
            elif shape[1] != base.embedding_width(encoder) or shape[0] < 1:
                wrong.append(f"{key} ({shape}, expected {base.embedding_width(encoder)} columns)")
        else:
            unknown.append(key)
    if unknown:
        raise unmatched(f"This base has nothing that matches {listed(unknown)}.", keys=unknown)
    if wrong:
        raise unmatched(f"These tensors do not fit this base: {listed(wrong)}.", keys=wrong)
    unpaired = [layer for layer, found in ranks.items() if len(found) != 2 or found["A"] != found["B"]]
    if unpaired:
        raise unmatched(
            f"Factors A and B are missing or differ in rank for {listed(unpaired)}.", keys=unpaired
        )
    for index, name in enumerate(placeholders):
        keys = [f"embeddings.{index}.{encoder}" for encoder in range(len(base.text_encoders))]
        if any(key not in entries for key in keys) or len({entries[key][1][0] for key in keys}) != 1:
            raise unmatched(f"The placeholder {clipped(name)} lacks equal embeddings for every text encoder.")
    return {layer: found["A"] for layer, found in ranks.items()}


def _header(text: str | None) -> _Header:
    """Parse and check our metadata entry."""
    if text is None:
        raise unmatched(f"The file carries no “{HEADER_KEY}” metadata, so it is no adapter of Mooring's.")
    try:
        document = json.loads(text)
        found = _Header(
            str(document["format"]),
            str(document["base_digest"]),
            [str(name) for name in document["placeholders"]],
            {str(key): str(value) for key, value in document["metadata"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unmatched(f"The file's metadata is damaged: {clipped(repr(error))}.") from error
    if found.format != FORMAT:
        raise unmatched(f"The file's format is {clipped(found.format)}, not {FORMAT}.")
    if len(set(found.placeholders)) != len(found.placeholders) or not all(map(str.strip, found.placeholders)):
        raise unmatched("The file's list of placeholders is damaged.")
    return found


def listed(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = shown_keys(names)
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def shown_keys(names: Sequence[str]) -> str:
    """The first few names, separated by commas."""
    return ", ".join(clipped(name) for name in names[:_SHOWN])


def clipped(text: str) -> str:
    """Text out of a stranger's file as it can stand in a message: short, and without control characters."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= _CLIP else plain[: _CLIP - 1] + "…"


def unmatched(
    message: str,
    *,
    keys: Sequence[str] = (),
    remedy: str = "Use an adapter that was made for this base by Mooring.",
) -> MooringError:
    """The error for a file whose keys or shapes are not those of the base."""
    return MooringError(
        Reason.ADAPTER_KEYS_UNMATCHED,
        message,
        remedy=remedy,
        metadata={"keys": shown_keys(keys), "count": str(len(keys))} if keys else None,
    )


def _embedding_file(name: str, index: int, encoder: int) -> str:
    suffix = f".{re.sub(r'[^A-Za-z0-9_-]', '', name) or index}" if index else ""
    return f"learned_embeds{f'_{encoder + 1}' if encoder else ''}{suffix}.safetensors"


def _readme(weights: AdapterWeights, lines: list[str]) -> str:
    tokens = ", ".join(sorted(weights.embeddings.tokens)) if weights.embeddings else "none"
    loading = "\n".join(f"    {line}" for line in lines)
    return (
        "Adapter exported by Mooring\n\n"
        f"digest      {weights.digest}\nbase        {weights.base_digest}\nrank        {weights.rank}\n"
        f"placeholder {tokens}\n\n"
        "With a diffusers pipeline `pipe` of the same base model and this folder's path in `folder`:\n\n"
        f"{loading}\n"
    )
