"""Adapters made elsewhere: files of diffusers, PEFT and kohya, and learned token embeddings.

    W + (alpha / r)·B·A,  and alpha / sqrt(r) with rank-stabilised scaling (Kalajdzievski 2023)

is what all of them mean; here the factor is folded into B. Where the alpha comes from differs: kohya keeps a
tensor per layer (none means alpha = r), PEFT keeps it in `adapter_config.json`, diffusers in the file's
metadata, or nowhere, which means alpha = r.

Every tensor must find its layer, whatever the format: one that does not is an error that names it. Keys,
shapes, dtypes and sizes are checked on the header before a tensor is read; pickles are never opened. A file
tells nothing certain about its base, so shapes are all that is checked: an adapter of another model of the
same architecture is taken, and draws what it draws.

Left out: LoHa, LoKr, DoRA and other updates that are not B·A; layers that the engine has no hook for. They
are refused by name, never skipped.

Shape legend: r rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mooring_server.engine.adapters import (
    FACTOR_DTYPES,
    HEADER_KEY,
    AdapterWeights,
    LayerFactors,
    LearnedEmbeddings,
    from_safetensors,
    listed,
    rank_too_large,
    read_header,
    require_finite,
    shown_keys,
    too_large,
    unmatched,
)
from mooring_server.engine.embedding_files import (
    EMBEDDING_KEYS,
    Entries,
    load_tensors,
    read_embeddings,
    unfit,
)
from mooring_server.engine.layer_names import LayerNames, layer_names
from mooring_server.engine.lora_settings import LoraSettings, from_diffusers, from_peft
from mooring_server.engine.model import BaseModel
from mooring_server.errors import MooringError, Reason

MAX_FILES = 8
CONFIG_FILE = "adapter_config.json"
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_MAX_CONFIG_BYTES = 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ALPHA_DTYPES = FACTOR_DTYPES | {"F64", "I64", "I32"}
_KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"(?P<A>(?:\.lora_A(?:\.default)?|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|(?<=_lora)\.down)\.weight)|"
    r"(?P<B>(?:\.lora_B(?:\.default)?|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|(?<=_lora)\.up)\.weight)|"
    r"(?P<alpha>\.alpha))"
)
_OTHER_KINDS = re.compile(
    r"\.(hada_|lokr_|oft_|oft_blocks|lora_mid|dora_scale|lora_magnitude_vector|lora_embedding_|ia3_|"
    r"diff|diff_b|w_norm|b_norm|boft_|glora_)"
)


class SourceFormat(StrEnum):
    """What a file was recognised as."""

    NATIVE = "native"
    DIFFUSERS = "diffusers"
    PEFT = "peft"
    KOHYA = "kohya"
    TEXTUAL_INVERSION = "textual_inversion"


@dataclass(frozen=True)
class Imported:
    """An adapter made elsewhere, converted.

    Args:
        weights: the adapter.
        format: what its file was; TEXTUAL_INVERSION when there were embeddings alone.
        digest: `sha256:…` over the names and SHA-256 of all files, in sorted order.
    """

    weights: AdapterWeights
    format: SourceFormat
    digest: str


@dataclass(frozen=True)
class _Files:
    """Sorted by what they hold.

    Args:
        headers: of every safetensors file: (key → (dtype, shape), metadata).
        config: PEFT's settings.
        factors: name of the file of factors.
        embeddings: names of the files of embeddings.
    """

    headers: Mapping[str, tuple[Entries, dict[str, str]]]
    config: Mapping[str, Any] | None
    factors: str | None
    embeddings: Sequence[str]


@dataclass
class _Layer:
    """Keys of one layer's tensors in the file."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)
    rank: int = 0


