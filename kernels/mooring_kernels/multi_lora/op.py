"""The mixed-adapter linear of `reference.py`: rows of one batch use different slots of an arena.

    output[b] += scales[b] · x[b]·A[slots[b]]ᵀ·B[slots[b]]ᵀ        in place

Diffusion tokens are contiguous per batch row, so the factors of each row are gathered by slot and applied by
two batched products; when all rows use one slot that the host knows, it is a plain LoRA. Shapes depend on the
batch only, and on a device the host never reads the slots, so a CUDA graph or a compiled graph holds for
every mixture.

Rows of slot 0 keep the base's bits, the sign of a zero included. Adding a computed zero would not do, as
−0.0 + 0.0 is +0.0: such rows get back what they held.

Shape legend: N batch rows, T tokens of a row, S slots, r rank, n layers that share one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring_kernels.arena import ArenaLayout

Slots = Tensor | int
Scales = Tensor | float | None


def stacked(layout: ArenaLayout, flat: Tensor, names: Sequence[str]) -> Tensor:
    """The A factors of layers that read the same input (q, k, v) as one view, for a shared first product.

    Args:
        layout: of `flat`.
        flat: `[..., size]`.
        names: layers of one shape that lie next to each other in their group, in that order.

    Returns:
        `[..., n, r, in]`, no copy.

    Raises:
        ValueError: when the layers are not neighbours of one group.
    """
    indices = [layout.names.index(name) for name in names]
    for group in layout.groups:
        if indices[0] in group.indices:
            first = group.indices.index(indices[0])
            if list(group.indices[first : first + len(indices)]) == indices:
                return group.views(flat)[0].narrow(-3, first, len(indices))
    raise ValueError(f"these layers are not neighbours of one shape: {', '.join(names)}")


def multi_lora_(
    output: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    slots: Slots,
    scales: Scales = None,
    *,
    base_rows: Tensor | None = None,
    grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Add each row's low-rank share to a linear layer's output, in place and differentiably.

    Args:
        output: `[N, T, out]` or `[N, out]`, what the base layer gave for `x`; no leaf that requires grad.
        x: `[N, T, in]` or `[N, in]`. Products run in the dtype of `output`.
        A: `[S, r, in]`, a (strided) view of the arena, any float dtype.
        B: `[S, out, r]`. Slot 0 is zero in both.
        slots: `[N]` int64: the slot of each row. Or an int: all rows use this slot, which is computed and
            differentiated as a plain LoRA (slot 0 is then a slot like any other, and the bits may differ from
            those of the batched products).
        scales: `[N]` factor on ΔW; or one number, only beside an int; or None for 1.
        base_rows: indices of the rows of slot 0, for a caller that knows them and calls for many layers (it
            may be empty). Absent, the CPU looks for them; a device finds them in `slots` by itself.
        grads: where gradients are summed, shaped as A and B: views of a flat gradient `[S, size]`. A and B
            then must require grad and receive none through autograd: nothing of an arena's size is allocated.
            Only beside a tensor of slots.

    Returns:
        `output`. Gradients of rows that share a slot are summed; on CUDA the order for three or more such
        rows is fixed only under `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: when shapes disagree or `grads` are given for factors that do not require grad.
        TypeError: for a tensor of scales beside an int, or a number beside a tensor of slots.
    """
    return _run((output,), x, A, (B,), slots, scales, base_rows, grads)[0]


