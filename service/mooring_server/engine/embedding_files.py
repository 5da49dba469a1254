"""Files of learned token embeddings (textual inversion, Gal et al. 2022), as several tools write them.

diffusers writes one tensor under the token's own name, and a second file for SDXL's second text encoder;
other tools write fixed names, and the token is whatever the user calls it.

Shape legend: n vectors of a placeholder, width of a text encoder's token embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from mooring_server.engine.adapters import FACTOR_DTYPES, clipped, listed, require_finite, unmatched
from mooring_server.engine.model import BaseModel
from mooring_server.errors import MooringError

EMBEDDING_KEYS: Mapping[str, int | None] = {
    "clip_l": 0, "clip_g": 1,  # kohya and most SDXL tools
    "text_encoders_0": 0, "text_encoders_1": 1,  # diffusers' advanced DreamBooth example
    "emb_params": None,  # of web interfaces: the file is for one encoder and named after the token
}  # fmt: skip
"""Keys of embeddings that do not name their token → text encoder, None where the file's name tells."""
Entries: TypeAlias = Mapping[str, tuple[str, list[int]]]
"""Key → (dtype, shape)."""
_REMEDY = "Nothing was stored. Use an adapter that was made for this base's architecture."


def read_embeddings(
    files: Mapping[str, tuple[bytes, Entries]],
    base: BaseModel,
    placeholder: str,
) -> dict[str, tuple[Tensor, ...]]:
    """Placeholder → vectors per text encoder, `[n, width]` each. All files are checked before one is read.

    Args:
        files: name → content and header; the second text encoder's have `_2` before the first dot.
        base: what they must fit.
        placeholder: instead of the word that the files name; "" keeps it.

    Raises:
        MooringError: ADAPTER_KEYS_UNMATCHED, ADAPTER_NOT_FINITE.
    """
    encoders = len(base.text_encoders)
    places: dict[str, dict[int, tuple[str, str]]] = {}
    for file, (_, entries) in files.items():
        second = file.partition(".")[0].endswith("_2")
        for key, (dtype, shape) in entries.items():
            index = EMBEDDING_KEYS.get(key)
            encoder = int(second) if index is None else index
            width = base.embedding_width(encoder) if encoder < encoders else None
            fits = width is not None and len(shape) in {1, 2} and shape[-1] == width and min(shape) > 0
            if dtype not in FACTOR_DTYPES or not fits:
                wanted = f"[n, {width}]" if width else f"at most {encoders} text encoder"
                found = clipped(f"{dtype} {shape}")
                raise unfit(
                    f"{clipped(key)} of {clipped(file)} does not fit this base ({found}, expected {wanted}).",
                    keys=[key],
                )
            token = "" if key in EMBEDDING_KEYS else key
            if places.setdefault(token, {}).setdefault(encoder, (file, key)) != (file, key):
                raise unfit(f"Two files hold the embeddings of {clipped(token or key)}.", keys=[key])
    places = _named(places, placeholder)
    loaded = {file: load_tensors(data) for file, (data, _) in files.items()}
    made = {}
    for token, parts in places.items():
        vectors = [loaded[file][key].float().reshape(-1, base.embedding_width(encoder))
                   for encoder, (file, key) in sorted(parts.items())]  # fmt: skip
        if len(vectors) != encoders or len({vector.shape[0] for vector in vectors}) != 1:
            raise unfit(
                f"The placeholder {clipped(token)} lacks equal embeddings for every text encoder.",
                keys=[token],
            )
        require_finite(dict(zip([key for _, (_, key) in sorted(parts.items())], vectors, strict=True)))
        made[token] = tuple(vectors)
    return made


def _named(
    places: dict[str, dict[int, tuple[str, str]]], placeholder: str
) -> dict[str, dict[int, tuple[str, str]]]:
    """The tokens under the names they will have in prompts."""
    if placeholder and placeholder not in places:
        if len(places) > 1:
            raise unmatched(
                f"The files hold embeddings of {listed(sorted(places))}, none of them called {placeholder}.",
                remedy="Name one of them as the placeholder, or none.",
            )
        places = {placeholder: next(iter(places.values()))}
    if "" in places:
        raise unmatched(
            "The file of embeddings does not say which word they stand for.",
            remedy="Give the placeholder, for example “<rex>”.",
        )
    bad = [name for name in places if len(name) > 32 or name != "".join(name.split())]
    if bad:
        raise unmatched(
            f"A placeholder has 1 to 32 characters and no blanks, unlike {listed(bad)}.",
            remedy="Give the placeholder, for example “<rex>”.",
        )
    return places


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """A checked file's tensors. Raises ADAPTER_KEYS_UNMATCHED for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise unmatched(
            f"The file is damaged: {clipped(str(error))}.", remedy="Get the file again."
        ) from error


def unfit(message: str, *, keys: Sequence[str] = ()) -> MooringError:
    """The error for a foreign file whose keys or shapes are not those of the base."""
    return unmatched(message, keys=keys, remedy=_REMEDY)
