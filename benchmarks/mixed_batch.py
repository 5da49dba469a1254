"""What does a batch of eight different adapters cost? `python -m benchmarks.mixed_batch`.

One UNet step of eight rows, each with another adapter on the attention layers, against

- the same step with one adapter for all eight rows: the faster of ours and PEFT's plain LoRA,
- the base alone,
- swapping one by one: eight times a copy into one slot and a step of one row, ours,
- PEFT's mixed batch (`adapter_names`) on the same UNet.

What is timed is the UNet call with everything around it that a batch of such rows needs (slot indices, hooks;
in PEFT its `forward`), not text encoding, scheduler and decoding, which are the same for all. The gate first
compares every row of the mixed batch with the same row computed alone, and with PEFT's; no time is printed
when one differs. All ways run in turns in this one process.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mooring_server.engine.adapters import AdapterWeights
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.model import BaseModel, PromptEmbeds
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

ADAPTERS = 8
SLOW = 60.0
"""Seconds of one step from which on it is not repeated."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a row, as a share of the row's largest value."""


@dataclass(frozen=True)
class Inputs:
    """Eight rows of a UNet step.

    Args:
        latents: `[8, C, H, W]`.
        timesteps: `[8]`, all different: rows of a real batch are at different steps.
        embeds: 8 rows.
    """

    latents: Tensor
    timesteps: Tensor
    embeds: PromptEmbeds

    def row(self, index: int) -> Inputs:
        """One of them, as a batch of one."""
        one = slice(index, index + 1)
        return Inputs(self.latents[one], self.timesteps[one], self.embeds.rows(one))


def main() -> None:
    """Run the benchmark."""
    options = _options()
    require_device(options)
    rows: list[Row] = []
    worst = 0.0
    with progress() as bar:
        todo = [(name, rank) for name in options.bases for rank in options.ranks or _ranks(name, options)]
        task = bar.add_task("", total=len(todo))
        for name, rank in todo:
            bar.update(task, description=f"{name} r{rank}")
            try:
                found, error = measure(name, rank, options)
            except GateError as wrong:
                raise SystemExit(f"correctness gate: {wrong}; no time is printed") from wrong
            rows += found
            worst = max(worst, error)
            bar.advance(task)
    if options.device == "cpu":
        rows.append(not_measured())
    show(
        result_name("mixed_batch", options),
        f"Eight adapters in one UNet step on {options.device}, {options.dtype}",
        rows,
        notes=(*NOTES, gpu_note("mixed_batch")),
        summary={"worst row in the gate, as a share of its tolerance": worst},
        options=options,
    )


NOTES = (
    "seconds of one step of 8 rows; ratio: ours / peer, smaller is better.",
    "one adapter: the faster of ours with equal slots and PEFT's plain LoRA (one active adapter).",
    "swap by one: 8 copies into a slot and 8 steps of one row.",
    "PEFT: `PeftModel.forward(adapter_names=…)` on the same weights. Latents: side of the UNet's input.",
)


def _options() -> argparse.Namespace:
    options = options_for(__doc__)
    options.add_argument("--bases", nargs="+", help="several bases instead of --base")
    options.add_argument("--ranks", type=int, nargs="+")
    options.add_argument("--side", type=int, help="side of the latents (default: native; sd15 on a CPU: 8)")
    chosen = options.parse_args()
    if chosen.bases is None:
        both = chosen.base == "dinghy" and not chosen.quick and chosen.device == "cpu"
        chosen.bases = ["dinghy", "sd15"] if both else [chosen.base]
    return chosen


def _ranks(name: str, options: argparse.Namespace) -> list[int]:
    """What is measured of a base by default: a step of SD 1.5 takes seconds on a CPU."""
    return [16] if options.quick or (name != "dinghy" and options.device == "cpu") else [4, 16, 64]


def measure(name: str, rank: int, options: argparse.Namespace) -> tuple[list[Row], float]:
    """One base and rank.

    Returns:
        Rows, and the gate's worst error as a share of its tolerance.

    Raises:
        GateError: a row of the mixed batch is not what it is alone, or not what PEFT computes.
    """
    base = bases.load(name, device=options.device, dtype=options.dtype)
    side = options.side or base.native_size // base.vae_scale_factor
    if name == "sd15" and options.device == "cpu" and not options.side:
        side //= 8
    bank = AdapterBank(base, slots=ADAPTERS + 2, rank=rank)
    adapters = [random_adapter(base, seed, rank) for seed in range(ADAPTERS)]
    slots = [bank.acquire(adapter) for adapter in adapters]
    inputs = _inputs(base, side)
    peft = PeftPeer(base, adapters)
    with torch.no_grad():
        worst = gate(base, bank, slots, peft, inputs, TOLERANCE[options.dtype])
        runs: dict[str, Callable[[], object]] = {
            "mixed": functools.partial(ours, base, bank, slots, inputs),
            "one, ours": functools.partial(ours, base, bank, slots[:1] * ADAPTERS, inputs),
            "one, PEFT": functools.partial(peft.one, inputs),
            "base": functools.partial(ours, base, bank, [0] * ADAPTERS, inputs),
            "swaps": _swapping(base, bank, adapters, inputs),
            "PEFT": functools.partial(peft.mixed, inputs),
        }
        quick = options.quick
        found = raced(runs, options.device, seconds=0.5 if quick else 2.5, slow=SLOW)
    bank.close()
    return list(_rows(f"{name} r{rank}", side, found)), worst


