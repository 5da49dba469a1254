"""`spectral_cases.py` in processes of its own: Triton reads TRITON_INTERPRET when kernels are defined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton ships with the CUDA builds of torch")
CASES = Path(__file__).with_name("spectral_cases.py")


def run_cases(interpret):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    # no conftest: the cases need nothing but the kernels
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed is not None
    return int(passed[1])


def test_kernels_match_in_the_interpreter():
    assert run_cases(interpret=True) >= 49


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; the interpreter is tested above"
)
def test_kernels_match_on_the_device():
    assert run_cases(interpret=False) >= 49
