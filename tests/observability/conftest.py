"""Prometheus' own programs, and a server that has worked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from expressions import program
from worked_server import Worked, worked_server


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus")


@pytest.fixture(scope="module")
def worked(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    """A server that has done every kind of work, and does some of it still."""
    with worked_server(tiny_sd15, tmp_path_factory.mktemp("worked")) as worked:
        yield worked


@pytest.fixture(scope="module")
def canonical_lines(worked: Worked) -> list[dict[str, Any]]:
    """The canonical log lines of what was done."""
    return [line for line in worked.lines() if line["event"] == "rpc"]
