"""`mooring db verify` names what rows need and is not there, and what is there and was not written so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mooring_server.cli import app
from mooring_server.storage.models import NewPhoto
from mooring_server.storage.objects import LocalObjects, content_key
from mooring_server.storage.store import Store
from store_rows import new_subject, publish
from typer.testing import CliRunner, Result


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, list[str]]:
    """A photo, an adapter, a deleted adapter whose file is gone, a file that nobody names."""
    store, objects = Store(f"sqlite:///{tmp_path}/mooring.db"), LocalObjects(tmp_path / "objects")
    keys = [
        content_key("photos/u/1", b"photo", "png"),
        content_key("adapters/a", b"factors", "safetensors"),
        content_key("jobs/j/artifacts/history", b"[]", "json"),
    ]
    for key, data in zip(keys, (b"photo", b"factors", b"[]"), strict=True):
        objects.put(key, data)
    new_subject(store)
    store.add_photos("acme", "duck", [NewPhoto("x.png", "0" * 64, keys[0], 1, 1, 1)])
    publish(store, object_key=keys[1])
    publish(store, adapter_id="gone", object_key="adapters/gone")
    store.delete_adapter("acme", "gone")
    store.close()
    return tmp_path, keys


def verify(state: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["db", "verify", "--state-dir", str(state), *options])


def test_what_is_whole(state: tuple[Path, list[str]]) -> None:
    folder, _ = state
    done = verify(folder)
    assert (done.exit_code, done.output) == (0, "3 objects, 14 bytes\n")
    assert json.loads(verify(folder, "--json").output) == {
        "objects": 3,
        "size_bytes": 14,
        "missing": [],
        "damaged": [],
    }


@pytest.mark.parametrize("index", [0, 1])
def test_what_a_row_names_is_missed(state: tuple[Path, list[str]], index: int) -> None:
    folder, keys = state
    (folder / "objects" / keys[index]).unlink()
    done = verify(folder)
    assert done.exit_code == 1
    assert f"missing {keys[index]}" in done.output.replace("\n", "")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_was_not_written_so_is_named(state: tuple[Path, list[str]], index: int) -> None:
    folder, keys = state
    path = folder / "objects" / keys[index]
    path.write_bytes(path.read_bytes()[:-1])
    done = verify(folder, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["damaged"] == [keys[index]]
    assert json.loads(done.stdout)["missing"] == []
