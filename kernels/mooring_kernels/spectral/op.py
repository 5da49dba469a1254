"""The penalties of `reference.py` for a whole network: what callers use.

One interface, two paths: Triton on CUDA (`kernels.py`: three launches, float32 accumulation, no host
synchronisation) and batched PyTorch everywhere else (`torch_path.py`: float64 solve). Both give values and
gradients of every layer, for one flat buffer `[size]` or for chosen slots of a whole bank `[S, size]`.

A strength λ is a number, a 0-d tensor, or one value per slot `[T]`; a tensor is read where it lies, so a
controller may change it between replays of a CUDA graph. Values that are not finite are not looked for here
(that would wait for the device): they come out as NaN norms of the layer. `check_finite` names the layer.

Shape legend: L layers, S slots of the bank, T slots that are handled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.arena import ArenaLayout
from mooring_kernels.spectral import torch_path

if TYPE_CHECKING:
    from mooring_kernels.spectral.plan import Plan

Kind = Literal["spectral", "l2", "factor_decay"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Backend = Literal["auto", "torch", "triton"]
Slots = Tensor | Sequence[int] | None


@dataclass(frozen=True)
class SpectralState:
    """Per-layer norms of ΔW, in the order of `ArenaLayout.layers`.

    Args:
        sigma2: `[L]` (one buffer) or `[T, L]` (a bank): σ_max(B_l A_l)². float64, or float32 from Triton.
        fro2: likewise ‖B_l A_l‖_F².
    """

    sigma2: Tensor
    fro2: Tensor

    @property
    def sigma_max(self) -> float:
        """The largest operator norm of any layer's update. Waits for the device."""
        return float(self.sigma2.max().sqrt())


def penalty(
    layout: ArenaLayout, flat: Tensor, *, slots: Slots = None, backend: Backend = "auto"
) -> SpectralState:
    """σ_max² and ‖·‖_F² of every layer's update.

    Args:
        layout: of `flat`.
        flat: factors `[size]`, or a bank `[S, size]`; float32, bfloat16, or float64 (PyTorch path only).
        slots: distinct rows of the bank to look at; all when absent. A tensor's values are not checked.
        backend: `auto` takes Triton for CUDA tensors.

    Raises:
        ValueError: on a buffer that is not this layout's, or a backend that cannot handle it.
    """
    bank = _Bank(layout, flat, slots, backend)
    with torch.no_grad():
        if bank.triton:
            return bank.state(*bank.measure(cold=True))
        rows = [torch_path.norms(layout, bank.flat[slot]) for slot in bank.host_slots]
        return bank.state(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))


def value(
    layout: ArenaLayout, flat: Tensor, kind: Kind, state: SpectralState, weights: Tensor | None = None
) -> float:
    """The penalty P of `kind` from a state that was computed for `flat`: summed over layers and slots.

    Waits for the device; `spectral_penalty` does not.
    """
    return float(_total(_terms(layout, flat, kind, state), weights))


def add_gradient_(
    layout: ArenaLayout,
    flat: Tensor,
    flat_grad: Tensor,
    lam: float | Tensor,
    *,
    kind: Kind = "spectral",
    weights: Tensor | None = None,
    slots: Slots = None,
    backend: Backend = "auto",
) -> SpectralState:
    """Add λ·∂P/∂flat to `flat_grad` in place (coupled: the optimiser sees it).

    Args:
        layout: of both buffers.
        flat: factors `[size]`, or a bank `[S, size]`.
        flat_grad: `[size]`, or `[T, size]`: row t belongs to `slots[t]`. Padding is left untouched.
        lam: strength λ ≥ 0: a number, 0-d or `[T]`. With the number 0 nothing is added and the state is
            still returned (telemetry).
        kind: which penalty.
        weights: `[L]` layer weights w_l ≥ 0; ones when absent.
        slots: rows of the bank that are trained; all when absent.
        backend: `auto` takes Triton for CUDA tensors.

    Returns:
        The norms of `flat`, whatever the kind.

    Raises:
        ValueError: on an unknown kind, or buffers that do not fit.
    """
    bank = _Bank(layout, flat, slots, backend)
    target = flat_grad if flat_grad.ndim == 2 else flat_grad.unsqueeze(0)
    if target.shape != (bank.count, layout.size):
        raise ValueError(f"flat_grad {list(flat_grad.shape)} has not one row for each of {bank.count} slots")
    return _share(bank, target, lam, None, kind, weights, in_bank=False)


