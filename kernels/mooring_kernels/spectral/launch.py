"""Launches of the Triton kernels; `op.py` chooses between these and the PyTorch path.

No value is read back to the host and nothing is allocated after the first call of a kind.
"""

from __future__ import annotations

import os

from torch import Tensor

from mooring_kernels.spectral import kernels
from mooring_kernels.spectral.plan import POLISH, SQUARINGS, WARM_FROM, WARM_STEPS, Plan, RankClass

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") in {"1", "true", "on"}
KIND_INDEX = {"spectral": 0, "l2": 1, "factor_decay": 2}
_NO_SOLVE, _COLD, _WARM = 0, 1, 2


def gram(plan: Plan, flat: Tensor, slots: Tensor) -> None:
    """Fill the partial Grams of every class.

    Args:
        plan: of the layout.
        flat: `[S, size]`, float32 or bfloat16.
        slots: int32 `[T]`.
    """
    for part in plan.classes:
        tiles = part.tiles
        kernels.gram_kernel[(part.n_partials, plan.slots)](
            flat,
            slots,
            part.work,
            part.partial,
            plan.layout.size // 8,
            part.n_partials,
            RANK=part.rank,
            R=part.padded,
            BLOCK=tiles.gram_block,
            ALIGNED=part.aligned,
            UPCAST=INTERPRETED,
            PRECISION=tiles.gram_precision,
            num_warps=tiles.gram_warps,
        )


def solve(plan: Plan, sigma2: Tensor, fro2: Tensor, *, grams: bool = False, cold: bool = False) -> None:
    """Norms and leading directions from the partial Grams.

    Args:
        plan: whose `gram` ran.
        sigma2: float32 `[T, total layers]`, written.
        fro2: likewise.
        grams: also keep the summed Grams (for `l2`).
        cold: forget the directions of the last call where the solve is warm-started.
    """
    for part in plan.classes:
        warm = part.padded >= WARM_FROM
        if warm and cold:
            part.vectors.zero_()
        _launch_solve(plan, part, sigma2, fro2, _WARM if warm else _COLD, grams=grams)


def _launch_solve(
    plan: Plan, part: RankClass, sigma2: Tensor, fro2: Tensor, method: int, *, grams: bool
) -> None:
    kernels.solve_kernel[(len(part.members), plan.slots)](
        part.partial,
        part.layers,
        part.vectors,
        part.coefficients,
        part.grams if grams else part.partial,
        sigma2,
        fro2,
        part.n_partials,
        len(part.members),
        len(plan.layout.layers),
        R=part.padded,
        METHOD=method,
        SQUARINGS=SQUARINGS,
        POLISH=WARM_STEPS if method == _WARM else POLISH,
        WRITE_GRAMS=grams,
        PRECISION=part.tiles.solve_precision,
        num_warps=part.tiles.solve_warps,
    )


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
        tiles = part.tiles
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
            KIND=KIND_INDEX[kind],
            RANK=part.rank,
            R=part.padded,
            BLOCK=tiles.grad_block,
            ALIGNED=part.aligned,
            PRECISION=tiles.gram_precision,
            num_warps=tiles.grad_warps,
        )