def convert(
    files: Mapping[str, bytes],
    base: BaseModel,
    *,
    placeholder: str = "",
    max_bytes: int,
    max_rank: int | None = None,
) -> Imported:
    """Convert an adapter of another tool, or Mooring's own file.

    Args:
        files: name → content: at most one file of factors, with `adapter_config.json` beside a PEFT one, and
            files of learned embeddings (`….safetensors`, the second text encoder's named `…_2.…`).
        base: the base that it must fit.
        placeholder: the word of learned embeddings whose file does not name one, or instead of the one that
            it names; "" keeps the file's.
        max_bytes: limit of the files together, and of the adapter as float32.
        max_rank: larger ranks are refused; None for no limit.

    Raises:
        MooringError: ADAPTER_TOO_LARGE; ADAPTER_NOT_SUPPORTED (pickles, other kinds of adapters, layers that
            cannot be adapted, settings that are not plain LoRA); ADAPTER_KEYS_UNMATCHED (unknown or unpaired
            keys, shapes, dtypes, damaged files); ADAPTER_RANK_TOO_LARGE; ADAPTER_NOT_FINITE;
            BASE_DIGEST_MISMATCH for Mooring's own file of another base.
    """
    size = sum(map(len, files.values()))
    if size > max_bytes:
        raise too_large(size, max_bytes)
    sorted_files = _sort(files)
    found = SourceFormat.TEXTUAL_INVERSION
    layers: dict[str, LayerFactors] = {}
    if sorted_files.factors is not None:
        entries, metadata = sorted_files.headers[sorted_files.factors]
        if HEADER_KEY in metadata:
            return _native(files, sorted_files.factors, base, max_bytes, max_rank)
        found = _recognise(entries)
        settings = _settings(found, sorted_files, metadata)
        layers = _factors(files[sorted_files.factors], entries, settings, base, max_bytes, max_rank)
    vectors = (
        read_embeddings(
            {name: (files[name], sorted_files.headers[name][0]) for name in sorted_files.embeddings},
            base,
            placeholder,
        )
        if sorted_files.embeddings
        else {}
    )
    return Imported(
        AdapterWeights(
            base_digest=base.digest,
            rank=max((factors.A.shape[0] for factors in layers.values()), default=0),
            layers=layers,
            embeddings=LearnedEmbeddings(vectors) if vectors else None,
        ),
        found,
        source_digest(files),
    )


def source_digest(files: Mapping[str, bytes]) -> str:
    """`sha256:…` over the names and SHA-256 of all files, in sorted order."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\0".encode())
    return "sha256:" + digest.hexdigest()


# ---------------------------------------------------------------------------------------------- files


def _sort(files: Mapping[str, bytes]) -> _Files:
    """Tell the files apart by their headers."""
    if not files:
        raise _unsupported("There is no file.", remedy="Send a .safetensors file.")
    if len(files) > MAX_FILES:
        raise _unsupported(f"There are {len(files)} files.", remedy=f"Send at most {MAX_FILES}.")
    headers: dict[str, tuple[Entries, dict[str, str]]] = {}
    factors: list[str] = []
    embeddings: list[str] = []
    for name, data in sorted(files.items()):
        if name == CONFIG_FILE:
            continue
        _refuse_pickle(name, data)
        entries, metadata = read_header(data)
        headers[name] = entries, metadata
        if not entries:
            raise unfit(f"{name!r} holds no tensors.")
        foreign = HEADER_KEY not in metadata
        (embeddings if foreign and _is_embedding(entries) else factors).append(name)
    if len(factors) > 1:
        raise _unsupported(
            f"Several files hold factors: {listed(factors)}.", remedy="Import them one by one."
        )
    if not headers:
        raise _unsupported(f"{CONFIG_FILE} came alone.", remedy="Send adapter_model.safetensors with it.")
    config = _json(CONFIG_FILE, files[CONFIG_FILE]) if CONFIG_FILE in files else None
    return _Files(headers, config, factors[0] if factors else None, embeddings)


def _is_embedding(entries: Entries) -> bool:
    """Whether a file holds token embeddings: known keys, or one tensor under the token's own name."""
    if entries.keys() <= EMBEDDING_KEYS.keys():
        return True
    (key, *others) = entries
    return not others and not _split(key)[1] and not _OTHER_KINDS.search(key)


def _refuse_pickle(name: str, data: bytes) -> None:
    """Pickles run code when they are opened, so they are known by their first bytes and their name alone."""
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return  # a safetensors header, whose length may well begin with a pickle's 0x80
    if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80" or name.lower().endswith(_PICKLES):
        raise _unsupported(
            f"{name!r} is a pickle (PyTorch's .bin, .pt or .ckpt), which can run code when it is opened.",
            remedy='Convert it where you trust it: python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('adapter.bin', weights_only=True), 'adapter.safetensors')\", then import "
            "the .safetensors file.",
        )


def _json(name: str, data: bytes) -> Mapping[str, Any]:
    try:
        if len(data) > _MAX_CONFIG_BYTES:
            raise ValueError("it is too large")  # noqa: TRY301 - one message for all
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unfit(f"{name!r} is no usable JSON: {error}.") from error
    if not isinstance(document, dict):
        raise unfit(f"{name!r} holds no JSON object.")
    return document


