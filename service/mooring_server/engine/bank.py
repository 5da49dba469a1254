"""The adapter bank: many adapters resident at once, none of them in the base's weights.

All factors of one adapter lie in one flat row of an arena `[slots, size]`. A forward hook on every adapted
layer adds `scale · B(Ax)` with each batch row's own factors, gathered by slot. So a swap is one copy, one
batch mixes adapters, and with only zero slots the hooks return at once: the base then computes bit for bit
what it computes without a bank. Slot 0 is zero for ever.

The arena is the device tier of `tiers`: what comes from there is packed and checked already (`PackedAdapter`)
and costs the engine thread one copy. Layers of equal shape could share one product; they do not, as they read
different activations. Layers of text encoders are layers like the others: they act while a prompt is encoded
inside `mixed`. Convolutions are products with what the kernel sees, computed only where an adapter in the
batch changes convolutions.

Shape legend: S slots, B batch rows, r rank.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.multi_lora import multi_lora_
from torch import Tensor, nn

from mooring_server.engine.adapters import (
    TARGETS,
    TEXT_LAYER,
    AdapterWeights,
    LayerFactors,
    LearnedEmbeddings,
    adaptable_layers,
    matrix_shape,
    rank_too_large,
    require_finite,
)
from mooring_server.engine.model import BaseModel, StageHook
from mooring_server.engine.tiers.observer import TierObserver, Unobserved
from mooring_server.errors import MooringError, Reason

ZERO_SLOT = 0
"""The slot of the untouched base."""

Mix = Sequence[tuple[int, float]]
"""The adapters of one row: (slot, factor on ΔW)."""


class _Active(Protocol):
    """What the hooks do inside `rows` or `TrainingSlot.active`."""

    def add(self, layer: str, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the adapter's share added."""


