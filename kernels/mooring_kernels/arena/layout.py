"""The table that maps (layer, factor) to an offset of one flat buffer.

Layers of equal shape lie next to each other at a constant stride, so a whole group is one strided view
`[n, r, in]` / `[n, out, r]` of the buffer: batched products need no gather and no copy. The order of groups
is a function of the set of shapes only, hence two processes that adapt the same modules agree on the layout.
Sections come one after the other: what is trained can be a layout of its own at the start of a row whose
other layers are only served.

Shape legend: L layers, n layers of one shape, r rank, S slots.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor

ALIGNMENT = 8
"""Offsets are multiples of 8 elements: 16 bytes in bf16 (128-bit loads), 32 bytes in float32."""


@dataclass(frozen=True)
class LayerShape:
    """One adapted matrix `W [out, in]`.

    Args:
        name: the module's dotted path; unique in a layout.
        out: rows of W.
        in_: columns of W (for a convolution: in · kh · kw, flattened).
        rank: rank of this layer's factors where it is smaller than the layout's; None for the layout's.
        section: layers of a lower section lie before those of a higher one, so the layout of the lower ones
            alone is a prefix of the whole.
    """

    name: str
    out: int
    in_: int
    rank: int | None = None
    section: int = 0


@dataclass(frozen=True)
class ShapeGroup:
    """All layers of one section, shape and rank: `n` blocks, `stride` elements apart, A then B in each.

    Args:
        out: rows of W.
        in_: columns of W.
        rank: of these layers.
        indices: positions of these layers in `ArenaLayout.layers`, in buffer order.
        offset: element at which the first block starts.
        stride: elements from one block to the next.
        b_offset: elements from a block's start to its B.
    """

    out: int
    in_: int
    rank: int
    indices: tuple[int, ...]
    offset: int
    stride: int
    b_offset: int

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Strided views of the group, no copy.

        Args:
            flat: buffer `[..., size]` whose last dimension is contiguous.

        Returns:
            A `[..., n, r, in]` and B `[..., n, out, r]`.
        """
        n = len(self.indices)
        block = _view(flat, self.offset, (n, self.stride))
        return _view(block, 0, (self.rank, self.in_)), _view(block, self.b_offset, (self.out, self.rank))


class ArenaLayout:
    """Offsets of the factors `A [r, in]` and `B [out, r]` of every adapted layer; `ΔW = B·A`.

    Args:
        layers: the adapted matrices; names must be unique, dimensions positive.
        rank: rank r ≥ 1 of every layer that names none of its own (smaller adapters are padded with zeros
            by the bank).

    Attributes:
        layers: the layers in the order given; per-layer results follow this order.
        rank: r.
        ranks: rank of each layer, in the order of `layers`.
        size: elements of one flat buffer, padding included. Padding is zero and stays zero.

    Raises:
        ValueError: on no layers, a repeated name, a dimension below 1, or a layer's rank outside 1 … r.
    """

    def __init__(self, layers: Sequence[LayerShape], rank: int) -> None:
        if not layers:
            raise ValueError("an arena layout needs at least one layer")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"layer names must be unique; repeated: {', '.join(repeated)}")
        for layer in layers:
            if layer.out < 1 or layer.in_ < 1:
                raise ValueError(f"{layer.name}: dimensions must be positive, not {layer.out} x {layer.in_}")
            if layer.rank is not None and not 1 <= layer.rank <= rank:
                raise ValueError(f"{layer.name}: rank must be between 1 and {rank}, not {layer.rank}")
        self.layers = tuple(layers)
        self.rank = rank
        self.ranks = tuple(rank if layer.rank is None else layer.rank for layer in self.layers)
        self.groups, self.size = self._place()

    def _place(self) -> tuple[tuple[ShapeGroup, ...], int]:
        groups: list[ShapeGroup] = []
        offset = 0
        members: dict[tuple[int, int, int, int], list[int]] = {}
        for index, (layer, rank) in enumerate(zip(self.layers, self.ranks, strict=True)):
            members.setdefault((layer.section, layer.out, layer.in_, rank), []).append(index)
        for (_, out, in_, rank), indices in sorted(members.items()):
            b_offset = _align(rank * in_)
            stride = b_offset + _align(rank * out)
            groups.append(ShapeGroup(out, in_, rank, tuple(indices), offset, stride, b_offset))
            offset += stride * len(indices)
        return tuple(groups), offset

    @cached_property
    def cache(self) -> dict[Hashable, Any]:
        """Things derived from the layout that an operator keeps between calls (tables on a device)."""
        return {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Layer names, in the order of `layers`."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Element offsets `(A, B)` of each layer, by name."""
        found: dict[str, tuple[int, int]] = {}
        for group in self.groups:
            for k, index in enumerate(group.indices):
                start = group.offset + k * group.stride
                found[self.layers[index].name] = (start, start + group.b_offset)
        return {name: found[name] for name in self.names}

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of the layout: equal digests mean that buffers can be exchanged byte for byte."""
        return "sha256:" + hashlib.sha256(self.to_json().encode()).hexdigest()

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's factors as views of `flat`, no copy.

        Args:
            flat: `[size]`, or `[S, size]` for a whole bank; last dimension contiguous.

        Returns:
            name → (A `[..., r, in]`, B `[..., out, r]`), in the order of `layers`.

        Raises:
            ValueError: when the last dimension is not `size`.
        """
        if flat.shape[-1] != self.size:
            raise ValueError(f"this layout's buffers have {self.size} elements, not {flat.shape[-1]}")
        shaped: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            a_at, b_at = self.offsets[layer.name]
            shaped[layer.name] = (
                _view(flat, a_at, (rank, layer.in_)),
                _view(flat, b_at, (layer.out, rank)),
            )
        return shaped

    def to_json(self) -> str:
        """Canonical JSON of the layout; `from_json` is its inverse."""
        layers: list[list[str | int | None]] = []
        for layer in self.layers:
            tail = [layer.rank, layer.section] if layer.section else [layer.rank] if layer.rank else []
            layers.append([layer.name, layer.out, layer.in_, *tail])
        return json.dumps({"rank": self.rank, "layers": layers}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ArenaLayout:
        """Rebuild a layout.

        Args:
            text: what `to_json` wrote.

        Raises:
            ValueError: when the text is not such a document.
        """
        try:
            document = json.loads(text)
            layers = [_layer(*row) for row in document["layers"]]
            rank = int(document["rank"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an arena layout: {error}") from error
        return ArenaLayout(layers, rank)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArenaLayout):
            return NotImplemented
        return self.rank == other.rank and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.rank, self.layers))

    def __reduce__(self) -> tuple[type[ArenaLayout], tuple[tuple[LayerShape, ...], int]]:
        return ArenaLayout, (self.layers, self.rank)  # without the cache

    def __repr__(self) -> str:
        return f"ArenaLayout({len(self.layers)} layers, rank {self.rank}, {self.size} elements)"


def _layer(name: object, out: int, in_: int, rank: int | None = None, section: int = 0) -> LayerShape:
    return LayerShape(str(name), int(out), int(in_), None if rank is None else int(rank), int(section))


def _align(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, offset: int, shape: tuple[int, int]) -> Tensor:
    return flat.narrow(-1, offset, prod(shape)).view(*flat.shape[:-1], *shape)