def decay_(
    layout: ArenaLayout,
    flat: Tensor,
    lam: float | Tensor,
    rate: float | Tensor,
    *,
    kind: Kind = "spectral",
    weights: Tensor | None = None,
    slots: Slots = None,
    backend: Backend = "auto",
) -> SpectralState:
    """Subtract rate·λ·∂P/∂flat from the parameters themselves (decoupled "spectral decay").

    As AdamW decouples weight decay (arXiv 1711.05101): the step is not rescaled by Adam's moments.

    Args:
        layout: of `flat`.
        flat: `[size]` or `[S, size]`, changed in place; bfloat16 loses steps below its resolution.
        lam: as for `add_gradient_`.
        rate: learning rate, a number or a 0-d tensor.
        kind: as for `add_gradient_`, and so are the others.
        weights: layer weights.
        slots: rows to change.
        backend: which path.

    Returns:
        The norms before the step.

    Raises:
        ValueError: as `add_gradient_`.
    """
    bank = _Bank(layout, flat, slots, backend)
    return _share(bank, bank.flat, lam, rate, kind, weights, in_bank=True)


def spectral_penalty(
    layout: ArenaLayout,
    flat: Tensor,
    *,
    kind: Kind = "spectral",
    lam: float | Tensor = 1.0,
    weights: Tensor | None = None,
    slots: Slots = None,
    backend: Backend = "auto",
) -> Tensor:
    """λ·P as a 0-d tensor that autograd can differentiate with respect to `flat`.

    Args:
        layout: of `flat`.
        flat: `[size]` or `[S, size]`.
        kind: which penalty.
        lam: as for `add_gradient_`; it receives no gradient.
        weights: as for `add_gradient_`, and so are the others.
        slots: rows that count.
        backend: which path.

    Raises:
        ValueError: as `add_gradient_`.
    """
    found: Tensor = _Penalty.apply(flat, layout, kind, lam, weights, slots, backend)  # type: ignore[no-untyped-call]
    return found


def host_slots(flat: Tensor, slots: Slots) -> list[int]:
    """The rows that are handled, as numbers; waits for the device when `slots` lie there."""
    if slots is None:
        return list(range(flat.shape[0] if flat.ndim == 2 else 1))
    return [int(slot) for slot in (slots.tolist() if isinstance(slots, Tensor) else slots)]


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        layout: ArenaLayout,
        kind: Kind,
        lam: float | Tensor,
        weights: Tensor | None,
        slots: Slots,
        backend: Backend,
    ) -> Tensor:
        bank = _Bank(layout, flat.detach(), slots, backend)
        rows = torch.zeros(bank.count, layout.size, dtype=flat.dtype, device=flat.device)
        state = _share(bank, rows, 1.0, None, kind, weights, in_bank=False)
        terms = _terms(layout, bank.rows(), kind, state).view(bank.count, -1)
        ctx.single = flat.ndim == 1
        ctx.shape = flat.shape
        strength = torch.as_tensor(lam, dtype=terms.dtype, device=flat.device)
        ctx.save_for_backward(rows, strength, bank.device_slots.long())
        per_slot = (terms if weights is None else terms * weights.to(terms)).sum(-1)
        return (per_slot * strength).sum().to(torch.float64 if flat.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, strength, slots = ctx.saved_tensors
        scaled = rows * (outputs[0] * strength).to(rows.dtype).reshape(-1, 1)
        if ctx.single:
            return (scaled[0], *[None] * 6)
        full = torch.zeros(ctx.shape, dtype=rows.dtype, device=rows.device)
        return (full.index_copy(0, slots, scaled), *[None] * 6)


class _Bank:
    """The arguments, brought to one form: a bank `[S, size]` and T slots."""

    def __init__(self, layout: ArenaLayout, flat: Tensor, slots: Slots, backend: Backend) -> None:
        if flat.shape[-1] != layout.size or flat.ndim > 2:
            raise ValueError(f"this layout's buffers have {layout.size} elements, not {list(flat.shape)}")
        if flat.ndim == 1 and slots is not None:
            raise ValueError("slots are given for a single buffer")
        if slots is not None and not isinstance(slots, Tensor):
            outside = [slot for slot in slots if not 0 <= slot < flat.shape[0]]
            if outside or len(set(slots)) != len(slots):
                raise ValueError(f"slots {list(slots)} are not distinct rows of a bank of {flat.shape[0]}")
        self.layout = layout
        self.single = flat.ndim == 1
        self.flat = flat.unsqueeze(0) if self.single else flat
        self.slots = slots
        self.count = self.flat.shape[0] if slots is None else len(slots)
        self.triton = _choose(self.flat, backend)

    @property
    def host_slots(self) -> list[int]:
        """Slots as numbers, for the PyTorch path."""
        return host_slots(self.flat, self.slots)

    @property
    def device_slots(self) -> Tensor:
        """int32 `[T]` on the device; a list is copied there once."""
        if self.slots is None:
            return self.plan.sequence if self.triton else torch.arange(self.count, device=self.flat.device)
        if isinstance(self.slots, Tensor):
            return self.slots.to(torch.int32)
        key = ("slots", self.flat.device, tuple(self.slots))
        known: Tensor | None = self.layout.cache.get(key)
        if known is None:
            known = torch.tensor(self.slots, dtype=torch.int32, device=self.flat.device)
            self.layout.cache[key] = known
        return known

    @property
    def plan(self) -> Plan:
        """Tables and scratch, one for each list of slots (for their number where a tensor lists them)."""
        from mooring_kernels.spectral.plan import Plan

        which = self.count if isinstance(self.slots, Tensor) or self.slots is None else tuple(self.slots)
        key = ("plan", self.flat.device, which)
        known: Plan | None = self.layout.cache.get(key)
        if known is None:
            known = Plan(self.layout, self.flat.device, self.count)
            self.layout.cache[key] = known
        return known

    def rows(self) -> Tensor:
        """The handled rows, `[T, size]`."""
        return self.flat if self.slots is None else self.flat.index_select(0, self.device_slots)

    def state(self, sigma2: Tensor, fro2: Tensor) -> SpectralState:
        return SpectralState(sigma2[0], fro2[0]) if self.single else SpectralState(sigma2, fro2)

    def measure(self, *, grams: bool = False, cold: bool = False) -> tuple[Tensor, Tensor]:
        """Gram and solve; `cold` is exact at every rank, without it rank 128 may lag a step behind."""
        from mooring_kernels.spectral import launch

        norms = torch.empty(2, self.count, len(self.layout.layers), device=self.flat.device)
        launch.gram(self.plan, self.flat, self.device_slots)
        launch.solve(self.plan, norms[0], norms[1], grams=grams, cold=cold)
        return norms[0], norms[1]

    def strength(self, lam: float | Tensor) -> tuple[Tensor, float]:
        """λ as `[T]` on the device and a factor of the host."""
        if isinstance(lam, Tensor):
            return lam.to(self.flat.device).expand(self.count).contiguous(), 1.0
        return self.plan.ones, float(lam)


def _share(
    bank: _Bank,
    target: Tensor,
    lam: float | Tensor,
    rate: float | Tensor | None,
    kind: Kind,
    weights: Tensor | None,
    *,
    in_bank: bool,
) -> SpectralState:
    if kind not in KINDS:
        raise ValueError(f"unknown penalty {kind!r}; one of {', '.join(KINDS)}")
    with torch.no_grad():
        if bank.triton:
            return _share_triton(bank, target, lam, rate, kind, weights, in_bank=in_bank)
        step: float | Tensor = 1.0 if rate is None else -rate
        found = []
        for row, slot in enumerate(bank.host_slots):
            mine = lam[row] if isinstance(lam, Tensor) and lam.ndim else lam
            found.append(
                torch_path.add_share_(
                    bank.layout,
                    bank.flat[slot],
                    target[slot if in_bank else row],
                    mine * step,
                    kind=kind,
                    weights=weights,
                )
            )
        return bank.state(torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]))