def _native(
    files: Mapping[str, bytes], name: str, base: BaseModel, max_bytes: int, max_rank: int | None
) -> Imported:
    """Mooring's own file. What its metadata says of certificate and rights is not believed: drop it."""
    if len(files) > 1:
        raise _unsupported(
            f"{name!r} is a whole adapter of Mooring's and came with other files.", remedy="Send it alone."
        )
    read = from_safetensors(files[name], base, max_bytes=max_bytes, max_rank=max_rank)
    weights = AdapterWeights(read.base_digest, read.rank, read.layers, read.embeddings)
    return Imported(weights, SourceFormat.NATIVE, source_digest(files))


def _recognise(keys: Iterable[str]) -> SourceFormat:
    """The format, by the prefix of the keys."""
    prefixes = {key.partition(".")[0] for key in keys}
    if "base_model" in prefixes:
        return SourceFormat.PEFT
    return (
        SourceFormat.KOHYA if any(name.startswith("lora_") for name in prefixes) else SourceFormat.DIFFUSERS
    )


def _settings(found: SourceFormat, files: _Files, metadata: Mapping[str, str]) -> dict[str, LoraSettings]:
    """What the tensors do not say, by component of the base, from where the format keeps it."""
    if found is SourceFormat.PEFT:
        if files.config is None:
            raise unmatched(
                f"{files.factors!r} is a PEFT adapter without its {CONFIG_FILE}, which holds its alpha.",
                remedy=f"Send {CONFIG_FILE} with it.",
            )
        return dict.fromkeys(_COMPONENTS, from_peft(files.config))
    if files.config is not None:
        raise _unsupported(
            f"{CONFIG_FILE} came with a {found} file, which has no use for it.", remedy="Leave it out."
        )
    return {component: from_diffusers(metadata, component) for component in _COMPONENTS}


# ---------------------------------------------------------------------------------------------- factors


def _factors(
    data: bytes,
    entries: Entries,
    settings: Mapping[str, LoraSettings],
    base: BaseModel,
    max_bytes: int,
    max_rank: int | None,
) -> dict[str, LayerFactors]:
    """All layers of a file, checked on its header first; in the base's order."""
    names = layer_names(base)
    layers = _match(entries, names)
    _check(entries, layers, names, settings)
    rank = max(layer.rank for layer in layers.values())
    if max_rank is not None and rank > max_rank:
        raise rank_too_large(rank, max_rank)
    size = sum(4 * math.prod(shape) for _, shape in entries.values())
    if size > max_bytes:
        raise too_large(size, max_bytes)
    tensors = load_tensors(data)
    alphas = {
        path: tensors[layer.keys["alpha"]].item() for path, layer in layers.items() if "alpha" in layer.keys
    }
    _check_alphas(alphas, layers)
    floats = {key: tensor.float() for key, tensor in tensors.items()}
    require_finite(floats)
    made = {}
    for path in names.shapes:
        if path not in layers:
            continue
        layer = layers[path]
        component, _, module = path.partition(".")
        scale = settings[component].scale(module, layer.rank, alphas.get(path))
        A, B = (floats[layer.keys[part]].flatten(1) for part in "AB")
        made[path] = LayerFactors(A, B if scale == 1.0 else B * scale)
    require_finite({path: factors.B for path, factors in made.items()})
    return made


def _match(entries: Entries, names: LayerNames) -> dict[str, _Layer]:
    """Each key's layer; whatever has none, or cannot be adapted, is refused by name."""
    other = [key for key in entries if _OTHER_KINDS.search(key)]
    if other:
        raise _unsupported(
            f"This is no plain LoRA (B·A): {listed(other)}, {len(other)} such tensors in all.",
            keys=other,
            remedy="Convert it to plain LoRA, for example by merging it and extracting a low-rank update.",
        )
    layers: dict[str, _Layer] = {}
    unknown: list[str] = []
    twice: list[str] = []
    closed: dict[str, list[str]] = {}
    for key in entries:
        name, part = _split(key)
        path = names.find(name) if part else None
        if path is None:
            unknown.append(key)
            continue
        why_not = names.why_not(path)
        if why_not:
            closed.setdefault(why_not, []).append(path)
        elif layers.setdefault(path, _Layer(path)).keys.setdefault(part, key) != key:
            twice.append(key)
    if unknown:
        raise unfit(
            f"{len(unknown)} of {len(entries)} tensors match no layer of this base: {listed(unknown)}.",
            keys=unknown,
        )
    if twice:
        raise unfit(f"These tensors are for layers that others are for too: {listed(twice)}.", keys=twice)
    if closed:
        paths = {why: sorted(set(found)) for why, found in closed.items()}
        told = "; ".join(
            f"{len(found)} {why}{'s' if len(found) > 1 else ''} ({listed(found)})"
            for why, found in paths.items()
        )
        raise _unsupported(
            f"This server cannot adapt {told}.",
            keys=[path for found in paths.values() for path in found],
            remedy="Nothing was stored: without these layers it would be another adapter. Train it on "
            "attention and feed-forward layers alone.",
        )
    return layers


