"""The client and the command line's help load no tensor library, so they answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = [
    "torch",
    "diffusers",
    "transformers",
    "sqlalchemy",
    "numpy",
    "scipy",
    "mooring_kernels",
    "opentelemetry",
]


def heavy_after(code: str) -> str:
    """Heavy modules that a fresh interpreter holds after running `code`."""
    probe = f"{code}\nimport sys\nprint('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.rsplit("HEAVY ", 1)[1].strip()


@pytest.mark.parametrize("module", ["mooring", "mooring.aio", "mooring.errors"])
def test_client_imports_are_light(module: str) -> None:
    assert heavy_after(f"import {module}") == "[]"


COMMANDS = [
    "",
    "serve",
    "train",
    "generate",
    "evaluate",
    "subjects",
    "adapters",
    "jobs",
    "keys",
    "keys create",
    "demo",
    "health",
    "verify",
    "jobs watch",
    "audit",
    "audit verify",
    "db",
    "db upgrade",
    "db verify",
    "gc",
    "backup",
    "restore",
]


def test_help_of_every_command_is_light() -> None:
    code = (
        "from typer.testing import CliRunner\nfrom mooring_server.cli import app\n"
        f"for c in {COMMANDS!r}:\n"
        "    r = CliRunner().invoke(app, [*c.split(), '--help'])\n"
        "    assert r.exit_code == 0, (c, r.output)\n"
    )
    assert heavy_after(code) == "[]"
