"""The shipped kernels compiled for GPUs that are not here: wide accesses, no spills, shared memory that fits.

In processes of their own, as TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton ships with the CUDA builds of torch")


def python(*arguments):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("sm", [80, 90])
def test_shipped_kernels_fit_the_device(sm):
    found = python("-m", "mooring_kernels.spectral.compiled", str(sm))
    sys.stdout.write(found.stdout)  # registers and shared memory, for `pytest -s` and for CI's log
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 12
    assert all(f"sm_{sm}" in line and "spills 0" in line for line in lines)


SPILLING = """
from dataclasses import replace
from mooring_kernels.spectral import compiled, plan
plan.TILES[64] = replace(plan.TILES[64], solve_precision="ieee")
compiled.SHIPPED[:] = [compiled.Case("solve", 64)]
raise SystemExit(compiled.main(["90"]))
"""


def test_the_check_sees_spills():
    found = python("-c", SPILLING)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "<-- wrong" in found.stdout
