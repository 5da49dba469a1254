from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.storage.objects import LocalObjects, check_key


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def test_bytes_come_back_and_can_be_replaced(objects: LocalObjects) -> None:
    objects.put("jobs/1/checkpoint.safetensors", b"one")
    objects.put("jobs/1/checkpoint.safetensors", b"two")
    assert objects.get("jobs/1/checkpoint.safetensors") == b"two"
    assert objects.exists("jobs/1/checkpoint.safetensors")


def test_what_is_missing_is_a_key_error(objects: LocalObjects) -> None:
    objects.put("a/b", b"x")
    for key in ("nothing", "a", "a/b/c", "a/c"):
        assert not objects.exists(key)
        with pytest.raises(KeyError):
            objects.get(key)
        objects.delete(key)
    assert objects.get("a/b") == b"x"


def test_delete_removes_and_may_be_repeated(objects: LocalObjects) -> None:
    objects.put("a/b", b"x")
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")


def test_list_gives_keys_by_prefix_in_order(objects: LocalObjects) -> None:
    for key in ("jobs/2/x", "jobs/10/x", "jobs/1/b/c", "jobs/1/a", "photos/1"):
        objects.put(key, b"")
    (objects.root / "jobs" / ".tmp-left").write_bytes(b"")
    assert list(objects.list()) == ["jobs/1/a", "jobs/1/b/c", "jobs/10/x", "jobs/2/x", "photos/1"]
    assert list(objects.list("jobs/1/")) == ["jobs/1/a", "jobs/1/b/c"]
    assert list(objects.list("jobs/1")) == ["jobs/1/a", "jobs/1/b/c", "jobs/10/x"]
    assert list(objects.list("none/")) == []
    assert objects.remove_leftovers() == 1


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "a//b", "a/", "..", "a/../b", ".tmp-x", "a/.hidden", "a\\b", "a\0b", "ä", "a b"],
)
def test_keys_that_are_no_plain_paths_are_refused(objects: LocalObjects, key: str) -> None:
    for call in (lambda: objects.put(key, b""), lambda: objects.get(key), lambda: objects.delete(key)):
        with pytest.raises(ValueError, match="not an object key"):
            call()
    assert list(objects.root.rglob("*")) == []


@given(st.text(alphabet="ab./\\-_\0é ", max_size=12))
def test_no_accepted_key_leaves_the_root(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    root = Path("/srv/objects")
    path = Path(os.path.normpath(root / key))
    assert path != root
    assert path.is_relative_to(root)
    assert str(path) == f"{root}/{key}"


def test_the_file_is_durable_before_it_has_its_name_and_the_name_after(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def spy(name: str, real):
        def call(*args):
            what = str(Path(f"/proc/self/fd/{args[0]}").readlink()) if name == "fsync" else str(args[-1])
            done.append(f"{name} {'.tmp' if '.tmp-' in what else Path(what).name}")
            return real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spy(name, getattr(os, name)))
    objects.put("new/key", b"x")
    assert done == ["fsync objects", "fsync .tmp", "replace key", "fsync new"]


def test_a_failed_put_leaves_the_old_bytes_and_no_litter(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a/key", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        objects.put("a/key", b"new")
    assert objects.get("a/key") == b"old"
    assert [path.name for path in objects.root.rglob("*") if path.is_file()] == ["key"]


WRITER = """
import sys
from mooring_server.storage.objects import LocalObjects
objects = LocalObjects(sys.argv[1])
print("ready", flush=True)
for number in range(10**9):
    objects.put("job/checkpoint", bytes([number % 256]) * 3_000_000)
"""


def test_a_killed_writer_leaves_whole_objects(objects: LocalObjects) -> None:
    for delay in (0.02, 0.05, 0.08):
        with subprocess.Popen([sys.executable, "-c", WRITER, objects.root], stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            while not objects.exists("job/checkpoint"):
                time.sleep(0.005)
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        data = objects.get("job/checkpoint")
        assert len(data) == 3_000_000
        assert len(set(data)) == 1
    assert list(objects.list()) == ["job/checkpoint"]