def _share_triton(
    bank: _Bank,
    target: Tensor,
    lam: float | Tensor,
    rate: float | Tensor | None,
    kind: Kind,
    weights: Tensor | None,
    *,
    in_bank: bool,
) -> SpectralState:
    from mooring_kernels.spectral import launch

    sigma2, fro2 = bank.measure(grams=kind == "l2")
    plan = bank.plan
    strength, scale = bank.strength(lam)
    step = plan.ones
    if isinstance(rate, Tensor):
        step, scale = rate, -scale
    elif rate is not None:
        scale *= -rate
    if scale != 0.0:
        launch.grad(
            plan,
            bank.flat,
            target,
            bank.device_slots,
            bank.device_slots if in_bank else plan.sequence,
            kind=kind,
            strength=strength,
            weights=plan.ones if weights is None else weights,
            rate=step,
            scale=scale,
        )
    return bank.state(sigma2, fro2)


def _terms(layout: ArenaLayout, flat: Tensor, kind: Kind, state: SpectralState) -> Tensor:
    """Per-layer values of the penalty, `[L]` or `[T, L]`."""
    if kind == "spectral":
        return state.sigma2
    if kind == "l2":
        return state.fro2
    with torch.no_grad():
        if flat.ndim == 1:
            return torch_path.squares(layout, flat)
        return torch.stack([torch_path.squares(layout, row) for row in flat])


def _total(terms: Tensor, weights: Tensor | None) -> Tensor:
    return terms.sum() if weights is None else (terms * weights.to(terms)).sum()


def _choose(flat: Tensor, backend: Backend) -> bool:
    """Whether Triton runs."""
    supported = flat.dtype in {torch.float32, torch.bfloat16}
    if backend == "triton":
        if not supported:
            raise ValueError(f"the Triton kernels take float32 and bfloat16, not {flat.dtype}")
        if not flat.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("the Triton kernels need a CUDA tensor")
        return True
    return backend == "auto" and flat.is_cuda and supported
