"""Lists the benchmarks: what each asks, how to run it, how long it takes. `python -m benchmarks`."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

MINUTES = {
    "breakage": "hours",
    "budget": "hours",
    "interference": "3 min",
    "kernels": "5 min",
    "load": "8 min",
    "mixed_batch": "4 min",
    "overhead": "2 min",
    "soak": "30 min",
    "swap": "3 min",
}
"""On two idle cores without a GPU."""


def questions() -> dict[str, str]:
    """What each benchmark of this folder asks, by name: the first line of its docstring."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        match = re.match(rf"(.+?) `python -m benchmarks\.{path.stem}\b", text)
        if match:
            found[path.stem] = match[1]
    return found


def main() -> None:
    """Print the list."""
    lines = [
        f"  {'python -m benchmarks.' + name:36} {MINUTES[name]:>6}  {question}"
        for name, question in questions().items()
    ]
    options = (
        "Run one with .venv/bin/python. --quick proves that it works, --json prints JSON, --save also writes "
        "benchmarks/results/, --help tells the rest."
    )
    sys.stdout.write("\n".join([*lines, "", options, ""]))


if __name__ == "__main__":
    main()
