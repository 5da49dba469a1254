from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/mooring.db")
    yield store
    store.close()


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")
