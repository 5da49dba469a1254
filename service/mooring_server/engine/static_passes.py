"""UNet passes of fixed shapes, prepared at start: compiled, captured as CUDA graphs, or both.

Every prepared pass owns its input tensors, slots and scales included; to run it is to write them and go. So
one graph serves every mixture of adapters, and a swap of an adapter changes nothing in it: the arena stays
where it is. A pass of fewer rows than were prepared is filled up with rows of the base.

Nothing is compiled while requests wait: what was not prepared (another image size, several adapters on one
row, training) runs as it would without this. Left out: compiling text encoders and the VAE, which run once
for a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mooring_server.engine.bank import AdapterBank, Mix
from mooring_server.engine.model import BaseModel, PromptEmbeds

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes something that repeats a computation on the same tensors out of the computation."""


class StaticPasses:
    """Prepared passes at the base's native size. Owned like the base: by one thread at a time.

    Args:
        base: the base model.
        bank: its bank; no other may be made for the base later on.
        compiler: backend of torch.compile for the UNet, such as "inductor"; None does not compile.
        capture: `cuda_graph`, or None to call the UNet anew each time.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: AdapterBank,
        *,
        compiler: str | None = None,
        capture: Capture | None = None,
    ) -> None:
        self._base = base
        self._bank = bank
        self._unet: Callable[..., Any] | None = None
        if compiler is not None:
            self._unet = torch.compile(base.unet, backend=compiler, dynamic=False)
        self._capture = capture
        self._passes: dict[int, _Pass] = {}

    @property
    def row_counts(self) -> tuple[int, ...]:
        """What is prepared, rising."""
        return tuple(sorted(self._passes))

    @torch.no_grad()
    def prepare(self, rows: int) -> None:
        """Prepare passes of `rows` rows, unless they are; takes seconds to minutes when it compiles."""
        if rows not in self._passes:
            self._passes[rows] = _Pass(self._base, self._bank, rows, self._unet, self._capture)

    @torch.no_grad()
    def run(
        self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, mixes: Sequence[Mix]
    ) -> Tensor | None:
        """Run the smallest prepared pass that takes these rows.

        Args:
            latents: `[B, C, H, W]`.
            timesteps: `[B]`.
            embeds: B rows.
            mixes: adapters of each row.

        Returns:
            `[B, C, H, W]`; None where no prepared pass fits.
        """
        side = self._base.native_size // self._base.vae_scale_factor
        wanted = len(latents)
        found = next((rows for rows in self.row_counts if rows >= wanted), None)
        if found is None or latents.shape[2:] != (side, side):
            return None
        return self._passes[found].run(latents, timesteps, embeds, mixes)


class _Pass:
    """One prepared pass and the tensors it reads."""

    def __init__(
        self,
        base: BaseModel,
        bank: AdapterBank,
        rows: int,
        unet: Callable[..., Any] | None,
        capture: Capture | None,
    ) -> None:
        self._base = base
        side = base.native_size // base.vae_scale_factor
        empty = base.encode_prompt([""])
        self._adapters = bank.fixed_rows(rows)
        self._latents = torch.zeros(rows, base.latent_channels, side, side, device=base.device)
        self._timesteps = torch.full(
            (rows,), base.num_train_timesteps // 2, dtype=torch.int64, device=base.device
        )
        self._embeds = empty.rows([0] * rows)

        def compute() -> Tensor:
            with torch.no_grad(), self._adapters.active():
                return base.predict(self._latents, self._timesteps, self._embeds, unet=unet)

        self._captured = capture is not None
        compute()  # compiles, and lets libraries set themselves up, which a capture does not allow
        self._compute = compute if capture is None else capture(compute)

    def run(
        self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, mixes: Sequence[Mix]
    ) -> Tensor | None:
        """See `StaticPasses.run`."""
        if not self._adapters.set(mixes):
            return None
        rows = len(latents)
        started = time.perf_counter()
        self._latents[:rows].copy_(latents)
        self._timesteps[:rows].copy_(timesteps)
        self._embeds.hidden[:rows].copy_(embeds.hidden)
        if self._embeds.pooled is not None:
            assert embeds.pooled is not None
            self._embeds.pooled[:rows].copy_(embeds.pooled)
        predicted = self._compute()[:rows].clone()  # the next run writes over it
        if self._captured:  # else `predict` tells
            self._base.stage("denoise", started)
        return predicted.to(latents.dtype)


def cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture a computation that already ran on a CUDA device; the result replays it.

    "thread_local": other threads of the server may use the device meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = compute()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
