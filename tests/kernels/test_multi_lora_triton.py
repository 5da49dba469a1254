"""The fused kernel in Triton's interpreter, against the float64 reference.

In a process of its own, because the interpreter must be chosen before the kernel is defined. The interpreter
cannot do bf16 and computes tf32 as float32, so dtypes are proven on a GPU only (test_multi_lora_gpu.py).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

SCRIPT = """
import torch
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.multi_lora.kernels import apply_
from mooring_kernels.multi_lora.reference import reference, reference_gradients

def check(rows, tokens, in_, out, rank, slots, dtype):
    layout = ArenaLayout([LayerShape("a", 3, 5), LayerShape("b", out, in_)], rank)
    flat = torch.full((4, layout.size), float("nan"))
    A, B = layout.views(flat)["b"]
    A.normal_(), B.normal_()
    A[0], B[0] = 0.0, 0.0
    x, plain = torch.randn(rows, tokens, in_).to(dtype), torch.randn(rows, tokens, out).to(dtype)
    plain[..., ::2] = -0.0
    scales = torch.linspace(0.5, 2.0, rows)
    result, where = plain.clone(), torch.tensor(slots)
    low = apply_(result, x, A, B.mT, where, scales, add=True, keep_low=True)
    exact = reference(plain, x, A, B, slots, scales.tolist())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert (result - exact).abs().max() <= tolerance * exact.abs().max(), "forward"
    for row, slot in enumerate(slots):
        share = scales[row] * x[row].float() @ A[slot].T
        assert torch.allclose(low[row].float(), share, atol=10 * tolerance * float(share.abs().max() + 1))
        if slot == 0:
            kind = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(result[row].view(kind), plain[row].view(kind)), "bits"
    grad_x = torch.full_like(x, float("nan"))
    apply_(grad_x, plain, B.mT, A, where, None, add=False, keep_low=False)
    exact, _, _ = reference_gradients(plain, x, A, B, slots, [1.0] * rows)
    assert (grad_x - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1), "gradient"

torch.manual_seed(0)
check(3, 33, 63, 65, 5, [2, 0, 1], torch.float32)
check(2, 20, 130, 40, 17, [3, 3], torch.float16)
check(1, 1, 1, 1, 1, [1], torch.float32)
check(2, 16, 16, 16, 16, [0, 0], torch.float32)
print("same")
"""


def test_the_interpreted_kernel_is_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.stdout.strip() == "same", found.stderr[-3000:]
