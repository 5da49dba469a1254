"""How long from an adapter in host memory to its first step? `python -m benchmarks.swap`.

Every system starts from tensors in host memory; the base, the UNet's input and the adapters are the same.

- ours: the row that the host tier holds, copied into a slot of the arena (`AdapterBank.acquire`),
- plain copy: the same bytes by `Tensor.copy_`, the least that any swap can take,
- diffusers: `load_lora_weights` into a pipeline after `unload_lora_weights` of the one before,
- hotswap: `load_lora_weights(hotswap=True)` over the one before,
- set_adapters: adapters that were all loaded before, one of them made the active one,
- adapter_names: PEFT's mixed batch over adapters that were all loaded: no swap, so only its step counts.

Two figures each: the swap alone, and the swap with the first UNet step of one row. The gate: after its swap
every system predicts what ours does, and the adapters show. Then 10,000 swaps over a few slots, with steps in
between: the process may not grow.

Bases: dinghy, and random weights in the shapes of SD 1.5 and SDXL. On a CPU the UNet's input is small and
"sdxl-small" has a third of XL's transformer blocks: what a swap does depends on the layers' shapes and number
only, and the step is shown to be complete, not to be fast.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mooring_server.engine.adapters import LORA_FILE, AdapterWeights, export_diffusers
from mooring_server.engine.bank import AdapterBank, PackedAdapter
from mooring_server.engine.model import BaseModel, PromptEmbeds
from safetensors.torch import load as read_safetensors
from torch import Tensor

from benchmarks import bases
from benchmarks.common import Row, show
from benchmarks.engine_common import (
    GateError,
    gpu_note,
    not_measured,
    options_for,
    progress,
    random_adapter,
    require_device,
    result_name,
)
from benchmarks.kernels import raced
from benchmarks.mixed_batch import TOLERANCE, Inputs, PeftPeer

ADAPTERS = 4
RANK = 16
SLOTS = 3
"""Fewer than adapters, so that every swap of ours is one."""
SIDE = {"sd15": 16, "sdxl": 16, "sdxl-small": 16}
"""Of the UNet's input on a CPU; dinghy's own elsewhere."""
MEMORY = 0.02
MIB = 2**20

NOTES = (
    "seconds; ratio: ours / peer, smaller is better. step: the swap and the first UNet step of one row.",
    "every system starts from tensors in host memory: reading and decoding files is in nobody's figure.",
    "memory: resident memory of the process (CUDA: allocated), MiB; ours is after the swaps, peer before.",
)


@dataclass(frozen=True)
class System:
    """Swaps to the k-th adapter, and predicts with what is in force.

    Args:
        swap: None where there is nothing to swap.
        step: with the k-th adapter, which was swapped in.
    """

    swap: Callable[[int], object] | None
    step: Callable[[int], Tensor]


def main() -> None:
    """Run the benchmark."""
    options = _options()
    require_device(options)
    rows: list[Row] = []
    with progress() as bar:
        task = bar.add_task("", total=len(options.bases))
        for name in options.bases:
            bar.update(task, description=name)
            try:
                rows += measure(name, options)
            except GateError as wrong:
                raise SystemExit(f"correctness gate: {wrong}; no time is printed") from wrong
            bar.advance(task)
    if options.device == "cpu":
        rows.append(not_measured())
    show(
        result_name("swap", options),
        f"From a host-cached adapter to its first step on {options.device}, {options.dtype}",
        rows,
        notes=(*NOTES, gpu_note("swap")),
        options=options,
    )


def _options() -> argparse.Namespace:
    options = options_for(__doc__)
    options.add_argument("--bases", nargs="+", help="several bases instead of --base")
    options.add_argument("--rank", type=int, default=RANK)
    options.add_argument("--swaps", type=int, help="for the memory test (default: 10,000; quick: 500)")
    chosen = options.parse_args()
    if chosen.bases is None:
        several = chosen.base == "dinghy" and not chosen.quick and chosen.device == "cpu"
        chosen.bases = ["dinghy", "sd15", "sdxl-small"] if several else [chosen.base]
    if chosen.swaps is None:
        chosen.swaps = 500 if chosen.quick else 10_000
    return chosen


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """One base.

    Raises:
        GateError: a system predicts something else than ours.
    """
    base = bases.load(name, device=options.device, dtype=options.dtype)
    bank = AdapterBank(base, slots=SLOTS, rank=options.rank)
    adapters = [random_adapter(base, seed, options.rank) for seed in range(ADAPTERS)]
    packed = [bank.pack(adapter) for adapter in adapters]
    inputs = _inputs(base, SIDE.get(name) if options.device == "cpu" else None)
    with torch.no_grad():
        systems = _systems(base, bank, adapters, packed, inputs)
        gate(systems, TOLERANCE[options.dtype])
        found = _race(systems, _copying(bank, packed), options)
        rows = list(_rows(f"{name} r{options.rank}", found, options.device))
        systems.clear()  # the peers' adapters
        rows.append(_memory(name, base, bank, packed, inputs, options))
    bank.close()
    return rows


def _systems(
    base: BaseModel,
    bank: AdapterBank,
    adapters: Sequence[AdapterWeights],
    packed: Sequence[PackedAdapter],
    inputs: Inputs,
) -> dict[str, System]:
    slots: dict[int, int] = {}

    def ours(k: int) -> None:
        for old in slots.values():
            bank.release(old)
        slots.clear()
        slots[k] = bank.acquire(packed[k])

    def step(k: int) -> Tensor:
        with bank.rows([slots[k]], [1.0]):
            return base.predict(inputs.latents, inputs.timesteps, inputs.embeds)

    peft = PeftPeer(base, list(adapters))
    return {
        "ours": System(ours, step),
        "diffusers": _diffusers(base, adapters, inputs, hotswap=False),
        "hotswap": _diffusers(base, adapters, inputs, hotswap=True),
        "set_adapters": _all_loaded(base, adapters, inputs),
        "adapter_names": System(None, lambda k: peft.named(inputs, f"a{k}")),
    }


def _states(adapters: Sequence[AdapterWeights]) -> list[dict[str, Tensor]]:
    """As diffusers reads them from files, in host memory."""
    return [read_safetensors(export_diffusers(adapter)[LORA_FILE]) for adapter in adapters]


def _diffusers(
    base: BaseModel, adapters: Sequence[AdapterWeights], inputs: Inputs, *, hotswap: bool
) -> System:
    pipeline, states = bases.pipeline(base), _states(adapters)
    loaded: list[int] = []

    def swap(k: int) -> None:
        if loaded and not hotswap:
            pipeline.unload_lora_weights()
        pipeline.load_lora_weights(dict(states[k]), adapter_name="live", hotswap=hotswap and bool(loaded))
        loaded[:] = [k]

    return System(swap, lambda _k: _unet(base, pipeline.unet, inputs))


def _all_loaded(base: BaseModel, adapters: Sequence[AdapterWeights], inputs: Inputs) -> System:
    pipeline = bases.pipeline(base)
    for k, state in enumerate(_states(adapters)):
        pipeline.load_lora_weights(dict(state), adapter_name=f"a{k}")
    return System(lambda k: pipeline.set_adapters(f"a{k}"), lambda _k: _unet(base, pipeline.unet, inputs))


def _unet(base: BaseModel, unet: Any, inputs: Inputs) -> Tensor:
    return base.predict(inputs.latents, inputs.timesteps, inputs.embeds, unet=unet)


def gate(systems: Mapping[str, System], tolerance: float) -> None:
    """Every system's prediction after a swap is ours, and the adapters differ.

    Raises:
        GateError: it is not.
    """
    seen: list[Tensor] = []
    for k in (0, 1):
        for name, system in systems.items():
            if system.swap is not None:
                system.swap(k)
            found = system.step(k)
            if name == "ours":
                seen.append(found)
            error = _difference(found, seen[k])
            if not error <= tolerance:
                raise GateError(f"{name} with adapter {k} is {error:.3g} away from ours")
    if _difference(seen[0], seen[1]) <= 2 * tolerance:
        raise GateError("another adapter gives the same prediction")


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _race(
    systems: Mapping[str, System], copy: Callable[[], object], options: argparse.Namespace
) -> dict[str, float]:
    """Seconds by "system" (the swap) and "system, step" (swap and step), and of "copy", in turns."""
    runs: dict[str, Callable[[], object]] = {"copy": copy}
    for name, system in systems.items():
        turn = itertools.cycle(range(ADAPTERS))
        if system.swap is not None:
            runs[name] = functools.partial(lambda swap, turn: swap(next(turn)), system.swap, turn)

        def both(system: System = system, turn: Iterator[int] = turn) -> Tensor:
            k = next(turn)
            if system.swap is not None:
                system.swap(k)
            return system.step(k)

        runs[f"{name}, step"] = both
    return raced(runs, options.device, seconds=0.2 if options.quick else 1.0, slow=20.0)


def _copying(bank: AdapterBank, packed: Sequence[PackedAdapter]) -> Callable[[], object]:
    """The bytes of a swap, into the same place."""
    slot, turn = 1, itertools.cycle(packed)
    return lambda: bank.arena[slot].copy_(next(turn).row, non_blocking=True)


def _rows(name: str, found: Mapping[str, float], device: str) -> Iterator[Row]:
    mine, goal = found["ours"], 1 / (100 if device == "cpu" else 500)
    for peer, title, limit in (
        ("copy", "plain copy", 1.2),
        ("diffusers", "load_lora_weights", goal),
        ("hotswap", "load_lora_weights(hotswap=True)", None),
        ("set_adapters", "set_adapters, all loaded", None),
    ):
        ratio = mine / found[peer]
        words = "" if limit is None else f"≤ {limit:g}×" if limit > 1 else f"≤ 1/{1 / limit:.0f}×"
        met = None if limit is None else ratio <= limit
        yield Row(f"{name}: {title}", mine, found[peer], ratio, words, met, "s", {"what": "swap"})
    for peer, title in (
        ("diffusers", "load_lora_weights"),
        ("hotswap", "load_lora_weights(hotswap=True)"),
        ("set_adapters", "set_adapters, all loaded"),
        ("adapter_names", "PEFT adapter_names, all loaded"),
    ):
        own, theirs = found["ours, step"], found[f"{peer}, step"]
        yield Row(f"{name}: {title}", own, theirs, own / theirs, "", None, "s", {"what": "swap and step"})


def _memory(
    name: str,
    base: BaseModel,
    bank: AdapterBank,
    packed: Sequence[PackedAdapter],
    inputs: Inputs,
    options: argparse.Namespace,
) -> Row:
    """Memory after many swaps over memory before them."""
    every = max(1, options.swaps // 20)

    def used() -> float:
        if options.device == "cuda":
            return torch.cuda.memory_allocated() / MIB
        resident = Path("/proc/self/statm").read_text().split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE") / MIB

    def swap(count: int) -> None:
        for number in range(count):
            slot = bank.acquire(packed[number % len(packed)])
            if number % every == 0:
                with bank.rows([slot], [1.0]):
                    base.predict(inputs.latents, inputs.timesteps, inputs.embeds)
            bank.release(slot)

    swap(2 * every)  # allocators have met every size now
    before = used()
    swap(options.swaps)
    after = used()
    ratio = after / before
    goal, met = f"≤ {1 + MEMORY:g}×", ratio <= 1 + MEMORY
    return Row(
        f"{name}: memory after {options.swaps:,} swaps",
        after,
        before,
        ratio,
        goal,
        met,
        extra={"what": "MiB"},
    )


def _inputs(base: BaseModel, side: int | None) -> Inputs:
    """One row of a UNet step."""
    generator = torch.Generator().manual_seed(0)
    side = side or base.native_size // base.vae_scale_factor
    latents = torch.randn(1, base.latent_channels, side, side, generator=generator)
    with torch.no_grad():
        embeds: PromptEmbeds = base.encode_prompt([bases.prompts(base)[0]])
    timesteps = torch.tensor([base.num_train_timesteps // 2])
    return Inputs(latents.to(base.device), timesteps.to(base.device), embeds)


if __name__ == "__main__":
    main()
