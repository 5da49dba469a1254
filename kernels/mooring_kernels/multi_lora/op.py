"""The mixed-adapter linear of `reference.py`: rows of one batch use different slots of an arena.

    output[b] += scales[b] · x[b]·A[slots[b]]ᵀ·B[slots[b]]ᵀ        in place

Diffusion tokens are contiguous per batch row, so on the CPU the factors of each row are gathered by slot and
applied by two batched products; on CUDA one kernel (`kernels.py`) does all of it. Everything is static:
shapes depend on the batch only and on a device the slots are a tensor that the host never reads, so a CUDA
graph or a compiled graph holds for every mixture.

Rows of slot 0 keep the base's bits, the sign of a zero included. Adding a computed zero would not do, as
−0.0 + 0.0 is +0.0: such rows are left out of the sum, not summed with nothing.

Shape legend: N batch rows, T tokens of a row, S slots, r rank, n layers that share one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout

Slots = Tensor | int
Backend = Literal["auto", "torch", "triton"]


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
    scales: Tensor | float | None = None,
    *,
    grads: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add each row's low-rank share to a linear layer's output, in place and differentiably.

    Args:
        output: `[N, T, out]` or `[N, out]`, what the base layer gave for `x`; no leaf that requires grad.
        x: `[N, T, in]` or `[N, in]`. Products run in the dtype of `output`.
        A: `[S, r, in]`, a (strided) view of the arena, any float dtype.
        B: `[S, out, r]`. Slot 0 is zero in both.
        slots: `[N]` int64: the slot of each row. Or an int: all rows use this slot, which is a plain LoRA
            (slot 0 is then a slot like any other; its bits may differ from the batched products').
        scales: `[N]` factor on ΔW; or one number, only beside an int; or None for 1.
        grads: where gradients are summed, shaped as A and B: views of a flat gradient `[S, size]`. A and B
            then must require grad and receive none through autograd: nothing of an arena's size is allocated.
        backend: "triton" needs CUDA; "auto" takes it there.

    Returns:
        `output`. Gradients of rows that share a slot are summed; on CUDA the order for three or more such
        rows is fixed only under `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: when shapes disagree or `grads` are given for factors that do not require grad.
        TypeError: for a tensor of scales beside an int, or a number beside a tensor of slots.
    """
    given = None if grads is None else (grads[0].unsqueeze(1), (grads[1],))
    found = multi_lora_shared_(
        (output,), x, A.unsqueeze(1), (B,), slots, scales, grads=given, backend=backend
    )
    return found[0]


