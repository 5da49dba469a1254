"""Launches of the Triton kernels; `op.py` chooses between these and the PyTorch path.

No value is read back to the host. `*_options` give what a launch is compiled with; `compiled.py` compiles the
same for devices that are not there.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from mooring_kernels.spectral import kernels, torch_path
from mooring_kernels.spectral.plan import POLISH, SQUARINGS, TILES, WARM_FROM, WARM_STEPS, Plan, RankClass
from mooring_kernels.spectral.plan import padded_rank as padded

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") in {"1", "true", "on"}
KIND_INDEX = {"spectral": 0, "l2": 1, "factor_decay": 2}
_NO_SOLVE, _COLD, _WARM = 0, 1, 2


def gram_options(rank: int, *, aligned: bool) -> dict[str, Any]:
    """Constants and options of `gram_kernel`."""
    tiles = TILES[padded(rank)]
    return {
        "RANK": rank,
        "R": padded(rank),
        "BLOCK": tiles.gram_block,
        "ALIGNED": aligned,
        "UPCAST": INTERPRETED,
        "PRECISION": tiles.precision,
        "num_warps": tiles.gram_warps,
        "num_stages": tiles.gram_stages,
    }


def solve_options(rank: int, *, grams: bool, reduce_only: bool = False) -> dict[str, Any]:
    """Constants and options of `solve_kernel`."""
    tiles = TILES[padded(rank)]
    warm = padded(rank) >= WARM_FROM
    return {
        "R": padded(rank),
        "METHOD": _NO_SOLVE if reduce_only else _WARM if warm else _COLD,
        "SQUARINGS": SQUARINGS,
        "POLISH": WARM_STEPS if warm else POLISH,
        "WRITE_GRAMS": grams,
        "PRECISION": tiles.solve_precision,
        "num_warps": tiles.solve_warps,
    }


def grad_options(rank: int, kind: str, *, aligned: bool) -> dict[str, Any]:
    """Constants and options of `grad_kernel`."""
    tiles = TILES[padded(rank)]
    return {
        "KIND": KIND_INDEX[kind],
        "RANK": rank,
        "R": padded(rank),
        "BLOCK": tiles.l2_block if kind == "l2" else tiles.grad_block,
        "ALIGNED": aligned,
        "PRECISION": tiles.precision,
        "num_warps": tiles.grad_warps,
    }


def gram(plan: Plan, flat: Tensor, slots: Tensor) -> None:
    """Fill the partial Grams of every class.

    Args:
        plan: of the layout.
        flat: `[S, size]`, float32 or bfloat16.
        slots: int32 `[T]`.
    """
    for part in plan.classes:
        kernels.gram_kernel[(part.n_partials, plan.slots)](
            flat,
            slots,
            part.work,
            part.partial,
            plan.layout.size // 8,
            part.n_partials,
            **gram_options(part.rank, aligned=part.aligned),
        )


def solve(plan: Plan, sigma2: Tensor, fro2: Tensor, *, grams: bool = False, cold: bool = False) -> None:
    """Norms and leading directions from the partial Grams.

    Args:
        plan: whose `gram` ran.
        sigma2: float32 `[T, total layers]`, written.
        fro2: likewise.
        grams: also keep the summed Grams (for `l2`).
        cold: be exact where the solve is warm-started, too. The first call of a plan always is.
    """
    for part in plan.classes:
        exactly = part.padded >= WARM_FROM and (cold or not part.solved)
        kernels.solve_kernel[(len(part.members), plan.slots)](
            part.partial,
            part.layers,
            part.vectors,
            part.coefficients,
            part.grams if grams or exactly else part.partial,
            sigma2,
            fro2,
            part.n_partials,
            len(part.members),
            len(plan.layout.layers),
            **solve_options(part.rank, grams=grams or exactly, reduce_only=exactly),
        )
        if exactly:
            _solve_exactly(part, sigma2)
        part.solved = True


def _solve_exactly(part: RankClass, sigma2: Tensor) -> None:
    """The squarings of the PyTorch path, float64, on Grams that the device holds already."""
    gram_a, gram_b = part.grams.flatten(0, 1).double().unbind(1)
    found = torch_path.solve_grams(gram_a, gram_b)
    vectors = (found.y, found.z, found.q)
    for place, vector in enumerate(vectors):
        part.vectors[:, :, place] = vector.view(part.slots, len(part.members), part.padded).float()
    part.coefficients.copy_(2.0 * found.inverse_n2.view(part.slots, -1, 1).expand_as(part.coefficients))
    sigma2[:, list(part.members)] = found.sigma2.view(part.slots, -1).float()


def grad(
    plan: Plan,
    flat: Tensor,
    target: Tensor,
    slots: Tensor,
    target_rows: Tensor,
    *,
    kind: str,
    strength: Tensor,
    weights: Tensor,
    rate: Tensor,
    scale: float,
) -> None:
    """Add scale·strength·rate·weight·∂P/∂flat to the target.

    Args:
        plan: whose `solve` ran on the same factors.
        flat: `[S, size]`.
        target: `[T or S, size]`; may be `flat`.
        slots: int32 `[T]` rows of `flat`.
        target_rows: int32 `[T]` rows of `target`.
        kind: which penalty.
        strength: `[T]`.
        weights: `[total layers]`.
        rate: one element.
        scale: host factor.
    """
    for part in plan.classes:
        kernels.grad_kernel[(part.n_partials, plan.slots)](
            flat,
            target,
            slots,
            target_rows,
            part.work,
            part.layers,
            part.vectors,
            part.coefficients,
            part.grams if kind == "l2" else part.partial,
            strength,
            weights,
            rate,
            scale,
            plan.layout.size // 8,
            len(part.members),
            **grad_options(part.rank, kind, aligned=part.aligned),
        )
