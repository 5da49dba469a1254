"""What has to be ready before the first request: measured costs, prepared passes, kernels that were run once.

Runs on the thread that loads the base, before an engine owns it; the server says NOT_SERVING meanwhile.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.costs import MIN_ROWS, CostTable, cached, measure
from mooring_server.engine.model import BaseModel
from mooring_server.engine.static_passes import StaticPasses, cuda_graph
from mooring_server.engine.ticks import UnetCall, answer
from mooring_server.errors import MooringError, Reason


@dataclass(frozen=True)
class Ready:
    """What a start gives the engine.

    Args:
        costs: of UNet passes.
        prepared: compiled or captured passes; None when there are none.
    """

    costs: CostTable
    prepared: StaticPasses | None


def warm_up(
    base: BaseModel,
    bank: AdapterBank,
    *,
    deterministic: bool,
    compiled: bool = False,
    cuda_graphs: bool = False,
    max_step_seconds: float,
    costs_file: Path,
) -> Ready:
    """Measure passes, or read what an earlier start measured; prepare them; run every network once.

    Args:
        base: the base model.
        bank: its bank.
        deterministic: as the engine will run.
        compiled: compile the UNet.
        cuda_graphs: replay passes as CUDA graphs.
        max_step_seconds: how long a pass of several requests may take.
        costs_file: where measured costs are kept.

    Raises:
        MooringError: BASE_NOT_USABLE when the chosen attention, dtype or compiler does not work here.
    """
    row_wise = deterministic and base.device.type == "cpu"
    prepared = None
    if compiled or cuda_graphs:
        prepared = StaticPasses(
            base,
            bank,
            compiler="inductor" if compiled else None,
            capture=cuda_graph if cuda_graphs else None,
        )
    try:
        costs = cached(
            costs_file,
            {
                "max_step_seconds": max_step_seconds,
                **_key(base, bank, row_wise=row_wise, compiled=compiled, cuda_graphs=cuda_graphs),
            },
            lambda: measure(
                base, bank, max_step_seconds=max_step_seconds, row_wise=row_wise, prepared=prepared
            ),
        )
        if prepared is not None:
            rows, largest = MIN_ROWS, costs.limit(costs.native)
            while rows < 2 * largest:
                prepared.prepare(rows)
                rows *= 2
        _run_once(base, bank, row_wise=row_wise)
    except RuntimeError as error:  # of torch and its compilers, which share no narrower class
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MooringError(
            Reason.BASE_NOT_USABLE,
            f"The base model cannot run as configured on {base.device}: {first}",
            remedy=(
                "Check MOORING_ATTENTION, MOORING_DTYPE, MOORING_COMPILE and MOORING_CUDA_GRAPHS; their "
                "defaults run everywhere."
            ),
        ) from error
    return Ready(costs, prepared)


@torch.no_grad()
def _run_once(base: BaseModel, bank: AdapterBank, *, row_wise: bool) -> None:
    """Text, UNet with and without an adapter, VAE: libraries choose and set up their kernels at first use."""
    side = base.native_size // base.vae_scale_factor
    latents = torch.zeros(MIN_ROWS, base.latent_channels, side, side, device=base.device)
    embeds = base.encode_prompt([""]).rows([0] * MIN_ROWS)
    slot = bank.reserve()
    try:
        for mix in ([], [(slot, 1.0)]):
            call = UnetCall(latents, torch.tensor(base.num_train_timesteps // 2), embeds, [mix] * MIN_ROWS)
            answer(base, bank, [call], row_wise=row_wise)
    finally:
        bank.release(slot)
    base.decode(latents[:1])


def _key(
    base: BaseModel, bank: AdapterBank, *, row_wise: bool, compiled: bool, cuda_graphs: bool
) -> Mapping[str, Any]:
    """All that the figures depend on."""
    on_cuda = base.device.type == "cuda"
    return {
        "base": base.digest,
        "device": torch.cuda.get_device_name(base.device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(base.dtype),
        "autocast": base.autocast,
        "attention": base.attention,
        "row_wise": row_wise,
        "compiled": compiled,
        "cuda_graphs": cuda_graphs,
        "rank": bank.rank,
        "targets": bank.targets,
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The processor's name where the system tells it, and what torch uses of it."""
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}".strip()