def _rows(name: str, side: int, found: dict[str, float]) -> Iterator[Row]:
    mine = found["mixed"]
    fastest = min(("one, ours", "one, PEFT"), key=found.__getitem__)
    for what, seconds, goal in (
        (f"one adapter ×8 ({fastest.partition(', ')[2]})", found[fastest], 1.15),
        ("base alone", found["base"], None),
        ("swap by one", found["swaps"], None),
        ("PEFT's mixed batch", found["PEFT"], 0.5),
    ):
        ratio = mine / seconds
        met = None if goal is None else ratio <= goal
        yield Row(
            f"{name}: {what}",
            mine,
            seconds,
            ratio,
            "" if goal is None else f"≤ {goal:g}×",
            met,
            "s",
            {"latents": f"8×{side}×{side}"},
        )


def _inputs(base: BaseModel, side: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(ADAPTERS, base.latent_channels, side, side, generator=generator)
    texts = bases.prompts(base)
    with torch.no_grad():
        embeds = PromptEmbeds.cat([base.encode_prompt([texts[i % len(texts)]]) for i in range(ADAPTERS)])
    timesteps = torch.linspace(base.num_train_timesteps - 1, 1, ADAPTERS).long()
    return Inputs(latents.to(base.device), timesteps.to(base.device), embeds)


def ours(base: BaseModel, bank: AdapterBank, slots: list[int], inputs: Inputs) -> Tensor:
    """A UNet step, each row with the adapter in its slot."""
    with bank.rows(slots, [1.0] * len(slots)):
        return base.predict(inputs.latents, inputs.timesteps, inputs.embeds)


def _swapping(
    base: BaseModel, bank: AdapterBank, adapters: list[AdapterWeights], inputs: Inputs
) -> Callable[[], object]:
    """One slot for all: what a server without a mixed batch does, with our own fast swap."""
    slot = bank.reserve()
    packed = [bank.pack(adapter).row.to(base.device) for adapter in adapters]

    def run() -> None:
        for index, row in enumerate(packed):
            bank.arena[slot].copy_(row)
            ours(base, bank, [slot], inputs.row(index))

    return run


class PeftPeer:
    """The same UNet under PEFT, with the same adapters as "a0", "a1" and so on.

    Args:
        base: its UNet's tensors are shared.
        adapters: of equal rank.
    """

    def __init__(self, base: BaseModel, adapters: list[AdapterWeights]) -> None:
        import peft

        self._base = base
        rank = adapters[0].rank
        targets = [layer.removeprefix("unet.") for layer in adapters[0].layers]

        def config() -> Any:
            return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)

        model: Any = peft.get_peft_model(bases.twin(base.unet), config(), adapter_name="a0")
        for index in range(1, len(adapters)):
            model.add_adapter(f"a{index}", config())
        parts = dict(model.base_model.model.named_modules())
        with torch.no_grad():
            for index, adapter in enumerate(adapters):
                for layer, factors in adapter.layers.items():
                    part = parts[layer.removeprefix("unet.")]
                    for side, factor in ((part.lora_A, factors.A), (part.lora_B, factors.B)):
                        weight = side[f"a{index}"].weight
                        side[f"a{index}"].weight.data = factor.to(weight.device, base.dtype)
        model.set_adapter("a0")
        model.eval()
        model.requires_grad_(requires_grad=False)
        self._model = model

    def mixed(self, inputs: Inputs) -> Tensor:
        """Each row with another adapter."""
        return self._run(inputs, adapter_names=[f"a{i}" for i in range(len(inputs.latents))])

    def one(self, inputs: Inputs) -> Tensor:
        """All rows with the adapter "a0"."""
        return self._run(inputs)

    def named(self, inputs: Inputs, name: str) -> Tensor:
        """All rows with one adapter, by the mixed batch's way."""
        return self._run(inputs, adapter_names=[name] * len(inputs.latents))

    def _run(self, inputs: Inputs, **names: Any) -> Tensor:
        base, latents = self._base, inputs.latents
        conditions = None
        if inputs.embeds.pooled is not None:
            size = [side * base.vae_scale_factor for side in latents.shape[-2:]]
            ids = torch.tensor([[*size, 0, 0, *size]] * len(latents), device=latents.device, dtype=base.dtype)
            conditions = {"text_embeds": inputs.embeds.pooled, "time_ids": ids}
        found: Tensor = self._model(
            latents.to(base.dtype),
            inputs.timesteps,
            encoder_hidden_states=inputs.embeds.hidden,
            added_cond_kwargs=conditions,
            return_dict=False,
            **names,
        )[0]
        return found.to(latents.dtype)


def gate(
    base: BaseModel,
    bank: AdapterBank,
    slots: list[int],
    peft: PeftPeer,
    inputs: Inputs,
    tolerance: float,
) -> float:
    """Compare each row of the mixed batch with the row alone and with PEFT's.

    Returns:
        The worst error as a share of `tolerance`.

    Raises:
        GateError: one exceeds it, or an adapter leaves its row as the base has it.
    """
    mixed = ours(base, bank, slots, inputs)
    untouched = ours(base, bank, [0] * len(slots), inputs)
    peers = peft.mixed(inputs)
    worst = 0.0
    for index, slot in enumerate(slots):
        alone = ours(base, bank, [slot], inputs.row(index))
        for what, expected in (("alone", alone[0]), ("under PEFT", peers[index])):
            error = _difference(mixed[index], expected) / tolerance
            if not error <= 1.0:
                raise GateError(f"row {index} differs from itself {what} by {error:.3g} of the tolerance")
            worst = max(worst, error)
        if _difference(mixed[index], untouched[index]) <= 2 * tolerance:
            raise GateError(f"adapter {index} does not change its row")
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