def multi_lora_shared_(
    outputs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    Bs: Sequence[Tensor],
    slots: Slots,
    scales: Scales = None,
    *,
    base_rows: Tensor | None = None,
    grads: tuple[Tensor, Sequence[Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """As `multi_lora_` for n layers that read the same x: one first product for all of them.

    Args:
        outputs: n tensors `[N, T, out_i]` or `[N, out_i]`, changed in place.
        x: `[N, T, in]` or `[N, in]`.
        A: `[S, n, r, in]`; `stacked` gives it as a view.
        Bs: n tensors `[S, out_i, r]`.
        slots: as for `multi_lora_`, and so are the others.
        scales: factors.
        base_rows: rows of slot 0.
        grads: one for A `[S, n, r, in]`, one for each B.

    Returns:
        `outputs`.

    Raises:
        ValueError: as `multi_lora_`.
        TypeError: as `multi_lora_`.
    """
    if A.ndim != 4 or A.shape[1] != len(Bs):
        raise ValueError(f"A {_shape(A)} is not [S, n, r, in] for {len(Bs)} layers")
    sums = None if grads is None else (grads[0], *grads[1])
    return _run(tuple(outputs), x, A, tuple(Bs), slots, scales, base_rows, sums)


def _run(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    A: Tensor,
    Bs: tuple[Tensor, ...],
    slots: Slots,
    scales: Scales,
    base_rows: Tensor | None,
    sums: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    _check(outputs, x, A, Bs, slots, scales)
    factors = (A, *Bs)
    if sums is not None and not all(factor.requires_grad for factor in factors):
        raise ValueError("grads are given for factors that do not require grad")
    if isinstance(slots, int):
        if sums is not None:
            raise ValueError("grads are for a tensor of slots; one slot's gradients come through autograd")
        assert not isinstance(scales, Tensor)
        return _plain(x, slots, 1.0 if scales is None else scales, A, Bs, outputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors, *outputs)):
        found: tuple[Tensor, ...] = _MultiLora.apply(  # type: ignore[no-untyped-call]
            x, slots, scales, base_rows, sums, len(outputs), *factors, *outputs
        )
        return found
    assert not isinstance(scales, float | int)
    _forward(x, slots, scales, A, Bs, outputs, base_rows)
    return outputs


class _MultiLora(torch.autograd.Function):
    """The sum into `outputs`; gradients by the formulas of `reference.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slots: Tensor,
        scales: Tensor | None,
        base_rows: Tensor | None,
        sums: tuple[Tensor, ...] | None,
        n: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        (A, *Bs), outputs = tensors[: n + 1], tensors[n + 1 :]
        low = _forward(x, slots, scales, A, Bs, outputs, base_rows)
        ctx.mark_dirty(*outputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, low, slots, scales, A, *Bs)
        ctx.sums, ctx.n, ctx.dtype = sums, n, outputs[0].dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n: int = ctx.n
        factor_grads: list[Tensor | None] = [None] * (n + 1)
        if all(grad is None for grad in grads):
            return (None,) * 6 + (*factor_grads, *grads)
        x, low, slots, scales, A, *Bs = ctx.saved_tensors
        rank = A.shape[-2]
        # ∂L/∂(xAᵀ), one share for each layer
        shares = [
            torch.zeros_like(low[..., :rank])
            if grad is None
            else torch.bmm(_tokens(grad), _rows(B, slots, ctx.dtype))
            for grad, B in zip(grads, Bs, strict=True)
        ]
        hidden = _scaled(shares[0] if n == 1 else torch.cat(shares, -1), scales)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(hidden, _rows(A, slots, ctx.dtype)).view(x.shape).to(x.dtype)
        if any(ctx.needs_input_grad[6 : 7 + n]):
            rows = torch.bmm(hidden.mT, _tokens(x).to(ctx.dtype))
            factor_grads[0] = _summed(rows, A, slots, None if ctx.sums is None else ctx.sums[0])
            for i, (grad, part) in enumerate(zip(grads, torch.split(low, rank, -1), strict=True), 1):
                if grad is not None:
                    rows = torch.bmm(_tokens(grad).mT, part)
                    into = None if ctx.sums is None else ctx.sums[i]
                    factor_grads[i] = _summed(rows, Bs[i - 1], slots, into)
        return (grad_x, None, None, None, None, None, *factor_grads, *grads)


def _summed(rows: Tensor, factor: Tensor, slots: Tensor, into: Tensor | None) -> Tensor | None:
    """Row gradients in their slots: added to `into`, or as a gradient for autograd."""
    found = torch.zeros_like(factor, memory_format=torch.contiguous_format) if into is None else into
    found.index_add_(0, slots, rows.view(-1, *factor.shape[1:]).to(found.dtype))
    return found if into is None else None


def _forward(
    x: Tensor,
    slots: Tensor,
    scales: Tensor | None,
    A: Tensor,
    Bs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    base_rows: Tensor | None,
) -> Tensor:
    """Add the shares to `outputs`; gives scale·x·Aᵀ `[N, T, n·r]`."""
    dtype = outputs[0].dtype
    low = _scaled(torch.bmm(_tokens(x).to(dtype), _rows(A, slots, dtype).mT), scales)
    if base_rows is None:
        base_rows = _find_base_rows(slots)
    parts = (low,) if len(Bs) == 1 else torch.split(low, A.shape[-2], -1)
    for output, part, B in zip(outputs, parts, Bs, strict=True):
        expand = _rows(B, slots, dtype).mT
        out = _tokens(output)
        if base_rows is None:
            out.copy_(torch.where((slots == 0)[:, None, None], out, torch.baddbmm(out, part, expand)))
        elif base_rows.shape[0]:
            untouched = out.index_select(0, base_rows)
            out.baddbmm_(part, expand).index_copy_(0, base_rows, untouched)
        else:
            out.baddbmm_(part, expand)
    return low


def _plain(
    x: Tensor,
    slot: int,
    scale: float,
    A: Tensor,
    Bs: Sequence[Tensor],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """One adapter for all rows, by operations that autograd knows: a Python function costs more per layer."""
    dtype = outputs[0].dtype
    one = _one(A, slot).to(dtype)
    low = F.linear(x.to(dtype), one.flatten(0, 1) if one.ndim == 3 else one)
    parts = (low,) if len(Bs) == 1 else torch.split(low, A.shape[-2], -1)
    for output, part, B in zip(outputs, parts, Bs, strict=True):
        expand = _one(B, slot).to(dtype)
        if output.is_contiguous() and not torch.is_grad_enabled():
            output.view(-1, output.shape[-1]).addmm_(part.flatten(0, -2), expand.mT, alpha=scale)
        else:
            output.add_(F.linear(part, expand), alpha=scale)
    return outputs


def _one(factor: Tensor, slot: int) -> Tensor:
    """A slot's factor; of a bank of one, a view whose gradient needs no bank of zeros."""
    return factor.squeeze(0) if factor.shape[0] == 1 and slot == 0 else factor[slot]


def _find_base_rows(slots: Tensor) -> Tensor | None:
    """Indices of rows of slot 0; None where looking would wait for a device or break a compiled graph."""
    if slots.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return slots.eq(0).nonzero().flatten()


def _tokens(t: Tensor) -> Tensor:
    """`[N, T, width]`."""
    return t.unsqueeze(1) if t.ndim == 2 else t


def _rows(factor: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors of each row in the dtype of the products: B `[N, out, r]`, A `[N, r or n·r, in]`."""
    rows = factor.index_select(0, slots).to(dtype)
    return rows.flatten(1, 2) if rows.ndim == 4 else rows


def _scaled(low: Tensor, scales: Tensor | None) -> Tensor:
    return low if scales is None else low.mul_(scales.to(low.dtype)[:, None, None])


def _check(
    outputs: Sequence[Tensor], x: Tensor, A: Tensor, Bs: Sequence[Tensor], slots: Slots, scales: Scales
) -> None:
    shape, count, rank = x.shape, A.shape[0], A.shape[-2]
    if len(shape) not in (2, 3):
        raise ValueError(f"x must be [N, in] or [N, T, in], not {_shape(x)}")
    if isinstance(slots, Tensor):
        if slots.shape != shape[:1] or (isinstance(scales, Tensor) and scales.shape != shape[:1]):
            raise ValueError(f"x has {shape[0]} rows, slots {_shape(slots)}, scales {_shape(scales)}")
        if isinstance(scales, float | int):
            raise TypeError("scales must be a tensor [N] beside a tensor of slots")
    elif isinstance(scales, Tensor):
        raise TypeError("one slot for all rows takes one scale, a number")
    if A.shape[-1] != shape[-1] or len(Bs) != len(outputs):
        raise ValueError(f"A {_shape(A)} does not fit x {_shape(x)} and {len(outputs)} outputs")
    for output, B in zip(outputs, Bs, strict=True):
        out = output.shape
        if out[:-1] != shape[:-1] or B.shape != (count, out[-1], rank):
            raise ValueError(
                f"B {_shape(B)} does not fit output {_shape(output)}, x {_shape(x)}, A {_shape(A)}"
            )


def _shape(value: Tensor | float | None) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else str(value)
