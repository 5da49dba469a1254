# ruff: noqa: ANN001, ANN201, ANN202 - Triton reads `tl.constexpr` annotations and no others
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernels of the spectral penalty: gram → solve → grad, three launches for a whole network.

All layers of one class are addressed through two int32 tables (see `plan.py`): `work`, one row per chunk of
a factor, and `layers`, one row per layer. Offsets into the arena are stored in units of 8 elements and
multiplied in the kernel: that is how the compiler knows that a load may be 128 bits wide (a hint on an
argument of a helper would be lost when the helper is inlined). Sums are taken in a fixed order and nothing is
atomic, so results repeat bit for bit. Accumulation is in float32 whatever the storage.

Shape legend: P chunks, L layers of the class, T slots, R = RANK padded to a power of two ≥ 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORK_COLUMNS = 8
"""layer, is_b, offset/8, start, end, leading dimension, partial, unused."""
LAYER_COLUMNS = 8
"""global layer, first partial of A, their number, first partial of B, their number, three unused."""
TINY = tl.constexpr(1e-37)

COUNTS = ["size8", "n_partials", "n_layers", "total_layers"]
"""Arguments whose value must not select a compiled variant."""

SPECTRAL = tl.constexpr(0)
L2 = tl.constexpr(1)
FACTOR_DECAY = tl.constexpr(2)

NO_SOLVE = tl.constexpr(0)
COLD = tl.constexpr(1)
WARM = tl.constexpr(2)


