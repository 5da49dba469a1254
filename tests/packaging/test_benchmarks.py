"""`make bench` lists every benchmark there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import MINUTES, questions

ROOT = Path(__file__).resolve().parents[2]


def test_every_program_of_the_folder_is_a_benchmark_with_a_question() -> None:
    programs = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    } - {"__main__"}
    assert set(questions()) == programs == set(MINUTES)
    assert all(question.endswith("?") for question in questions().values())


def test_the_list_needs_no_packages() -> None:
    command = [sys.executable, "-S", "-m", "benchmarks"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[2] for line in listed.splitlines() if line.startswith("  ")] == [
        f"benchmarks.{name}" for name in sorted(MINUTES)
    ]