@dataclass(frozen=True, eq=False)
class PackedAdapter(AdapterWeights):
    """An adapter that a bank has checked and laid out as a row of its arena; made by `AdapterBank.pack`.

    Its layers' factors are views of the row, so that the row is all the memory it takes.

    Args:
        row: `[size]` float32 in host memory; page-locked for a bank on a CUDA device. Never written again.
        layout: of the row.
    """

    row: Tensor = field(kw_only=True)
    layout: ArenaLayout = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: the row as its allocator counts it, and the learned embeddings."""
        vectors = self.embeddings.tokens.values() if self.embeddings else ()
        return row_bytes(self.layout, page_locked=self.row.is_pinned()) + sum(
            tensor.nbytes for tensors in vectors for tensor in tensors
        )


def row_bytes(layout: ArenaLayout, *, page_locked: bool) -> int:
    """Bytes of one row in host memory; torch rounds page-locked blocks up to a power of two."""
    size = 4 * layout.size
    return 1 << (size - 1).bit_length() if page_locked else size


class AdapterBank:
    """Slots for adapters of one base. The engine thread owns it, as it owns the base.

    Args:
        base: the base model; its layers get hooks, its weights are never written.
        slots: rows of the arena, the zero slot included.
        rank: largest rank a slot holds; smaller adapters are padded with zeros, which changes no result.
        targets: see `adaptable_layers`; adapters may cover any subset.
        observer: receives the numbers of the tier "device".

    Attributes:
        layout: offsets of every factor in a row.
        arena: `[S, size]` float32 on the base's device.
        on_batch: called with (rows, distinct adapters) whenever a batch is set up; None for nobody.
        on_stage: called with ("adapter_load", seconds) after a copy into a slot.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        slots: int = 9,
        rank: int = 16,
        targets: str = "attention",
        observer: TierObserver | None = None,
    ) -> None:
        if slots < 2:
            raise ValueError(f"a bank needs the zero slot and at least one more, not {slots} slots")
        self.base = base
        self.slots = slots
        self.rank = rank
        self.targets = targets
        modules = adaptable_layers(base, targets)
        self.layout = ArenaLayout(
            [LayerShape(name, *matrix_shape(module)) for name, module in modules.items()],
            rank,
        )
        self.arena = torch.zeros(slots, self.layout.size, device=base.device)
        self.factors = self.layout.views(self.arena)
        self.on_batch: Callable[[int, int], None] | None = None
        self.on_stage: StageHook | None = None
        self._observer = observer or Unobserved()
        self._active: _Active | None = None
        self._resident: dict[str, int] = {}  # digest → slot
        self._held: list[str | None] = [None] * slots  # slot → digest
        self._pins = [0] * slots
        # unpinned slots: empty ones first, then those unused for longest
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, slots))
        self._convolutions = {n: module for n, module in modules.items() if isinstance(module, nn.Conv2d)}
        self._convolved: set[int] = set()  # slots with an adapter of convolutions
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def close(self) -> None:
        """Take the hooks off the base's layers again."""
        for hook in self._hooks:
            hook.remove()

    # ------------------------------------------------------------------ slots

    def acquire(self, weights: AdapterWeights) -> int:
        """Pin an adapter's slot, loading it into the least recently used free one when it is not resident.

        Returns:
            The slot; give it back with `release`.

        Raises:
            MooringError: QUEUE_FULL when every slot is pinned; what `load` raises.
        """
        slot = self.try_acquire(weights)
        if slot is None:
            raise self._no_slot()
        return slot

    def try_acquire(self, weights: AdapterWeights) -> int | None:
        """As `acquire`, with None when every slot is pinned."""
        slot = self._resident.get(weights.digest)
        if slot is None:
            packed = self.pack(weights)
            slot = self._take()
            if slot is None:
                return None
            self.load(slot, packed)
            self._observer.tier_lookup("device", hit=False)
        else:
            self._observer.tier_lookup("device", hit=True)
        self._pin(slot)
        return slot

    def reserve(self) -> int:
        """Pin an empty slot for training or measuring; give it back with `release`.

        Raises:
            MooringError: QUEUE_FULL when every slot is pinned.
        """
        slot = self._take()
        if slot is None:
            raise self._no_slot()
        self.unload(slot)
        self._pin(slot)
        return slot

    def release(self, slot: int) -> None:
        """Unpin a slot; its adapter stays resident until the place is needed."""
        if slot == ZERO_SLOT:
            return
        assert self._pins[slot] > 0, f"slot {slot} is released more often than it was acquired"
        self._pins[slot] -= 1
        if not self._pins[slot]:
            self._idle[slot] = None
            self._idle.move_to_end(slot, last=self._held[slot] is not None)

    def load(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a slot: one copy of a row, after `pack` where the adapter is not packed yet.

        On CUDA the copy is started, not awaited; what uses the slot comes after it on the same stream.

        Raises:
            MooringError: what `pack` raises. The slot is unchanged then.
        """
        self._require_writable(slot)
        packed = self.pack(weights)
        started = time.perf_counter()
        self._forget(slot)
        before = self._resident.get(packed.digest)
        if before is not None:
            self._forget(before)
        self.arena[slot].copy_(packed.row, non_blocking=True)
        if not self._convolutions.keys().isdisjoint(packed.layers):
            self._convolved.add(slot)
        else:
            self._convolved.discard(slot)
        self._resident[packed.digest] = slot
        self._held[slot] = packed.digest
        if slot in self._idle:
            self._idle.move_to_end(slot)
        seconds = time.perf_counter() - started
        self._tell_bytes()
        self._observer.tier_loaded("device", seconds)
        if self.on_stage is not None:
            self.on_stage("adapter_load", seconds)

    def unload(self, slot: int) -> None:
        """Empty a slot."""
        self._require_writable(slot)
        self._forget(slot)
        self.arena[slot].zero_()
        self._convolved.discard(slot)
        self._tell_bytes()

    def require_fits(self, weights: AdapterWeights) -> None:
        """Check base, rank, layers and shapes, without computing; safe on any thread.

        Raises:
            MooringError: BASE_DIGEST_MISMATCH, ADAPTER_RANK_TOO_LARGE, ADAPTER_KEYS_UNMATCHED.
        """
        if self._is_packed(weights):
            return
        if weights.base_digest != self.base.digest:
            raise MooringError(
                Reason.BASE_DIGEST_MISMATCH,
                f"The adapter belongs to base {weights.base_digest}, this server runs {self.base.digest}.",
                remedy="Train it again on this base, or serve the base it belongs to.",
                metadata={"expected": self.base.digest, "found": weights.base_digest},
            )
        if weights.rank > self.rank:
            raise rank_too_large(weights.rank, self.rank)
        for name, factors in weights.layers.items():
            if name not in self.factors:
                needed = next(
                    (t for t in TARGETS if weights.layers.keys() <= adaptable_layers(self.base, t).keys()),
                    TARGETS[-1],
                )
                raise MooringError(
                    Reason.ADAPTER_KEYS_UNMATCHED,
                    f"This server adapts the layers “{self.targets}” and {name} is not among them.",
                    remedy=(
                        f"Start the server with MOORING_TARGETS={needed}, or make the adapter without them."
                    ),
                )
            A, B = self.factors[name]
            rank = factors.A.shape[0]
            if rank > self.rank:
                raise rank_too_large(rank, self.rank)
            if factors.A.shape != (rank, A.shape[-1]) or factors.B.shape != (B.shape[-2], rank):
                raise MooringError(
                    Reason.ADAPTER_KEYS_UNMATCHED,
                    f"{name} has factors of shapes {list(factors.A.shape)} and {list(factors.B.shape)}; "
                    f"this base needs [{rank}, {A.shape[-1]}] and [{B.shape[-2]}, {rank}].",
                    remedy="Use an adapter that was made for this base.",
                )

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Check an adapter and lay it out as a row, padded to the bank's rank; safe on any thread.

        Its digests are computed too: the engine thread asks for them, and they take longer than a swap. An
        adapter that was packed for this layout is returned as it is.

        Raises:
            MooringError: BASE_DIGEST_MISMATCH, ADAPTER_RANK_TOO_LARGE, ADAPTER_KEYS_UNMATCHED (a layer this
                bank does not adapt, or a wrong shape), ADAPTER_NOT_FINITE.
        """
        if self._is_packed(weights):
            return weights
        self.require_fits(weights)
        row = torch.zeros(self.layout.size, pin_memory=self.page_locked)
        views = self.layout.views(row)
        layers = {}
        for name, factors in weights.layers.items():
            rank = factors.A.shape[0]
            A, B = views[name]
            layers[name] = LayerFactors(A[:rank].copy_(factors.A), B[:, :rank].copy_(factors.B))
        require_finite({"the factors": row})
        packed = PackedAdapter(
            weights.base_digest,
            weights.rank,
            layers,
            weights.embeddings,
            weights.metadata,
            row=row,
            layout=self.layout,
        )
        packed.__dict__.update(digest=weights.digest, text_digest=weights.text_digest)
        return packed

    @cached_property
    def has_text_layers(self) -> bool:
        """Whether its adapters may change how prompts are encoded, learned tokens aside."""
        return any(name.startswith(TEXT_LAYER) for name in self.factors)

    @property
    def page_locked(self) -> bool:
        """Whether `pack` makes rows in page-locked memory, which a GPU copies from by itself."""
        return self.base.device.type == "cuda"

    # ------------------------------------------------------------------ use

    @contextmanager
    def rows(self, slots: Sequence[int] | Tensor, scales: Sequence[float] | Tensor) -> Iterator[None]:
        """Give each batch row of the enclosed `base.predict` calls one adapter; see `mixed`.

        Args:
            slots: `[B]` slot of each row; 0 is the base.
            scales: `[B]` factor on each row's ΔW.
        """
        assert len(slots) == len(scales), "one scale per row"
        with self.mixed([[(int(slot), float(scale))] for slot, scale in zip(slots, scales, strict=True)]):
            yield

    @contextmanager
    def mixed(self, mixes: Sequence[Mix], *, counted: bool = True) -> Iterator[None]:
        """Give each batch row of the enclosed `base.predict` and `base.encode_prompt` calls its adapters.

        A row's result does not depend on the adapters of other rows. When no row has an adapter (or all
        scales are 0), the base runs untouched.

        Args:
            mixes: of each row, its adapters as (slot, factor on ΔW); their shares are added in this order.
            counted: tell `on_batch`; off for text encoding.
        """
        columns = self._columns(mixes, counted=counted)
        if not columns:
            with self._activate(None):
                yield
            return
        acting = {
            name: module
            for name, module in self._convolutions.items()
            if any(slot in self._convolved for column in columns for slot, _ in column)
        }
        found = [_Column.of(column, self.arena.device) for column in columns]
        with self._activate(_Rows(self.factors, found, acting)):
            yield

    def fixed_rows(self, count: int) -> FixedRows:
        """Rows whose adapters are read from tensors that stay where they are: for compiled passes."""
        return FixedRows(self, count)

    def _columns(self, mixes: Sequence[Mix], *, counted: bool) -> list[list[tuple[int, float]]]:
        """Adapters by column: the k-th of every row, or the zero slot. None when no row has any."""
        kept = [[(slot, scale) for slot, scale in mix if slot != ZERO_SLOT and scale] for mix in mixes]
        if counted and self.on_batch is not None:
            self.on_batch(len(kept), len({slot for mix in kept for slot, _ in mix}))
        width = max((len(mix) for mix in kept), default=0)
        return [[mix[k] if k < len(mix) else (ZERO_SLOT, 1.0) for mix in kept] for k in range(width)]

    def training_slot(
        self,
        slot: int | None = None,
        weights: AdapterWeights | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        targets: str | None = None,
    ) -> TrainingSlot:
        """Make a slot trainable in place.

        Args:
            slot: a slot of `reserve`; None reserves one (then `TrainingSlot.close` releases it).
            weights: where to start; None starts a fresh adapter: A ~ N(0, 1/r²), B = 0 (so ΔW = 0).
            seed: of the fresh A; the same seed gives the same factors.
            rank: of the adapter, at most the bank's; None takes that of `weights`, else the bank's.
            targets: layers to train, at most the bank's; None takes the bank's. The other layers' factors
                stay zero in the slot.

        Raises:
            MooringError: QUEUE_FULL, ADAPTER_RANK_TOO_LARGE, or what `load` raises.
            ValueError: targets that this bank has no factors for.
        """
        layers = adaptable_layers(self.base, targets or self.targets).keys()
        missing = [name for name in layers if name not in self.factors]
        if missing:
            raise ValueError(f"this bank adapts “{self.targets}” only; {missing[0]} has no factors in it")
        chosen = rank or (weights.rank if weights else self.rank)
        if chosen > self.rank:
            raise rank_too_large(chosen, self.rank)
        place = self.reserve() if slot is None else slot
        try:
            if weights is not None:
                self.load(place, weights)
                self._forget(place)  # what is trained is no longer that adapter
            else:
                self.unload(place)
            fresh = None if weights else seed
            return TrainingSlot(self, place, chosen, layers, seed=fresh, owned=slot is None)
        except BaseException:
            if slot is None:
                self.release(place)
            raise

    # ------------------------------------------------------------------ inside

    @contextmanager
    def _activate(self, active: _Active | None) -> Iterator[None]:
        before, self._active = self._active, active
        try:
            yield
        finally:
            self._active = before

    def _hook(self, layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return None if self._active is None else self._active.add(layer, args[0], output)

        return add

    def _is_packed(self, weights: AdapterWeights) -> TypeGuard[PackedAdapter]:
        return isinstance(weights, PackedAdapter) and weights.layout is self.layout

    def _take(self) -> int | None:
        """The next slot to fill, emptied of the adapter that was resident there; None when all are pinned."""
        slot = next(iter(self._idle), None)
        if slot is not None and self._held[slot] is not None:
            self._forget(slot)
            self._observer.tier_evicted("device", 1)
        return slot

    def _pin(self, slot: int) -> None:
        self._pins[slot] += 1
        self._idle.pop(slot, None)

    def _forget(self, slot: int) -> None:
        """The slot's adapter is resident no more; what is in the slot is left there."""
        digest = self._held[slot]
        if digest is None:
            return
        self._held[slot] = None
        del self._resident[digest]
        if slot in self._idle:
            self._idle.move_to_end(slot, last=False)

    def _tell_bytes(self) -> None:
        self._observer.tier_bytes("device", len(self._resident) * 4 * self.layout.size)

    def _require_writable(self, slot: int) -> None:
        if not ZERO_SLOT < slot < self.slots:
            raise ValueError(f"slot {slot} cannot be written; slots 1 to {self.slots - 1} can")

    def _no_slot(self) -> MooringError:
        return MooringError(
            Reason.QUEUE_FULL,
            f"All {self.slots - 1} adapter slots are in use.",
            remedy="Try again in a moment, or start the server with more slots.",
        )


@dataclass(frozen=True)
class _Column:
    """One adapter for each row.

    Args:
        slots: `[B]`.
        scales: `[B]`; None when all are 1.
        base_rows: indices of the rows of slot 0; None leaves it to the operator.
    """

    slots: Tensor
    scales: Tensor | None
    base_rows: Tensor | None

    @classmethod
    def of(cls, column: Mix, device: torch.device) -> _Column:
        """From (slot, scale) of each row."""
        scales = [scale for _, scale in column]
        return cls(
            torch.tensor([slot for slot, _ in column], device=device),
            None if set(scales) == {1.0} else torch.tensor(scales, device=device),
            torch.tensor(
                [row for row, (slot, _) in enumerate(column) if slot == ZERO_SLOT],
                dtype=torch.int64,
                device=device,
            ),
        )


@dataclass(frozen=True)
class _Rows:
    """Each row with its own factors.

    Args:
        factors: layer → views (A `[S, r, in]`, B `[S, out, r]`) of the arena.
        columns: added one after the other; more than one only where some row has several adapters.
        convolutions: those that some row changes.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    columns: Sequence[_Column]
    convolutions: Mapping[str, nn.Conv2d]

    def add(self, layer: str, x: Tensor, output: Tensor) -> Tensor:
        """Add scale · B(Ax) to output `[B, T, out]` or `[B, out]` in place, x `[B, T, in]` or `[B, in]`.

        A convolution's x `[B, C, H, W]` is unfolded into what its kernel sees at each of T places.
        """
        on_cpu = x.device.type == "cpu"
        if x.ndim == 4:
            conv = self.convolutions.get(layer)
            if conv is None:
                return output
            seen = F.unfold(x, conv.kernel_size, conv.dilation, _pair(conv.padding), conv.stride).mT
            tokens = output.flatten(2).mT.contiguous()
            added = self._add(layer, seen, tokens, by_row=on_cpu).mT.reshape(output.shape)
            return output.copy_(added)  # keeps its strides, by which later layers choose their kernels
        return self._add(layer, x, output, by_row=on_cpu and x.ndim == 2)

    def _add(self, layer: str, x: Tensor, output: Tensor, *, by_row: bool) -> Tensor:
        """`by_row`: products whose operands let the CPU's library choose by the batch's size."""
        A, B = self.factors[layer]
        for column in self.columns if by_row else ():
            for row in range(len(x)):
                one = slice(row, row + 1)
                scales = None if column.scales is None else column.scales[one]
                multi_lora_(output[one], x[one], A, B, column.slots[one], scales)
        for column in () if by_row else self.columns:
            batch = column.slots.shape[0]
            assert x.shape[0] == batch, f"rows() was given {batch} rows, the batch has {x.shape[0]}"
            output = multi_lora_(output, x, A, B, column.slots, column.scales, base_rows=column.base_rows)
        return output


def _pair(padding: str | int | tuple[int, ...]) -> int | tuple[int, ...]:
    assert not isinstance(padding, str), "diffusers' UNets pad by numbers"
    return padding


class FixedRows:
    """One adapter for each of a fixed number of rows, in tensors that are written and never replaced.

    A compiled pass or a CUDA graph keeps reading the tensors it was made with; rows of the base read slot 0.

    Args:
        bank: whose slots they name.
        count: rows.
    """

    def __init__(self, bank: AdapterBank, count: int) -> None:
        self._bank = bank
        device = bank.arena.device
        self._column = _Column(
            torch.zeros(count, dtype=torch.int64, device=device), torch.ones(count, device=device), None
        )

    def set(self, mixes: Sequence[Mix]) -> bool:
        """Give the first rows these adapters and the others the base.

        Returns:
            False, with nothing changed, where a row has several.
        """
        if any(len(mix) > 1 for mix in mixes):
            return False
        column = next(iter(self._bank._columns(mixes, counted=True)), [])  # noqa: SLF001 - one class in parts
        rest = len(self._column.slots) - len(column)
        column = [*column, *[(ZERO_SLOT, 1.0)] * rest]
        assert self._column.scales is not None
        self._column.slots.copy_(torch.tensor([slot for slot, _ in column]))
        self._column.scales.copy_(torch.tensor([scale for _, scale in column]))
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the enclosed `base.predict` calls read them."""
        bank = self._bank
        rows = _Rows(bank.factors, [self._column], bank._convolutions)  # noqa: SLF001 - as above
        with bank._activate(rows):  # noqa: SLF001
            yield


class TrainingSlot:
    """One slot as trainable parameters that live in the arena's own memory.

    `params[layer]` are leaf parameters and *views* of `flat`; their `.grad` are views of `flat_grad`. So a
    penalty, clipping and an optimiser step are single passes over the two flat buffers, and a preview through
    `bank.rows([slot], …)` sees the current values. Clear gradients with `flat_grad.zero_()`, never with
    `zero_grad(set_to_none=True)`. With a rank below the bank's, the padding starts at zero in both factors
    and stays there: its gradients are products of zeros.

    Attributes:
        slot: place in the bank.
        layout: the bank's layout.
        rank: of the adapter that `weights` gives.
        flat: `[size]` view of the arena row.
        flat_grad: `[size]`.
        params: trained layer → (A `[bank rank, in]`, B `[out, bank rank]`).
    """

    def __init__(
        self,
        bank: AdapterBank,
        slot: int,
        rank: int,
        layers: Collection[str],
        *,
        seed: int | None,
        owned: bool,
    ) -> None:
        self.bank = bank
        self.slot = slot
        self.layout = bank.layout
        self.rank = rank
        self.flat = bank.arena[slot]
        self.flat_grad = torch.zeros_like(self.flat)
        self._owned = owned
        views = {name: pair for name, pair in self.layout.views(self.flat).items() if name in layers}
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for A, _ in views.values():
                A[:rank].copy_(torch.randn(rank, A.shape[1], generator=generator) / rank)
        gradients = self.layout.views(self.flat_grad)
        self.params: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, (A, B) in views.items():
            pair = nn.Parameter(A), nn.Parameter(B)
            for parameter, gradient in zip(pair, gradients[name], strict=True):
                parameter.grad = gradient
            self.params[name] = pair

    @contextmanager
    def active(self, scale: float = 1.0) -> Iterator[None]:
        """All rows of the enclosed `base.predict` calls use these parameters, differentiably."""
        with self.bank._activate(_Trained(self.params, scale)):  # noqa: SLF001 - one class in two parts
            yield

    def weights(
        self, metadata: Mapping[str, str] | None = None, embeddings: LearnedEmbeddings | None = None
    ) -> AdapterWeights:
        """The current factors as an immutable adapter (copies, cut to the adapter's rank).

        Raises:
            MooringError: ADAPTER_NOT_FINITE.
        """
        require_finite({"the factors": self.flat})
        return AdapterWeights(
            base_digest=self.bank.base.digest,
            rank=self.rank,
            layers={
                name: LayerFactors(
                    A.detach()[: self.rank].cpu().clone(), B.detach()[:, : self.rank].cpu().clone()
                )
                for name, (A, B) in self.params.items()
            },
            embeddings=embeddings,
            metadata=dict(metadata or {}),
        )

    def close(self) -> None:
        """Empty the slot and give it back if `training_slot` reserved it."""
        self.bank.unload(self.slot)
        if self._owned:
            self._owned = False
            self.bank.release(self.slot)


@dataclass(frozen=True)
class _Trained:
    """All rows with the same trainable factors."""

    params: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    scale: float

    def add(self, layer: str, x: Tensor, output: Tensor) -> Tensor:
        """Output `[B, T, out]` plus scale · B(Ax), x `[B, T, in]`."""
        if layer not in self.params:
            return output
        A, B = self.params[layer]
        delta = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        return output + (delta * self.scale if self.scale != 1.0 else delta).to(output.dtype)
