"""A real server on the tiny base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mooring_server.rpc.runtime import Runtime
from mooring_server.server import EmbeddedServer
from rpc_calls import Stubs, settings_for


@pytest.fixture(scope="session")
def server(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One server for all tests that only call it."""
    settings = settings_for(tiny_sd15, tmp_path_factory.mktemp("state"), max_batch_in_flight=4)
    with EmbeddedServer(settings, metrics=True) as running:
        yield running


@pytest.fixture(scope="session")
def runtime(server: EmbeddedServer) -> Runtime:
    """The parts of that server, to arrange what calls cannot."""
    return server.server.runtime


@pytest.fixture(scope="session")
def stubs(server: EmbeddedServer) -> Stubs:
    """Its services."""
    return Stubs(server.target)
