"""Tables, tile sizes and scratch memory of the Triton kernels for one layout, device and set of slots.

Layers are split into classes that share a compiled kernel: the rank, and whether rows of A begin at 16-byte
boundaries (`in` a multiple of 8). The usual networks have one class, hence three launches. Scratch is kept
between calls: addresses stay the same, so a step that calls the op can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout
from mooring_kernels.arena.layout import ALIGNMENT

COLUMNS = 8
MAX_RANK = 128


@dataclass(frozen=True)
class Tiles:
    """How a class of padded rank R is cut into programs and tiles.

    Args:
        chunk: elements along `in` or `out` that one program takes, at most (before balancing).
        precision: of the products that stream factors: `ieee` (fused multiply-add) or `tf32x3` (tensor cores,
            about float32).
        gram_block: elements of a tile along `in` or `out` in `gram_kernel`.
        gram_warps: warps of a program.
        gram_stages: tiles in flight.
        solve_precision: of the r×r products.
        solve_warps: warps of a program of `solve_kernel`.
        grad_block: of a tile in `grad_kernel`.
        l2_block: the same for `l2`, which multiplies by a Gram matrix.
        grad_warps: warps of a program.
    """

    chunk: int
    precision: str
    gram_block: int
    gram_warps: int
    gram_stages: int
    solve_precision: str
    solve_warps: int
    grad_block: int
    l2_block: int
    grad_warps: int


TILES: dict[int, Tiles] = {
    16: Tiles(640, "ieee", 128, 4, 2, "ieee", 1, 128, 128, 4),
    32: Tiles(640, "tf32x3", 64, 4, 3, "ieee", 4, 128, 128, 4),
    64: Tiles(1280, "tf32x3", 32, 4, 3, "tf32x3", 4, 64, 32, 4),
    128: Tiles(2048, "tf32x3", 16, 8, 2, "ieee", 16, 32, 16, 8),
}
"""By R. The largest tiles that neither spill on sm_80 nor on sm_90; not tuned on a device."""

SQUARINGS = 10
"""M^(2^10) in float32."""
POLISH = 3
WARM_STEPS = 8
"""Power steps per call where the solve is warm-started."""
WARM_FROM = 128
"""Padded rank from which a cold solve no longer fits the registers."""


def padded_rank(rank: int) -> int:
    """The power of two ≥ max(rank, 16): the least dimension of a matrix product is 16.

    Raises:
        ValueError: above 128.
    """
    if rank > MAX_RANK:
        raise ValueError(f"the spectral kernels take ranks up to {MAX_RANK}, not {rank}")
    return max(16, 1 << (rank - 1).bit_length())


@dataclass
class RankClass:
    """Tables and scratch of the layers that share one compiled kernel.

    Args:
        rank: true rank.
        aligned: whether `in` is a multiple of 8 for every layer.
        members: indices of the layers in `ArenaLayout.layers`.
        work: int32 `[P, 8]`.
        layers: int32 `[L, 8]`.
        n_partials: partial Grams of one slot.
        slots: T.
        solved: whether `vectors` hold directions that a warm start can take.
    """

    rank: int
    aligned: bool
    members: tuple[int, ...]
    work: Tensor
    layers: Tensor
    n_partials: int
    slots: int
    solved: bool = False

    @cached_property
    def padded(self) -> int:
        """R."""
        return padded_rank(self.rank)

    @cached_property
    def tiles(self) -> Tiles:
        """Of R."""
        return TILES[self.padded]

    @cached_property
    def partial(self) -> Tensor:
        """`[T, n_partials, R, R]`, never initialised."""
        return self._scratch(self.n_partials, self.padded, self.padded)

    @cached_property
    def vectors(self) -> Tensor:
        """`[T, L, 3, R]`: y, z, q; a warm start reads the y of the call before."""
        return self._scratch(len(self.members), 3, self.padded).zero_()

    @cached_property
    def coefficients(self) -> Tensor:
        """`[T, L, 2]`."""
        return self._scratch(len(self.members), 2)

    @cached_property
    def grams(self) -> Tensor:
        """`[T, L, 2, R, R]`: G_A, G_B."""
        return self._scratch(len(self.members), 2, self.padded, self.padded)

    def _scratch(self, *shape: int) -> Tensor:
        return torch.empty(self.slots, *shape, dtype=torch.float32, device=self.work.device)


class Plan:
    """Everything the launches need besides the buffers themselves.

    Args:
        layout: of the buffers.
        device: they are on.
        slots: T, how many slots one call handles.

    Raises:
        ValueError: on a rank above 128.
    """

    def __init__(self, layout: ArenaLayout, device: torch.device, slots: int) -> None:
        self.layout = layout
        self.slots = slots
        classes: dict[tuple[int, bool], list[int]] = {}
        for index, layer in enumerate(layout.layers):
            key = (layout.ranks[index], layer.in_ % ALIGNMENT == 0)
            classes.setdefault(key, []).append(index)
        self.classes = [
            _build_class(layout, rank, aligned, members, device, slots)
            for (rank, aligned), members in sorted(classes.items())
        ]
        self.sequence = torch.arange(slots, dtype=torch.int32, device=device)
        self.ones = torch.ones(max(slots, len(layout.layers)), dtype=torch.float32, device=device)


def _build_class(
    layout: ArenaLayout, rank: int, aligned: bool, members: list[int], device: torch.device, slots: int
) -> RankClass:
    tiles = TILES[padded_rank(rank)]
    work: list[list[int]] = []
    layers: list[list[int]] = []
    for local, index in enumerate(members):
        layer = layout.layers[index]
        offsets = layout.offsets[layer.name]
        row = [index]
        for is_b, length in ((0, layer.in_), (1, layer.out)):
            unit = ALIGNMENT if aligned and not is_b else 1
            pieces = _pieces(length, tiles.chunk, max(tiles.gram_block, tiles.grad_block, tiles.l2_block))
            row += [len(work), len(pieces)]
            for start, end in pieces:
                leading = rank if is_b else layer.in_ // unit
                work.append(
                    [
                        local,
                        is_b,
                        offsets[is_b] // ALIGNMENT,
                        start // unit,
                        end // unit,
                        leading,
                        len(work),
                        0,
                    ]
                )
        layers.append([*row, 0, 0, 0])
    return RankClass(
        rank,
        aligned,
        tuple(members),
        torch.tensor(work, dtype=torch.int32, device=device),
        torch.tensor(layers, dtype=torch.int32, device=device),
        len(work),
        slots,
    )


def _pieces(length: int, chunk: int, block: int) -> list[tuple[int, int]]:
    """Cut `length` into equal pieces of at most about `chunk`, each a multiple of `block` but the last."""
    count = -(-length // chunk)
    step = -(-length // (count * block)) * block
    return [(start, min(length, start + step)) for start in range(0, length, step)]
