# ruff: noqa: ANN001, ANN202 - Triton reads annotations as types of its own
"""The mixed-adapter linear as one Triton kernel: both products, gather, scale and sum in one launch.

A program owns some tokens of one row: it multiplies them into r numbers each, keeps those in registers and
adds their expansion to the output in place. The factors are read from the arena where they lie, by the slot
in device memory; a row of slot 0 is left alone, so its bits are the base's by construction. The same kernel
with transposed factors is the backward pass with respect to x.

Shape legend: N rows, T tokens, K inner width, M output width, R rank padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROCESSORS = 132
"""Multiprocessors of an H100 or H200; smaller devices just get smaller programs than they need."""


@triton.jit  # type: ignore[untyped-decorator]
def _apply_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    low_out,
    first,
    second,
    slots,
    scales,
    T,
    K,
    M,
    rank,
    x_row,
    x_token,
    out_row,
    out_token,
    first_slot,
    first_r,
    first_k,
    second_slot,
    second_r,
    second_m,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADD: tl.constexpr,
    KEEP_LOW: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, R)
    in_t = t[:, None] < T
    in_r = r < rank
    low = tl.zeros((BLOCK_T, R), dtype=tl.float32)
    if slot != 0:
        x_at = x + row * x_row + t[:, None].to(tl.int64) * x_token
        first_at = first + slot * first_slot + r[None, :] * first_r
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tokens = tl.load(x_at + k[None, :], mask=in_t & (k[None, :] < K), other=0.0)
            factor = tl.load(
                first_at + k[:, None] * first_k, mask=in_r[None, :] & (k[:, None] < K), other=0.0
            )
            low = tl.dot(tokens, factor.to(tokens.dtype), low, input_precision="ieee")
        if SCALED:
            low *= tl.load(scales + row).to(tl.float32)
    if KEEP_LOW:
        tl.store(
            low_out + (row * T + t[:, None]) * rank + r[None, :],
            low.to(low_out.dtype.element_ty),
            mask=in_t & in_r[None, :],
        )
    if slot != 0 or not ADD:
        compute = low.to(out.dtype.element_ty)
        out_at = out + row * out_row + t[:, None].to(tl.int64) * out_token
        second_at = second + slot * second_slot + r[:, None] * second_r
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            inside = in_t & (m[None, :] < M)
            factor = tl.load(
                second_at + m[None, :] * second_m, mask=in_r[:, None] & (m[None, :] < M), other=0.0
            )
            delta = tl.dot(compute, factor.to(compute.dtype), input_precision="ieee")
            if ADD:
                delta += tl.load(out_at + m[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(out_at + m[None, :], delta.to(out.dtype.element_ty), mask=inside)


def apply_(
    out: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    slots: Tensor,
    scales: Tensor | None,
    *,
    add: bool,
    keep_low: bool,
) -> Tensor | None:
    """`out[b] (+)= scales[b] · x[b]·first[slots[b]]ᵀ·second[slots[b]]` in one launch.

    Args:
        out: `[N, T, M]`, last dimension contiguous; changed in place.
        x: `[N, T, K]` of the same dtype, last dimension contiguous.
        first: `[S, r, K]`, any strides and float dtype.
        second: `[S, r, M]`, any strides and float dtype.
        slots: `[N]` integers.
        scales: `[N]` or None for 1.
        add: add to `out`, leaving rows of slot 0 alone; else overwrite it (rows of slot 0 get zero if
            that slot is zero).
        keep_low: also give the first product.

    Returns:
        scales·x·firstᵀ `[N, T, r]` in the dtype of `x` if `keep_low`, else None.
    """
    rows, tokens, width = x.shape
    rank = first.shape[1]
    low = x.new_empty(rows, tokens, rank) if keep_low else None
    block_t, block_k, block_m, warps = _blocks(rows, tokens, rank, x.dtype)
    _apply_kernel[(triton.cdiv(tokens, block_t), rows)](
        x,
        out,
        x if low is None else low,
        first,
        second,
        slots,
        slots if scales is None else scales,
        tokens,
        width,
        out.shape[2],
        rank,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        *first.stride(),
        *second.stride(),
        R=max(16, 1 << (rank - 1).bit_length()),
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_M=block_m,
        ADD=add,
        KEEP_LOW=keep_low,
        SCALED=scales is not None,
        num_warps=warps,
    )
    return low


def _blocks(rows: int, tokens: int, rank: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tokens, inner and outer columns of a program, and its warps: enough programs first, then reuse."""
    block_t = 16 if dtype == torch.float32 and rank > 32 else 64  # IEEE products of larger blocks spill
    while block_t > 16 and rows * triton.cdiv(tokens, block_t) < _PROCESSORS:
        block_t //= 2
    columns = 64 if dtype == torch.float32 or rank > 64 else 128
    return block_t, columns, columns, 4
