"""What every benchmark shares: its options, its rows, the machine it ran on, its table and its files.

A row says what was measured (`ours`), what it is compared with (`peer`), their ratio, the goal and whether it
was met, plus further columns. `--json` prints the same as one JSON document; `--save` also writes both forms
to benchmarks/results/, so that a committed figure always has its machine and commit beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 200
"""Columns of a table that is not printed on a terminal."""


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Args:
        name: what was measured.
        ours: Mooring's figure.
        peer: what it is compared with: another tool in the same run, or the value it should have.
        ratio: ours / peer.
        goal: the goal in words, such as "0.80–1.20" or "≥ 1.3×"; empty for none.
        met: whether the goal was met; None without a goal.
        unit: of ours and peer.
        extra: further columns, by heading.
    """

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    goal: str = ""
    met: bool | None = None
    unit: str = ""
    extra: dict[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Where and on what a benchmark ran."""

    cpu: str
    cores: int
    memory_gib: float
    accelerator: str
    python: str
    torch: str
    commit: str

    @staticmethod
    def here() -> Machine:
        """This machine, this commit ("+" when tracked files are changed)."""
        import torch

        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        return Machine(
            cpu=_cpu_name(),
            cores=os.cpu_count() or 1,
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            accelerator=accelerator,
            python=platform.python_version(),
            torch=str(torch.__version__),
            commit=_commit(),
        )

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib} GiB, accelerator: {self.accelerator}; "
            f"Python {self.python}, torch {self.torch}; commit {self.commit}"
        )


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a small run that proves the benchmark works")
    options.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME.{json,txt}")
    return options


def show(
    name: str,
    title: str,
    rows: Sequence[Row],
    *,
    notes: Sequence[str] = (),
    summary: dict[str, float | str | None] | None = None,
    options: argparse.Namespace,
) -> None:
    """Print a benchmark's rows as `options` ask for, and save them.

    Args:
        name: the benchmark's module name; names the files.
        title: heading.
        rows: in order.
        notes: sentences below the table.
        summary: figures over all rows.
        options: of `parser`.
    """
    machine = Machine.here()
    document = {
        "benchmark": name,
        "title": title,
        "quick": options.quick,
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
        "summary": summary or {},
        "notes": list(notes),
    }
    if options.json:
        sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        from rich.console import Console  # here: on a borrowed machine `--json` does without rich

        wide = None if sys.stdout.isatty() else WIDTH
        _print(Console(width=wide), title, rows, notes, summary, machine)
    if options.save:
        from rich.console import Console

        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        with (RESULTS / f"{name}.txt").open("w") as file:
            _print(Console(file=file, width=WIDTH), title, rows, notes, summary, machine)


def _print(
    console: Console,
    title: str,
    rows: Sequence[Row],
    notes: Sequence[str],
    summary: dict[str, float | str | None] | None,
    machine: Machine,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    extra = list(dict.fromkeys(heading for row in rows for heading in row.extra))
    unit = next((row.unit for row in rows if row.unit), "")
    table = Table(title=title, title_justify="left", caption=str(machine), caption_justify="left")
    table.add_column("")
    for heading in ("ours", "peer", "ratio"):
        titled = f"{heading} [{unit}]" if unit and heading != "ratio" else heading
        table.add_column(escape(titled), justify="right")
    table.add_column("goal")
    for heading in extra:
        table.add_column(heading, justify="right")
    for row in rows:
        mark = {None: "", True: " ✓", False: " ✗"}[row.met]
        table.add_row(
            row.name,
            _number(row.ours),
            _number(row.peer),
            _number(row.ratio),
            row.goal + mark,
            *(_number(row.extra.get(heading)) for heading in extra),
        )
    console.print(table)
    for key, value in (summary or {}).items():
        console.print(f"{key}: {_number(value)}", highlight=False, markup=False)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _number(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4g}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    if known := os.environ.get("MOORING_COMMIT"):  # for a copy of the tree without its history
        return known
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        state = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")