@triton.jit(do_not_specialize=COUNTS)
def gram_kernel(
    flat,
    slots,
    work,
    partial,
    size8,
    n_partials,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of A·Aᵀ or Bᵀ·B, grid (P, T) → partial [T, n_partials, R, R]."""
    row = work + tl.program_id(0) * 8
    is_b = tl.load(row + 1)
    base = flat + tl.load(slots + tl.program_id(1)).to(tl.int64) * size8 * 8
    base += tl.load(row + 2).to(tl.int64) * 8
    j = tl.arange(0, R)
    acc = tl.zeros((R, R), tl.float32)
    if is_b == 0:
        start = tl.load(row + 3)
        end = tl.load(row + 4)
        ld = tl.load(row + 5)
        if ALIGNED:
            start = start * 8
            end = end * 8
            ld = ld * 8
        for k in range(start, end, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            mask = (cols < end)[None, :]
            if RANK != R:
                mask = mask & (j < RANK)[:, None]
            tile = tl.load(base + j[:, None] * ld + cols[None, :], mask=mask, other=0.0)
            if UPCAST:
                tile = tile.to(tl.float32)
            acc = tl.dot(tile, tl.trans(tile), acc, input_precision=PRECISION)
    else:
        start = tl.load(row + 3)
        end = tl.load(row + 4)
        for k in range(start, end, BLOCK):
            rows = k + tl.arange(0, BLOCK)
            mask = (rows < end)[:, None]
            if RANK != R:
                mask = mask & (j < RANK)[None, :]
            tile = tl.load(base + rows[:, None] * RANK + j[None, :], mask=mask, other=0.0)
            if UPCAST:
                tile = tile.to(tl.float32)
            acc = tl.dot(tl.trans(tile), tile, acc, input_precision=PRECISION)
    place = partial + (tl.program_id(1).to(tl.int64) * n_partials + tl.load(row + 6)) * (R * R)
    tl.store(place + j[:, None] * R + j[None, :], acc)


@triton.jit
def _trace(m, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], m, 0.0), axis=1), axis=0)


@triton.jit
def _largest(m):
    return tl.max(tl.max(tl.abs(m), axis=1), axis=0)


@triton.jit(do_not_specialize=COUNTS)
def solve_kernel(
    partial,
    layers,
    vectors,
    coefficients,
    grams,
    sigma2,
    fro2,
    n_partials,
    n_layers,
    total_layers,
    R: tl.constexpr,
    METHOD: tl.constexpr,
    SQUARINGS: tl.constexpr,
    POLISH: tl.constexpr,
    WRITE_GRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Leading singular direction of every layer in r-space, grid (L, T).

    Reads `partial`; writes vectors [T, L, 3, R] (y, z, q; with WARM also reads y), coefficients [T, L, 2]
    (2/n² towards A and B), sigma2 and fro2 [T, total_layers], and with WRITE_GRAMS grams [T, L, 2, R, R].
    G_A and G_B are divided by their traces first: scales of the factors neither overflow nor underflow.
    """
    layer = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * n_layers + layer
    row = layers + layer * 8
    i = tl.arange(0, R)
    square = i[:, None] * R + i[None, :]
    here = partial + tl.program_id(1).to(tl.int64) * n_partials * (R * R)
    first_a = tl.load(row + 1)
    first_b = tl.load(row + 3)
    count_a = tl.load(row + 2)
    count_b = tl.load(row + 4)
    g_a = tl.load(here + first_a * (R * R) + square)
    for p in range(1, count_a):
        g_a += tl.load(here + (first_a + p) * (R * R) + square)
    g_b = tl.load(here + first_b * (R * R) + square)
    for p in range(1, count_b):
        g_b += tl.load(here + (first_b + p) * (R * R) + square)
    if WRITE_GRAMS:
        tl.store(grams + at * (2 * R * R) + square, g_a)
        tl.store(grams + at * (2 * R * R) + R * R + square, g_b)
    out = tl.program_id(1) * total_layers + tl.load(row)
    trace_a = _trace(g_a, R)
    trace_b = _trace(g_b, R)
    g_a = g_a / tl.maximum(trace_a, TINY, propagate_nan=tl.PropagateNan.ALL)
    g_b = g_b / tl.maximum(trace_b, TINY, propagate_nan=tl.PropagateNan.ALL)
    tl.store(fro2 + out, tl.sum(tl.sum(g_a * g_b, axis=1), axis=0) * trace_a * trace_b)
    if METHOD != NO_SOLVE:
        if METHOD == COLD:
            m = tl.dot(g_b, g_a, input_precision=PRECISION)
            # by the largest entry: where A and B nearly cancel, a trace may round to a negative number
            m = m / tl.maximum(_largest(m), TINY)
            for _ in range(SQUARINGS):
                m = tl.dot(m, m, input_precision=PRECISION)
                m = m / tl.maximum(_largest(m), TINY)
            diagonal = tl.sum(tl.where(i[:, None] == i[None, :], m, 0.0), axis=0)
            column = tl.argmax(diagonal, axis=0)
            y = tl.sum(tl.where(i[None, :] == column, m, 0.0), axis=1)
        else:
            y = tl.load(vectors + at * (3 * R) + i)
            # a layer that was zero until now (or never solved) starts from the best column of G_B·G_A
            column = tl.argmax(tl.sum(g_a * g_b, axis=0), axis=0)
            fresh = tl.sum(tl.where(i[None, :] == column, g_a, 0.0), axis=1)
            fresh = tl.sum(g_b * fresh[None, :], axis=1)
            usable = (tl.max(tl.abs(y), axis=0) > 0.0) & (tl.sum(y - y, axis=0) == 0.0)
            y = tl.where(usable, y, fresh)
        y = y / tl.maximum(tl.max(tl.abs(y), axis=0), TINY)
        for _ in range(POLISH):
            z = tl.sum(g_a * y[None, :], axis=1)
            y = tl.sum(g_b * z[None, :], axis=1)
            y = y / tl.maximum(tl.max(tl.abs(y), axis=0), TINY)
        z = tl.sum(g_a * y[None, :], axis=1)
        q = tl.sum(g_b * z[None, :], axis=1)
        n2 = tl.sum(y * z, axis=0)
        inverse = tl.where(n2 > TINY, 1.0 / tl.maximum(n2, TINY), n2 - n2)
        tl.store(sigma2 + out, tl.sum(z * q, axis=0) * inverse * trace_a * trace_b)
        tl.store(coefficients + at * 2, 2.0 * trace_b * inverse)
        tl.store(coefficients + at * 2 + 1, 2.0 * trace_a * inverse)
        tl.store(vectors + at * (3 * R) + i, y)
        tl.store(vectors + at * (3 * R) + R + i, z)
        tl.store(vectors + at * (3 * R) + 2 * R + i, q)


@triton.jit(do_not_specialize=COUNTS)
def grad_kernel(
    flat,
    target,
    slots,
    target_rows,
    work,
    layers,
    vectors,
    coefficients,
    grams,
    strength,
    weights,
    rate,
    scale,
    size8,
    n_layers,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add c·∂P/∂factor to the target in place, grid (P, T); c = scale·strength[slot]·rate·weights[layer].

    Every element is read and written by one program only, so `target` may be `flat` itself (decay). It must
    not be autotuned: a trial run would add its share too.
    """
    row = work + tl.program_id(0) * 8
    layer = tl.load(row)
    is_b = tl.load(row + 1)
    at = tl.program_id(1).to(tl.int64) * n_layers + layer
    offset = tl.load(row + 2).to(tl.int64) * 8
    base = flat + tl.load(slots + tl.program_id(1)).to(tl.int64) * size8 * 8 + offset
    goal = target + tl.load(target_rows + tl.program_id(1)).to(tl.int64) * size8 * 8 + offset
    c = scale * tl.load(strength + tl.program_id(1)).to(tl.float32) * tl.load(rate).to(tl.float32)
    c *= tl.load(weights + tl.load(layers + layer * 8)).to(tl.float32)
    j = tl.arange(0, R)
    if is_b == 0:
        start = tl.load(row + 3)
        end = tl.load(row + 4)
        ld = tl.load(row + 5)
        if ALIGNED:
            start = start * 8
            end = end * 8
            ld = ld * 8
        if KIND == SPECTRAL:
            y = tl.load(vectors + at * (3 * R) + j)
            q = tl.load(vectors + at * (3 * R) + 2 * R + j) * (c * tl.load(coefficients + at * 2))
        elif KIND == L2:
            matrix = tl.load(grams + at * (2 * R * R) + R * R + j[:, None] * R + j[None, :]) * (2.0 * c)
        for k in range(start, end, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            mask = (cols < end)[None, :]
            if RANK != R:
                mask = mask & (j < RANK)[:, None]
            index = j[:, None] * ld + cols[None, :]
            tile = tl.load(base + index, mask=mask, other=0.0).to(tl.float32)
            if KIND == SPECTRAL:
                share = q[:, None] * tl.sum(y[:, None] * tile, axis=0)[None, :]
            elif KIND == L2:
                share = tl.dot(matrix, tile, input_precision=PRECISION)
            else:
                share = 2.0 * c * tile
            share += tl.load(goal + index, mask=mask, other=0.0).to(tl.float32)
            tl.store(goal + index, share.to(target.dtype.element_ty), mask=mask)
    else:
        start = tl.load(row + 3)
        end = tl.load(row + 4)
        if KIND == SPECTRAL:
            z = tl.load(vectors + at * (3 * R) + R + j)
            k_b = c * tl.load(coefficients + at * 2 + 1)
        elif KIND == L2:
            matrix = tl.load(grams + at * (2 * R * R) + j[:, None] * R + j[None, :]) * (2.0 * c)
        for k in range(start, end, BLOCK):
            rows = k + tl.arange(0, BLOCK)
            mask = (rows < end)[:, None]
            if RANK != R:
                mask = mask & (j < RANK)[None, :]
            index = rows[:, None] * RANK + j[None, :]
            tile = tl.load(base + index, mask=mask, other=0.0).to(tl.float32)
            if KIND == SPECTRAL:
                share = (k_b * tl.sum(tile * z[None, :], axis=1))[:, None] * z[None, :]
            elif KIND == L2:
                share = tl.dot(tile, matrix, input_precision=PRECISION)
            else:
                share = 2.0 * c * tile
            share += tl.load(goal + index, mask=mask, other=0.0).to(tl.float32)
            tl.store(goal + index, share.to(target.dtype.element_ty), mask=mask)
