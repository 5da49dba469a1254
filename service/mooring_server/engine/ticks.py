"""What a task may ask of the engine between two ticks, and the one UNet call that answers several tasks.

A task is a generator. It yields None to end a tick, or a `UnetCall` when it needs the UNet: the engine sends
back the prediction. So the engine is free to answer the calls of many tasks with one pass of the network,
whatever their adapters, timesteps, guidance scales and samplers; the task never knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mooring_server.engine.bank import AdapterBank, Mix
from mooring_server.engine.model import BaseModel, PromptEmbeds

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class UnetCall:
    """Rows for the UNet.

    Args:
        latents: `[b, C, H, W]`, scaled by the scheduler.
        timestep: scalar; the same for these rows.
        embeds: b rows.
        mixes: adapters of each row.
    """

    latents: Tensor
    timestep: Tensor
    embeds: PromptEmbeds
    mixes: Sequence[Mix]

    @property
    def rows(self) -> int:
        """B."""
        return self.latents.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Latent height and width: calls of one shape can run together."""
        return self.latents.shape[2], self.latents.shape[3]


Tick = UnetCall | None
Steps = Generator[Tick, Tensor | None, T]
"""A task: what it yields, what it is sent, what it returns."""


class Prepared(Protocol):
    """Passes that were compiled or captured beforehand (`static_passes`)."""

    def run(
        self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, mixes: Sequence[Mix]
    ) -> Tensor | None:
        """The prediction `[B, C, H, W]`; None where nothing was prepared for this shape."""


@torch.no_grad()
def answer(
    base: BaseModel,
    bank: AdapterBank,
    calls: Sequence[UnetCall],
    *,
    row_wise: bool = False,
    prepared: Prepared | None = None,
) -> list[Tensor]:
    """Answer calls of one shape with one pass of the UNet.

    Args:
        base: the base model.
        bank: its bank.
        calls: at least one.
        row_wise: see `BaseModel.predict`; each row then has the bits it has alone.
        prepared: passes to use where one fits; not with `row_wise`.

    Returns:
        The prediction `[b, C, H, W]` of each call.
    """
    latents = torch.cat([call.latents for call in calls])
    timesteps = torch.cat([call.timestep.to(base.device).expand(call.rows) for call in calls])
    embeds = PromptEmbeds.cat([call.embeds for call in calls])
    mixes = [mix for call in calls for mix in call.mixes]
    predicted = None
    if prepared is not None and not row_wise:
        predicted = prepared.run(latents, timesteps, embeds, mixes)
    if predicted is None:
        with bank.mixed(mixes):
            predicted = base.predict(latents, timesteps, embeds, row_wise=row_wise)
    return list(torch.split(predicted, [call.rows for call in calls]))


def by_itself(
    base: BaseModel,
    bank: AdapterBank,
    steps: Steps[T],
    *,
    row_wise: bool = False,
    prepared: Prepared | None = None,
    on_pass: Callable[[int, int, int], None] | None = None,
) -> Generator[None, None, T]:
    """The same task with its UNet calls answered right here, one for each tick, with no one else's rows.

    For work that brings full batches of its own and whose results are kept and compared (training,
    evaluation), for scripts, and for devices where a batch decides about bits.

    Args:
        base: the base model.
        bank: its bank.
        steps: the task.
        row_wise: see `answer`.
        prepared: see `answer`.
        on_pass: told of each pass: begin and end in nanoseconds since the epoch, and its rows.
    """
    sent: Tensor | None = None
    try:
        while True:
            try:
                call = steps.send(sent)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if call is None:
                sent = None
            else:
                began = time.time_ns()
                sent = answer(base, bank, [call], row_wise=row_wise, prepared=prepared)[0]
                if on_pass is not None:
                    on_pass(began, time.time_ns(), call.rows)
            yield
    finally:
        steps.close()
