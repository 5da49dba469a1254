"""What the engine's benchmarks share: options, adapters, requests, an engine that is watched, clocks."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mooring_server.config import Settings
from mooring_server.engine.adapters import AdapterWeights, LayerFactors, adaptable_layers, matrix_shape
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.engine import Engine
from mooring_server.engine.model import BaseModel
from mooring_server.engine.requests import AdapterUse, GenerationRequest
from mooring_server.engine.warm_up import warm_up
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import Row, parser

Pixels = NDArray[np.uint8]

GUIDANCE = 4.0
"""Of every request; the UNet sees two rows for each image."""


class GateError(Exception):
    """What is compared does not do the same work."""


def options_for(description: str | None) -> argparse.ArgumentParser:
    """The options of `common.parser`, and those of every benchmark of the engine."""
    options = parser(description)
    options.add_argument(
        "--base", default="dinghy", help="dinghy, sd15, sdxl or sdxl-small (random), or a directory"
    )
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--threads", type=int, default=1, help="torch threads of every system compared")
    return options


def add_deterministic(options: argparse.ArgumentParser) -> None:
    """`--deterministic`, for benchmarks that run our engine."""
    options.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="as the server's setting (default: the server's own: on for a CPU)",
    )


def require_device(options: argparse.Namespace) -> None:
    """Set torch up, and silence the peers' advice; end the program where the device is not there."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no CUDA device here")


def result_name(name: str, options: argparse.Namespace) -> str:
    """What the files of `--save` are called: dinghy on the CPU has the plain name."""
    parts = [name, options.base.rstrip("/").rpartition("/")[2], options.device]
    return "-".join(part for part in parts if part not in {"dinghy", "cpu"})


def not_measured(base: str = "sdxl") -> Row:
    """The row that stands for a GPU; `gpu_note` has the command."""
    return Row(f"{base.upper()} shapes on a GPU", None, None, None, extra={"how": "not measured"})


def gpu_note(module: str, base: str = "sdxl") -> str:
    """How to measure on a GPU."""
    return f"GPU: python -m benchmarks.{module} --base {base} --device cuda --dtype bfloat16 --save"


# ---------------------------------------------------------------------- adapters and requests


def random_adapter(base: BaseModel, seed: int, rank: int, *, size: float = 0.3) -> AdapterWeights:
    """Random factors on the attention layers with ‖ΔW·x‖ around `size`·‖x‖: visible, and far from noise."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in adaptable_layers(base, "attention").items():
        out, in_ = matrix_shape(layer)
        layers[name] = LayerFactors(
            torch.randn(rank, in_, generator=generator) / in_**0.5,
            torch.randn(out, rank, generator=generator) * size / out**0.5,
        )
    return AdapterWeights(base.digest, rank, layers)


def request(
    prompt: str, adapter: AdapterWeights | None, *, seed: int, steps: int, size: int | None = None
) -> GenerationRequest:
    """One guided image of one adapter (None: of the base), by DDIM; `size` in pixels, None is native."""
    return GenerationRequest(
        prompt=prompt,
        adapters=() if adapter is None else (AdapterUse(adapter),),
        steps=steps,
        guidance_scale=GUIDANCE,
        height=size,
        width=size,
        seed=seed,
    )


# ---------------------------------------------------------------------- an engine that is watched


class BatchWatch:
    """Counts UNet calls and their rows, as an observer of the engine.

    Attributes:
        calls: UNet calls.
        rows: their rows; a guided image has two.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.calls = self.rows = 0

    def batch(self, size: int, _adapters: int) -> None:
        """A UNet call of `size` rows."""
        self.calls += 1
        self.rows += size

    @property
    def mean_rows(self) -> float | None:
        """Rows of a UNet call."""
        return self.rows / self.calls if self.calls else None

    def __getattr__(self, name: str) -> Any:
        """Every other number of the engine is of no interest here."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_values: None


@contextmanager
def engine_on(
    base: BaseModel, *, slots: int, rank: int, threads: int, deterministic: bool | None
) -> Iterator[tuple[Engine, AdapterBank, BatchWatch]]:
    """An engine as the server builds it, with a queue that refuses nothing: load is bounded by the benchmark.

    Args:
        base: the base.
        slots: adapters that are on the device at once.
        rank: of the slots.
        threads: torch threads of the engine.
        deterministic: as the server's setting; None is the server's own choice.
    """
    watch: Any = BatchWatch()
    bank = AdapterBank(base, slots=slots + 1, rank=rank)
    settings = Settings(device=base.device.type, deterministic=deterministic)
    with tempfile.TemporaryDirectory() as folder:
        ready = warm_up(
            base,
            bank,
            deterministic=settings.keeps_bits,
            max_step_seconds=settings.max_step_seconds,
            costs_file=Path(folder) / "costs.json",
        )
    engine = Engine(
        base,
        bank,
        threads=threads,
        max_queue=1_000_000,
        costs=ready.costs,
        deterministic=settings.keeps_bits,
        observer=watch,
    )
    try:
        yield engine, bank, watch
    finally:
        engine.close()
        bank.close()


# ---------------------------------------------------------------------- figures


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed: with few values p99 is the largest."""
    return float(np.quantile(np.asarray(values), share, method="inverted_cdf"))


def apart(ours: Pixels, peers: Pixels) -> float:
    """Mean difference of two images in grey levels of 255."""
    return float(np.abs(ours.astype(np.int16) - peers.astype(np.int16)).mean())


def largest_difference(dtype: str) -> float:
    """Grey levels that images of the same work may differ by on average: the sum's order, or bfloat16's."""
    return 0.25 if dtype == "float32" else 6.0


def progress() -> Progress:
    """A progress bar on standard error."""
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