def _split(key: str) -> tuple[str, str]:
    """A key as (name of the layer, "A", "B" or "alpha"); the part is "" for another key."""
    match = _KEY.fullmatch(key)
    return (match["layer"], str(match.lastgroup)) if match else (key, "")


def _check(
    entries: Entries,
    layers: Mapping[str, _Layer],
    names: LayerNames,
    settings: Mapping[str, LoraSettings],
) -> None:
    """Dtypes, shapes, pairs and ranks, by the header alone; notes each layer's rank."""
    wrong, unpaired = [], []
    for path, layer in layers.items():
        out, in_ = names.shapes[path]
        for part, key in layer.keys.items():
            dtype, shape = entries[key]
            if part == "alpha":
                if dtype not in _ALPHA_DTYPES or math.prod(shape) != 1:
                    wrong.append(f"{key} ({dtype} {shape}, expected one number)")
                continue
            kernel = names.kernels.get(path)
            if part == "A":
                tail = list(kernel or [in_])
                expected = f"[rank, {', '.join(map(str, tail))}]"
                fits = shape[1:] == tail
            else:
                expected = f"[{out}, rank, 1, 1]" if kernel else f"[{out}, rank]"
                fits = shape[:1] == [out] and shape[2:] == ([1, 1] if kernel else [])
            if dtype not in FACTOR_DTYPES or not fits or len(shape) < 2 or min(shape) < 1:
                wrong.append(f"{key} ({dtype} {shape}, expected {expected} of F32, F16 or BF16)")
        if "A" not in layer.keys or "B" not in layer.keys:
            unpaired.append(path)
            continue
        rank, other = entries[layer.keys["A"]][1][0:1], entries[layer.keys["B"]][1][1:2]
        if rank != other:
            unpaired.append(path)
        layer.rank = (rank or [0])[0]
    if wrong:
        raise unfit(
            f"{len(wrong)} tensors do not fit this base: {listed(wrong)}.{_made_for(entries, layers, names)}",
            keys=[entry.partition(" ")[0] for entry in wrong],
        )
    if unpaired:
        raise unfit(f"Factors A and B are missing or differ in rank for {listed(unpaired)}.", keys=unpaired)
    for component, chosen in settings.items():
        mine = {path: layer for path, layer in layers.items() if path.startswith(f"{component}.")}
        chosen.check(
            {path.partition(".")[2]: layer.rank for path, layer in mine.items()},
            with_alpha=[path for path, layer in mine.items() if "alpha" in layer.keys],
        )


def _made_for(entries: Entries, layers: Mapping[str, _Layer], names: LayerNames) -> str:
    """A sentence on the base that a file was made for, when its cross-attention tells."""
    for path, layer in layers.items():
        if path.endswith("attn2.to_k") and "A" in layer.keys and entries[layer.keys["A"]][1]:
            width, expected = entries[layer.keys["A"]][1][-1], names.shapes[path][1]
            if width != expected:
                kind = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}.get(width, "another base")
                return f" Its text embeddings have {width} numbers ({kind}) and this base's {expected}."
    return ""


def _check_alphas(alphas: Mapping[str, float], layers: Mapping[str, _Layer]) -> None:
    bad = [layers[path].keys["alpha"] for path, alpha in alphas.items() if not math.isfinite(alpha)]
    if bad:
        raise MooringError(
            Reason.ADAPTER_NOT_FINITE,
            f"The adapter holds NaN or infinite values in {listed(bad)}.",
            remedy="Train it again, or repair the file.",
        )
    zero = [layers[path].keys["alpha"] for path, alpha in alphas.items() if alpha == 0]
    if zero:
        raise unfit(f"These layers would do nothing, as their alpha is 0: {listed(zero)}.", keys=zero)


def _unsupported(message: str, *, remedy: str, keys: Sequence[str] = ()) -> MooringError:
    return MooringError(
        Reason.ADAPTER_NOT_SUPPORTED,
        message,
        remedy=remedy,
        metadata={"keys": shown_keys(keys), "count": str(len(keys))} if keys else None,
    )
