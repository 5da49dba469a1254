"""Where the recipe runs: one GPU if there is one, else the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Compute:
    """A device and the number of processes that describe samples ahead of it."""

    device: torch.device
    workers: int

    def autocast(self) -> Any:
        """bf16 autocast on a GPU and on a CPU that computes in it (1.3 times as fast there, else half)."""
        wanted = self.device.type != "cpu" or computes_bf16()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)


@cache
def computes_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself (AVX-512 BF16); false where it does not say."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def choose(name: str = "") -> Compute:
    """The device ``name`` ("cpu", "cuda"); by default a GPU where there is one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        return Compute(device, 0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return Compute(device, max(1, min(14, (os.cpu_count() or 2) - 2)))


def plain_attention(compute: Compute, model: Any) -> None:
    """On a CPU the backward pass of fused attention is 40 % of a training step; plain products a tenth.

    ``model`` is diffusers' UNet or any module that holds transformers' models.
    """
    if compute.device.type != "cpu":
        return
    if hasattr(model, "set_attn_processor"):
        from diffusers.models.attention_processor import AttnProcessor

        processor: Any = AttnProcessor  # diffusers ships no types
        model.set_attn_processor(processor())
        return
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation("eager")
