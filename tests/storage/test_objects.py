from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_s3 import faulty
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.storage.buckets import open_objects
from mooring_server.storage.objects import LocalObjects, ObjectStore, check_key, content_key, first_written
from servers import BUCKET, S3

_numbers = itertools.count()


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


@pytest.fixture(params=["folder", "moto", "rclone"])
def any_objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return LocalObjects(tmp_path / "objects")
    server = request.getfixturevalue(f"{request.param}_server")
    return server.objects(f"test{next(_numbers)}/below")


def test_bytes_come_back_and_can_be_replaced(any_objects: ObjectStore) -> None:
    any_objects.put("jobs/1/checkpoint.safetensors", b"one")
    any_objects.put("jobs/1/checkpoint.safetensors", b"two")
    assert any_objects.get("jobs/1/checkpoint.safetensors") == b"two"
    assert any_objects.exists("jobs/1/checkpoint.safetensors")


def test_what_is_missing_is_a_key_error(any_objects: ObjectStore) -> None:
    any_objects.put("a/b", b"x")
    for key in ("nothing", "a/c", "b/c/d"):
        assert not any_objects.exists(key)
        with pytest.raises(KeyError):
            any_objects.get(key)
        any_objects.delete(key)
    assert any_objects.get("a/b") == b"x"


def test_a_folder_is_no_object(objects: LocalObjects) -> None:
    objects.put("a/b", b"x")
    for key in ("a", "a/b/c"):
        assert not objects.exists(key)
        with pytest.raises(KeyError):
            objects.get(key)
        objects.delete(key)
    assert objects.get("a/b") == b"x"


def test_delete_removes_and_may_be_repeated(any_objects: ObjectStore) -> None:
    any_objects.put("a/b", b"x")
    any_objects.delete("a/b")
    any_objects.delete("a/b")
    assert not any_objects.exists("a/b")


def test_list_gives_keys_by_prefix_in_order(any_objects: ObjectStore) -> None:
    before = time.time()
    for key in ("jobs/2/x", "jobs/10/x", "jobs/1/b/c", "jobs/1/a", "photos/1"):
        any_objects.put(key, b"xy")
    assert list(any_objects.list()) == ["jobs/1/a", "jobs/1/b/c", "jobs/10/x", "jobs/2/x", "photos/1"]
    assert list(any_objects.list("jobs/1/")) == ["jobs/1/a", "jobs/1/b/c"]
    assert list(any_objects.list("jobs/1")) == ["jobs/1/a", "jobs/1/b/c", "jobs/10/x"]
    assert list(any_objects.list("none/")) == []
    (entry,) = any_objects.entries("photos/")
    assert (entry.key, entry.size) == ("photos/1", 2)
    assert before - 2 <= entry.modified <= time.time() + 2


def test_what_names_its_content_may_be_written_again(any_objects: ObjectStore) -> None:
    key = content_key("adapters/1", b"factors", "safetensors")
    assert key == f"adapters/1.{hashlib.sha256(b'factors').hexdigest()}.safetensors"
    for _ in range(2):
        any_objects.put(key, b"factors")
        assert any_objects.get(key) == b"factors"


def test_bytes_that_are_not_what_the_key_names_are_not_given_out(any_objects: ObjectStore) -> None:
    key = content_key("adapters/1", b"factors", "safetensors")
    any_objects.put(key, b"fbctors")
    with pytest.raises(MooringError, match="is not the one that was written") as caught:
        any_objects.get(key)
    assert caught.value.reason is Reason.OBJECT_DAMAGED
    any_objects.put(key, b"factors")  # writing it again heals it
    assert any_objects.get(key) == b"factors"


def test_objects_of_other_prefixes_are_not_seen(moto_server: S3) -> None:
    moto_server.objects("one").put("photos/1", b"x")
    moto_server.objects("other").put("photos/2", b"x")
    assert list(moto_server.objects("one").list()) == ["photos/1"]


def test_wrong_credentials_are_said_to_be_that(rclone_server: S3) -> None:
    objects = replace(rclone_server, secret="wrong").objects()
    for call in (lambda: objects.put("a", b""), lambda: objects.get("a"), lambda: list(objects.list())):
        with pytest.raises(StorageUnavailableError, match="refuses the server's credentials"):
            call()


