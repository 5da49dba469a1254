"""A linear layer whose batch rows use different adapters of one arena."""

from __future__ import annotations

from mooring_kernels.multi_lora.op import multi_lora_, multi_lora_shared_, stacked

__all__ = ["multi_lora_", "multi_lora_shared_", "stacked"]
