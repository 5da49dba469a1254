"""The training loop shared by the decoder, the judges and the classifier: timed, resumable, logged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Optimisers:
    """Muon on large matrices and convolutions, AdamW on everything else.

    ``torch.optim.Muon`` takes matrices only: a convolution's weight ``[o, i, 3, 3]`` is given
    to it as a view ``[o, 9·i]`` that shares its storage. ``muon`` and ``rest`` name the modules
    whose parameters may go to Muon and those that never do (embeddings, heads).
    """

    def __init__(
        self, muon: list[nn.Module], rest: list[nn.Module], muon_lr: float, adam_lr: float, smallest: int = 32
    ) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        others = [p for module in rest for p in module.parameters() if p.requires_grad]
        for parameter in (p for module in muon for p in module.parameters() if p.requires_grad):
            matrix = parameter.data.view(parameter.shape[0], -1) if parameter.ndim >= 2 else None
            if matrix is not None and min(matrix.shape) >= smallest:
                self.pairs.append((parameter, nn.Parameter(matrix)))
            else:
                others.append(parameter)
        self.muon = torch.optim.Muon(
            [view for _, view in self.pairs], lr=muon_lr, weight_decay=0.0, momentum=0.95, nesterov=True
        )
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.base = (muon_lr, adam_lr)
        self.parameters = [p for p, _ in self.pairs] + others

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the base rates; clears the gradients."""
        for parameter, view in self.pairs:
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        both: list[tuple[Any, float]] = [(self.muon, self.base[0]), (self.adam, self.base[1])]
        for optimiser, lr in both:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for parameter, _ in self.pairs:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers' states."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` by a temporary name, so that an interrupted write leaves the old one whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")


@dataclass
class Plan:
    """Length and rates of a run.

    ``minutes`` counts the process's own processor time over all interruptions: on a shared
    machine the clock on the wall says nothing about the work done.
    """

    minutes: float
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warmup_steps: int = 100
    clip: float = 1.0
    average: float = 0.998
    checkpoint_minutes: float = 3.0


class Loop:
    """Runs ``loss(step)`` under a linear decay over processor time.

    ``modules`` are saved by name; the weights of the last checkpoint and a running average
    of the trainable parameters (bias-corrected at the start) are kept.
    """

    def __init__(
        self, folder: Path, modules: dict[str, nn.Module], optimisers: Optimisers, plan: Plan, batch: int
    ) -> None:
        self.folder, self.modules, self.optimisers, self.plan, self.batch = (
            folder,
            modules,
            optimisers,
            plan,
            batch,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.average = [p.detach().clone() for p in optimisers.parameters]
        self.step, self.seconds = 0, 0.0
        self.path = folder / "checkpoint.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, mmap=True)
            for name, module in modules.items():
                module.load_state_dict(state[name])
            optimisers.load_state_dict(state["optimisers"])
            for mine, saved in zip(self.average, state["average"], strict=True):
                mine.copy_(saved)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimisers": self.optimisers.state_dict(), "average": self.average}
        write_checkpoint(state | {"step": self.step, "seconds": self.seconds}, self.path)

    def use_average(self) -> None:
        """Put the averaged weights into the modules (to export or measure them)."""
        with torch.no_grad():
            for parameter, value in zip(self.optimisers.parameters, self.average, strict=True):
                parameter.copy_(value)

    def rate(self) -> float:
        """Warm-up times a linear decay that reaches 2 % when the planned minutes are spent."""
        warm = min(1.0, (self.step + 1) / self.plan.warmup_steps)
        return warm * max(0.02, 1 - self.seconds / (60 * self.plan.minutes))

    def run(
        self,
        loss: Callable[[int], Tensor],
        after: Callable[[], None] | None = None,
        minutes: float | None = None,
    ) -> None:
        """Go on until the plan's minutes, or ``minutes`` of this call, are spent.

        ``after`` is called after every optimiser step.
        """
        last = saved = logged = time.process_time()
        begun, losses = last, list[float]()
        while self.seconds < 60 * self.plan.minutes and (minutes is None or last - begun < 60 * minutes):
            value = loss(self.step)
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(self.optimisers.parameters, self.plan.clip)
            self.optimisers.step(self.rate())
            keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.data for p in self.optimisers.parameters], 1 - keep)
            if after is not None:
                after()
            self.step += 1
            losses.append(float(value.detach()))
            now = time.process_time()
            self.seconds += now - last
            last = now
            if now - logged > 20:
                line = {
                    "step": self.step, "samples": self.step * self.batch, "seconds": round(self.seconds, 1),
                    "loss": round(float(np.mean(losses)), 5), "rate": round(self.rate(), 4),
                    "per_second": round(len(losses) * self.batch / (now - logged), 1),
                }  # fmt: skip
                append_log(self.folder / "log.jsonl", line)
                losses, logged = [], now
            if now - saved > 60 * self.plan.checkpoint_minutes:
                self.save()
                saved = time.process_time()
        self.save()