@pytest.mark.parametrize("bucket", ["mooring", "project-403"])
def test_a_bucket_that_is_away_is_unavailable_and_not_empty(bucket: str) -> None:
    objects = S3("http://127.0.0.1:9").objects(bucket, retry_seconds=0.1)
    for call in (lambda: objects.get("a"), lambda: objects.exists("a"), lambda: list(objects.list())):
        with pytest.raises(StorageUnavailableError, match="does not answer"):
            call()


@pytest.mark.parametrize("fault", ["lose", "truncate", "stale"])
def test_a_bucket_that_lies_about_writes_is_caught(moto_server: S3, fault: str) -> None:
    with faulty(moto_server) as (where, faults):
        objects = where.objects(f"lies-{fault}")
        objects.put("jobs/1/photos.json", b"old")
        faults.rates = {fault: 1.0}
        with pytest.raises(StorageUnavailableError, match="does not keep what is written"):
            objects.put("jobs/1/photos.json", b"new ones")
        assert faults.struck[fault] == 3
        faults.rates = {}
        objects.put("jobs/1/photos.json", b"new ones")
        assert objects.get("jobs/1/photos.json") == b"new ones"


def test_a_write_that_is_lost_once_is_written_again(moto_server: S3) -> None:
    with faulty(moto_server, seed=3) as (where, faults):
        objects = where.objects("lost-once")
        faults.rates = {"lose": 0.4, "truncate": 0.2, "fail": 0.2, "drop": 0.1}
        for number in range(20):
            data = bytes([number]) * 1000
            with contextlib.suppress(StorageUnavailableError):
                objects.put(content_key(f"adapters/{number}", data, "bin"), data)
                assert (
                    moto_server.objects("lost-once").get(content_key(f"adapters/{number}", data, "bin"))
                    == data
                )
        assert faults.struck["lose"] > 3


def test_a_read_that_breaks_on_its_way_is_read_again_and_never_given_out(moto_server: S3) -> None:
    with faulty(moto_server) as (where, faults):
        objects, key = where.objects("broken-read"), content_key("adapters/1", b"factors", "bin")
        objects.put(key, b"factors")
        faults.rates = {"corrupt": 1.0}
        with pytest.raises(MooringError, match="is not the one that was written"):
            objects.get(key)
        faults.rates = {"corrupt": 0.3}
        for _ in range(10):
            with contextlib.suppress(MooringError):
                assert objects.get(key) == b"factors"


@pytest.mark.parametrize("url", ["", "s3://", "gs://bucket/x", "http://host/bucket", "file://host/folder"])
def test_other_places_for_objects_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        open_objects(url)


def test_a_url_names_the_store(tmp_path: Path, moto_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        assert open_objects(url).root == tmp_path / "a b"
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    open_objects(f"s3://{BUCKET}/by/url/").put("a", b"x")
    assert moto_server.objects("by/url").get("a") == b"x"


def test_leftovers_of_killed_writers_are_removed_when_they_are_old(objects: LocalObjects) -> None:
    objects.put("jobs/1", b"")
    (objects.root / "jobs" / ".tmp-left").write_bytes(b"")
    assert list(objects.list()) == ["jobs/1"]
    assert objects.remove_leftovers(older_than=3600) == 0
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
    with pytest.raises(StorageUnavailableError, match="No space"):
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


def test_of_several_first_ones_the_oldest_whole_one_counts(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    assert first_written(objects, "jobs/1/photos") is None
    for seconds, data in ((30, b"second"), (10, b"damaged"), (20, b"first"), (40, b"third")):
        key = content_key("jobs/1/photos", data, "json")
        objects.put(key, data)
        os.utime(tmp_path / key, (seconds, seconds))
    (tmp_path / content_key("jobs/1/photos", b"damaged", "json")).write_bytes(b"damag")
    os.utime(tmp_path / content_key("jobs/1/photos", b"damaged", "json"), (10, 10))
    objects.put(content_key("jobs/1/photos-of-others", b"x", "json"), b"x")
    assert first_written(objects, "jobs/1/photos") == b"first"


def test_a_read_that_breaks_on_its_way_is_repeated(moto_server: S3) -> None:
    with faulty(moto_server, seed=2) as (where, faults):
        objects = where.objects("broken-reads")
        key = content_key("adapters/1", b"factors", "bin")
        objects.put(key, b"factors")
        faults.rates = {"corrupt": 0.5}
        whole = 0
        for _ in range(8):
            with contextlib.suppress(MooringError):  # broken three times in a row
                whole += objects.get(key) == b"factors"
        assert whole >= 6
        assert faults.struck["corrupt"] > 3