def multi_lora_shared_(
    outputs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    Bs: Sequence[Tensor],
    slots: Slots,
    scales: Tensor | float | None = None,
    *,
    grads: tuple[Tensor, Sequence[Tensor]] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """As `multi_lora_` for n layers that read the same x: one first product for all of them.

    Args:
        outputs: n tensors `[N, T, out_i]` or `[N, out_i]`, changed in place.
        x: `[N, T, in]` or `[N, in]`.
        A: `[S, n, r, in]`; `stacked` gives it as a view.
        Bs: n tensors `[S, out_i, r]`.
        slots: as for `multi_lora_`, and so are the others.
        scales: as for `multi_lora_`.
        grads: as for `multi_lora_`: one for A `[S, n, r, in]`, one for each B.
        backend: as for `multi_lora_`.

    Returns:
        `outputs`.

    Raises:
        ValueError: as `multi_lora_`.
        TypeError: as `multi_lora_`.
    """
    _check(outputs, x, A, Bs, slots, scales)
    factors = (A, *Bs)
    if grads is not None and not all(factor.requires_grad for factor in factors):
        raise ValueError("grads are given for factors that do not require grad")
    sums = None if grads is None else (grads[0], *grads[1])
    triton = backend == "triton" or (backend == "auto" and x.is_cuda and isinstance(slots, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors, *outputs)):
        found: tuple[Tensor, ...] = _MultiLora.apply(  # type: ignore[no-untyped-call]
            x, slots, scales, sums, triton, len(outputs), *factors, *outputs
        )
        return found
    _forward(x, slots, scales, factors, outputs, triton=triton, keep_low=False)
    return tuple(outputs)


class _MultiLora(torch.autograd.Function):
    """The sum into `outputs`; gradients by the formulas of `reference.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slots: Slots,
        scales: Tensor | float | None,
        sums: tuple[Tensor, ...] | None,
        triton: bool,
        n: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        factors, outputs = tensors[: n + 1], tensors[n + 1 :]
        low = _forward(x, slots, scales, factors, outputs, triton=triton, keep_low=True)
        ctx.mark_dirty(*outputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, low, *factors, *(t for t in (slots, scales) if isinstance(t, Tensor)))
        ctx.slot = None if isinstance(slots, Tensor) else slots
        ctx.scale = None if isinstance(scales, Tensor) else scales
        ctx.scaled = isinstance(scales, Tensor)
        ctx.sums, ctx.triton, ctx.n, ctx.dtype = sums, triton, n, outputs[0].dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return tuple([None] * (7 + 2 * ctx.n))
        x, low, *rest = ctx.saved_tensors
        factors, rest = rest[: ctx.n + 1], rest[ctx.n + 1 :]
        slots: Slots = rest.pop(0) if ctx.slot is None else ctx.slot
        scales = rest.pop(0) if ctx.scaled else ctx.scale
        needs_x, needs_factors = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6 : 7 + ctx.n])
        A, *Bs = factors
        rank = A.shape[2]
        grad_x, hidden = _backward_x(ctx, grads, x.shape, A, Bs, slots, scales, needs_x=needs_x)
        factor_grads: list[Tensor | None] = [None] * (ctx.n + 1)
        if needs_factors:
            for i, (grad, B) in enumerate(zip(grads, Bs, strict=True)):
                if grad is not None:
                    rows = torch.bmm(_tokens(grad, slots).mT, low[..., i * rank : (i + 1) * rank])
                    factor_grads[i + 1] = _summed(rows, B, slots, ctx.sums, i + 1)
            rows = torch.bmm(hidden.mT, _tokens(x, slots).to(ctx.dtype)).view(-1, ctx.n, rank, A.shape[3])
            factor_grads[0] = _summed(rows, A, slots, ctx.sums, 0)
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype)
        return (grad_x, None, None, None, None, None, *factor_grads, *grads)


def _backward_x(
    ctx: Any,
    grads: Sequence[Tensor | None],
    shape: torch.Size,
    A: Tensor,
    Bs: Sequence[Tensor],
    slots: Slots,
    scales: Tensor | float | None,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """∂L/∂x in the dtype of the products, if needed, and scale·g·B `[N, T, n·r]`."""
    rank = A.shape[2]
    if ctx.triton and needs_x and len(Bs) == 1 and grads[0] is not None:
        from mooring_kernels.multi_lora.kernels import apply_

        assert isinstance(slots, Tensor)
        assert not isinstance(scales, float | int)
        g = _tokens(grads[0], slots).contiguous()
        grad_x = g.new_empty(*g.shape[:2], shape[-1])
        hidden = apply_(grad_x, g, Bs[0].mT, A[:, 0], slots, scales, add=False, keep_low=True)
        assert hidden is not None
        return grad_x.view(shape), hidden
    parts = [
        torch.bmm(_tokens(grad, slots), _rows(B, slots, ctx.dtype)) if grad is not None else None
        for grad, B in zip(grads, Bs, strict=True)
    ]
    known = next(part for part in parts if part is not None)
    parts_or_zero = [torch.zeros_like(known[..., :rank]) if part is None else part for part in parts]
    hidden = _scaled(known if len(parts) == 1 else torch.cat(parts_or_zero, -1), scales)
    if not needs_x:
        return None, hidden
    return torch.bmm(hidden, _rows(A, slots, ctx.dtype).flatten(1, 2)).reshape(shape), hidden


def _summed(
    rows_grad: Tensor, factor: Tensor, slots: Slots, sums: tuple[Tensor, ...] | None, index: int
) -> Tensor | None:
    """Row gradients in their slots: into `sums[index]`, or as a gradient for autograd."""
    into = torch.zeros_like(factor, memory_format=torch.contiguous_format) if sums is None else sums[index]
    if isinstance(slots, int):
        into[slots].add_(rows_grad[0])
    else:
        into.index_add_(0, slots, rows_grad.to(into.dtype))
    return into if sums is None else None


def _forward(
    x: Tensor,
    slots: Slots,
    scales: Tensor | float | None,
    factors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    triton: bool,
    keep_low: bool,
) -> Tensor:
    """Add the shares to `outputs`; gives scale·x·Aᵀ `[N, T, n·r]` (anything, without `keep_low`)."""
    A, *Bs = factors
    dtype = outputs[0].dtype
    tokens = _tokens(x, slots).to(dtype)
    if triton:
        return _triton_forward(tokens.contiguous(), slots, scales, factors, outputs, keep_low=keep_low)
    rank = A.shape[2]
    low = _scaled(torch.bmm(tokens, _rows(A, slots, dtype).flatten(1, 2).mT), scales)
    base = _base_rows(slots)
    for i, (output, B) in enumerate(zip(outputs, Bs, strict=True)):
        _add(output, low[..., i * rank : (i + 1) * rank], _rows(B, slots, dtype).mT, slots, base)
    return low


def _add(output: Tensor, low: Tensor, expand: Tensor, slots: Slots, base: Tensor | None) -> None:
    """`output += low·expand`, except in base rows."""
    shaped = _tokens(output, slots)
    if base is not None:
        shaped.copy_(torch.where(base, shaped, torch.baddbmm(shaped, low, expand)))
    elif shaped.data_ptr() == output.data_ptr():
        shaped.baddbmm_(low, expand)
    else:
        output.add_(torch.bmm(low, expand).view(output.shape))


def _base_rows(slots: Slots) -> Tensor | None:
    """`[N, 1, 1]` where the slot is 0; None where there is no such row, if that is known without a wait."""
    if isinstance(slots, int):
        return None
    base = slots == 0
    known = slots.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if known and not bool(base.any()) else base[:, None, None]


def _triton_forward(
    tokens: Tensor,
    slots: Slots,
    scales: Tensor | float | None,
    factors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    keep_low: bool,
) -> Tensor:
    from mooring_kernels.multi_lora.kernels import apply_

    assert isinstance(slots, Tensor)
    assert not isinstance(scales, float | int)
    A, *Bs = factors
    lows = [
        apply_(_tokens(out, slots), tokens, A[:, i], B.mT, slots, scales, add=True, keep_low=keep_low)
        for i, (out, B) in enumerate(zip(outputs, Bs, strict=True))
    ]
    if not keep_low:
        return tokens
    kept = [low for low in lows if low is not None]
    return kept[0] if len(kept) == 1 else torch.cat(kept, -1)


def _tokens(t: Tensor, slots: Slots) -> Tensor:
    """`[N, T, width]`; all rows as one when they share a slot, which makes the products plain matrices'."""
    if isinstance(slots, int):
        return t.reshape(1, -1, t.shape[-1])
    return t.unsqueeze(1) if t.ndim == 2 else t


def _rows(factor: Tensor, slots: Slots, dtype: torch.dtype) -> Tensor:
    """The factors `[N, …]` of each row, in the dtype of the products."""
    if isinstance(slots, int):
        return factor[slots : slots + 1].to(dtype)
    return factor.index_select(0, slots).to(dtype)


def _scaled(low: Tensor, scales: Tensor | float | None) -> Tensor:
    if scales is None or (not isinstance(scales, Tensor) and scales == 1.0):
        return low
    return low.mul_(scales if not isinstance(scales, Tensor) else scales.to(low.dtype)[:, None, None])


def _check(
    outputs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    Bs: Sequence[Tensor],
    slots: Slots,
    scales: Tensor | float | None,
) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [N, in] or [N, T, in], not {_shape(x)}")
    rows = x.shape[0]
    if isinstance(slots, Tensor):
        if slots.shape != (rows,) or (isinstance(scales, Tensor) and scales.shape != (rows,)):
            raise ValueError(f"x has {rows} rows, slots {_shape(slots)}, scales {_shape(scales)}")
        if isinstance(scales, float | int):
            raise TypeError("scales must be a tensor [N] beside a tensor of slots")
    elif isinstance(scales, Tensor):
        raise TypeError("one slot for all rows takes one scale, a number")
    if A.ndim != 4 or A.shape[3] != x.shape[-1] or not A.shape[1] == len(Bs) == len(outputs):
        raise ValueError(f"A {_shape(A)} does not fit x {_shape(x)} and {len(outputs)} outputs")
    for output, B in zip(outputs, Bs, strict=True):
        expected = (A.shape[0], output.shape[-1], A.shape[2])
        if output.shape[:-1] != x.shape[:-1] or B.shape != expected:
            raise ValueError(
                f"B {_shape(B)} does not fit output {_shape(output)}, x {_shape(x)}, A {_shape(A)}"
            )


def _shape(value: Tensor | float | None) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else str(value)
