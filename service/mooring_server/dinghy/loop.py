"""The training loop that every model of the set shares: by steps, resumable, logged, on a CPU or a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import text
from .device import computes_bf16
from .muon import Muon
from .preset import SHIPPED, Preset
from .render import Layout, lay_out
from .world import Sample


class Optimisers:
    """Muon on large matrices and convolutions, AdamW on everything else.

    Muon takes matrices only: a convolution's weight ``[o, i, 3, 3]`` is given to it as a view
    ``[o, 9·i]`` that shares its storage. ``muon`` and ``rest`` name the modules whose parameters
    may go to Muon and those that never do (embeddings, heads).
    """

    def __init__(
        self,
        muon: Sequence[nn.Module],
        rest: Sequence[nn.Module],
        muon_lr: float,
        adam_lr: float,
        smallest: int = 32,
    ) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        others = [p for module in rest for p in module.parameters() if p.requires_grad]
        for parameter in (p for module in muon for p in module.parameters() if p.requires_grad):
            matrix = parameter.data.view(parameter.shape[0], -1) if parameter.ndim >= 2 else None
            if matrix is not None and min(matrix.shape) >= smallest:
                self.pairs.append((parameter, nn.Parameter(matrix)))
            else:
                others.append(parameter)
        on_cpu = all(view.device.type == "cpu" for _, view in self.pairs)
        dtype = torch.float32 if on_cpu and not computes_bf16() else torch.bfloat16
        self.muon = Muon([view for _, view in self.pairs], lr=muon_lr, dtype=dtype)
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.base = (muon_lr, adam_lr)
        self.parameters = [p for p, _ in self.pairs] + others

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the base rates; clears the gradients."""
        for parameter, view in self.pairs:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        both: list[tuple[Any, float]] = [(self.muon, self.base[0]), (self.adam, self.base[1])]
        for optimiser, lr in both:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for parameter, _ in self.pairs:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Both optimisers' states, flat: ``muon.<i>.<key>`` and ``adam.<i>.<key>``."""
        return {
            f"{name}.{index}.{key}": value
            for name, optimiser in (("muon", self.muon), ("adam", self.adam))
            for index, state in optimiser.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            document: dict[str, Any] = optimiser.state_dict()
            document["state"] = {}
            for full, value in tensors.items():
                owner, index, key = full.split(".", 2)
                if owner == name:
                    document["state"].setdefault(int(index), {})[key] = value
            optimiser.load_state_dict(document)


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Batch:
    """What a step trains on: the pictures' layout, token ids ``[B, 20]`` and labels ``[B, k]`` int64."""

    layout: Layout
    ids: Tensor
    labels: Tensor


Make = Callable[[int], Sequence[Sample]]
Label = Callable[[Sample], tuple[int, ...]]


class _Maker(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, make: Make, label: Label, first: int, preset: Preset) -> None:
        self.make, self.label, self.first, self.preset = make, label, first, preset

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        if info is not None:  # without workers this is the process that trains
            torch.set_num_threads(1)
        step, stride = (self.first, 1) if info is None else (self.first + info.id, info.num_workers)
        tokenizer = text.build_tokenizer(self.preset)
        while True:
            samples = self.make(step)
            ids = text.tokens(tokenizer, [s.caption for s in samples])
            yield Batch(lay_out(samples), ids, torch.tensor([self.label(s) for s in samples]))
            step += stride


def _no_label(_: Sample) -> tuple[int, ...]:
    return ()


def batches(
    make: Make, first: int, workers: int, label: Label = _no_label, preset: Preset = SHIPPED
) -> Iterator[Batch]:
    """The batches of steps ``first``, ``first + 1``, … in order, described ahead by ``workers`` processes.

    ``make(step)`` returns a step's samples.
    """
    loader: Any = torch.utils.data.DataLoader(
        _Maker(make, label, first, preset),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=None,
    )
    return iter(loader)


@dataclass(frozen=True)
class Plan:
    """Length and rates of a run.

    The rate warms up over ``warmup_steps``, stays, and falls linearly to 3 % over the last ``decay`` share
    of ``steps``; ``average`` is the momentum of the averaged weights, which are what is shipped. On a CPU a
    step costs as much as its pictures and the optimiser the same whatever their number: ``cpu_batch``, the
    smallest that serves the loss, takes ``batch``'s place there, and ``cpu_steps``, if there are any, that of
    ``steps``.
    """

    steps: int
    batch: int
    cpu_batch: int = 96
    cpu_steps: int = 0
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warmup_steps: int = 200
    decay: float = 1.0
    clip: float = 1.0
    average: float = 0.999
    checkpoint_minutes: float = 3.0
    log_steps: int = 50

    def rate(self, step: int) -> float:
        """Factor on the base rates at ``step``."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps) * max(0.03, min(1.0, left))


class Loop:
    """Runs ``loss(step, batch)`` to the end of a plan; goes on from the checkpoint in ``folder``.

    ``modules`` are saved by name. The checkpoint is one safetensors file, step and seconds in its
    metadata.
    """

    def __init__(
        self, folder: Path, modules: dict[str, nn.Module], optimisers: Optimisers, plan: Plan
    ) -> None:
        self.folder, self.modules, self.optimisers, self.plan = folder, modules, optimisers, plan
        folder.mkdir(parents=True, exist_ok=True)
        self.average = [p.detach().clone() for p in optimisers.parameters]
        self.step, self.seconds = 0, 0.0
        self.path = folder / "checkpoint.safetensors"
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
        groups: dict[str, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            group, name = full.split(":", 1)
            groups.setdefault(group, {})[name] = value
        for name, module in self.modules.items():
            module.load_state_dict(groups[name])
        if "optimisers" in groups:
            self.optimisers.load_tensors(groups["optimisers"])
        with torch.no_grad():
            for i, mine in enumerate(self.average):
                mine.copy_(groups["average"][str(i)])
        self.step, self.seconds = int(progress["step"]), float(progress["seconds"])

    def save(self, *, optimisers: bool = True) -> None:
        """Write the checkpoint by a temporary name."""
        tensors = {
            f"{name}:{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        if optimisers:
            tensors |= {f"optimisers:{key}": value for key, value in self.optimisers.tensors().items()}
        tensors |= {f"average:{i}": value for i, value in enumerate(self.average)}
        progress = json.dumps({"step": self.step, "seconds": self.seconds})
        part = self.path.with_suffix(".part")
        contiguous = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        save_file(contiguous, part, metadata={"progress": progress})
        part.rename(self.path)

    def use_average(self) -> None:
        """Put the averaged weights into the modules (to export or measure them)."""
        with torch.no_grad():
            for parameter, value in zip(self.optimisers.parameters, self.average, strict=True):
                parameter.copy_(value)

    def figures(self) -> dict[str, float]:
        """Steps, samples and minutes so far."""
        minutes = round(self.seconds / 60, 1)
        return {"steps": self.step, "samples": self.step * self.plan.batch, "minutes": minutes}

    def run(
        self,
        data: Iterator[Batch],
        loss: Callable[[int, Batch], Tensor],
        after: Callable[[], None] | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Go on until the plan's steps, or ``stop_after`` steps of this call, are done.

        ``after`` is called after every optimiser step.
        """
        saved = logged = time.monotonic()
        until = self.plan.steps if stop_after is None else min(self.plan.steps, self.step + stop_after)
        total, since = torch.zeros((), device=self.average[0].device), 0
        while self.step < until:
            value = loss(self.step, next(data))
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(self.optimisers.parameters, self.plan.clip)
            self.optimisers.step(self.plan.rate(self.step))
            keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.data for p in self.optimisers.parameters], 1 - keep)
            if after is not None:
                after()
            self.step += 1
            # summed on the device: reading every loss would make the host wait at every step
            total, since = total + value.detach(), since + 1
            if self.step % self.plan.log_steps == 0 or self.step == until:
                mean = float(total) / since
                now = time.monotonic()
                self.seconds += now - logged
                line = {
                    "step": self.step, "samples": self.step * self.plan.batch,
                    "seconds": round(self.seconds, 1), "loss": round(mean, 5),
                    "rate": round(self.plan.rate(self.step), 4),
                    "per_second": round(since * self.plan.batch / max(1e-9, now - logged), 1),
                }  # fmt: skip
                append_log(self.folder / "log.jsonl", line)
                typer.echo(f"{self.folder.name} {json.dumps(line)}")
                total, since, logged = torch.zeros_like(total), 0, now
                if not mean < float("inf"):
                    raise FloatingPointError(f"{self.folder.name}: loss {mean} at step {self.step}")
            if time.monotonic() - saved > 60 * self.plan.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
        self.save()
