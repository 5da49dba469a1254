"""What the shipped kernels compile to, for devices that need not be there.

    python -m mooring_kernels.spectral.compiled [sm ...]

Prints for each kernel, rank and storage: registers of a thread, spills, shared memory, 128-bit accesses. Must
run in a process without TRITON_INTERPRET. Two properties cannot be seen by any numerical test and are easily
lost by a small change of a kernel: that factors are read 128 bits at a time, and that nothing spills.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mooring_kernels.spectral import kernels, launch

SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a program may have, by architecture."""
INTEGERS = {"slots", "target_rows", "work", "layers"}
OPTIONS = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    Args:
        kernel: `gram`, `solve`, or `grad`.
        rank: true rank; rows of A are aligned.
        storage: of the factors and the gradient, `fp32` or `bf16`.
        kind: penalty (`grad` only).
    """

    kernel: str
    rank: int
    storage: str = "fp32"
    kind: str = "spectral"

    @property
    def settings(self) -> dict[str, Any]:
        """Constants and options, those of the launch."""
        if self.kernel == "gram":
            return launch.gram_options(self.rank, aligned=True)
        if self.kernel == "solve":
            return launch.solve_options(self.rank, grams=False)
        return launch.grad_options(self.rank, self.kind, aligned=True)


@dataclass(frozen=True)
class Report:
    """What a case compiles to.

    Args:
        case: what was compiled.
        sm: architecture, 90 for Hopper.
        registers: of a thread.
        spills: loads and stores of thread-local memory in the machine code.
        shared: bytes of shared memory of a program.
        wide: accesses of 128 bits to global memory.
    """

    case: Case
    sm: int
    registers: int
    spills: int
    shared: int
    wide: int

    def __str__(self) -> str:
        case = self.case
        name = f"{case.kernel} {case.kind if case.kernel == 'grad' else ''}".strip()
        return (
            f"sm_{self.sm}  {name:<14} r{case.rank:<4}{case.storage}  registers {self.registers:>3}  spills"
            f" {self.spills}  shared {self.shared:>6} B  128-bit accesses {self.wide}"
        )


SHIPPED = [
    *(Case(kernel, rank) for rank in (16, 64, 128) for kernel in ("gram", "solve", "grad")),
    Case("gram", 16, "bf16"),
    Case("grad", 16, "bf16"),
    Case("grad", 64, kind="l2"),
]
"""The common ranks; the others lie between them."""
ALL = [
    *(Case("solve", rank) for rank in (16, 32, 64, 128)),
    *(Case("gram", rank, storage) for rank in (4, 16, 32, 64, 128) for storage in ("fp32", "bf16")),
    *(
        Case("grad", rank, storage, kind)
        for rank in (4, 16, 32, 64, 128)
        for storage in ("fp32", "bf16")
        for kind in launch.KIND_INDEX
    ),
]


def compile_case(case: Case, sm: int) -> Report:
    """Compile one case.

    Args:
        case: what.
        sm: for which architecture.
    """
    kernel = getattr(kernels, f"{case.kernel}_kernel")
    settings = case.settings
    constants = {name: value for name, value in settings.items() if name not in OPTIONS}
    signature = {name: _type(name, case.storage, constants) for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
        ),
        target=GPUTarget("cuda", sm, 32),
        options={name: value for name, value in settings.items() if name in OPTIONS},
    )
    usage, code = _inspect(compiled.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, "cuobjdump names the registers"
    return Report(
        case,
        sm,
        int(registers[1]),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        int(compiled.metadata.shared),
        len(re.findall(r"\b(?:LDG|LDGSTS|STG)\.[.A-Z0-9]*128\b", code)),
    )


def reports(cases: list[Case], architectures: list[int]) -> Iterator[Report]:
    """Compile cases one by one."""
    for sm in architectures:
        for case in cases:
            yield compile_case(case, sm)


def _type(name: str, storage: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in kernels.COUNTS:
        return "i32"
    if name == "scale":
        return "fp32"
    if name in INTEGERS:
        return "*i32"
    return f"*{storage}" if name in {"flat", "target"} else "*fp32"


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(  # noqa: S603 - Triton's own tool on a file of ours
                [str(tool), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    return usage, code


def main(arguments: list[str]) -> int:
    """Print the table; 1 when something spills, exceeds shared memory or reads narrowly."""
    everything = "--all" in arguments
    architectures = [int(a) for a in arguments if a.isdigit()] or sorted(SHARED_LIMIT)
    bad = 0
    for report in reports(ALL if everything else SHIPPED, architectures):
        wrong = report.spills > 0 or report.shared > SHARED_LIMIT[report.sm] or report.wide == 0
        bad += wrong
        sys.stdout.write(f"{report}{'  <-- wrong' if wrong else ''}\n")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
