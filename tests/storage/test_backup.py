from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from mooring_server.cli import app
from mooring_server.errors import MooringError, Reason
from mooring_server.storage import backup as backups
from mooring_server.storage.models import NewPhoto
from mooring_server.storage.objects import LocalObjects, content_key
from mooring_server.storage.store import Store
from store_rows import new_subject, publish
from typer.testing import CliRunner


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with a photo, an adapter and a job under way."""
    folder = tmp_path / "state"
    store, objects = open_state(folder)
    new_subject(store)
    put_photo(store, objects, 1)
    objects.put("adapters/a", b"factors")
    publish(store, object_key="adapters/a")
    store.create_job("acme", "train", {})
    job = store.claim_job("worker", 1e9)
    objects.put(f"jobs/{job.job_id}/photos.json", b"[]")
    store.close()
    return folder


def open_state(folder: Path) -> tuple[Store, LocalObjects]:
    return Store(url(folder)), LocalObjects(folder / "objects")


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/mooring.db"


def put_photo(store: Store, objects: LocalObjects, number: int) -> str:
    key = content_key(f"photos/u/{number}", b"p%d" % number, "png")
    objects.put(key, b"p%d" % number)
    store.add_photos("acme", "duck", [NewPhoto("x.png", f"{number:064x}", key, 1, 1, 1)])
    return key


def mooring(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_backup_restores_everything(state: Path, tmp_path: Path) -> None:
    assert "3 objects and the database" in mooring("backup", tmp_path / "copy", "--state-dir", state)
    restored = tmp_path / "restored"
    assert "3 objects and the database" in mooring("restore", tmp_path / "copy", "--state-dir", restored)
    before, objects_before = open_state(state)
    after, objects_after = open_state(restored)
    assert list(objects_after.list()) == list(objects_before.list())
    assert all(objects_after.get(key) == objects_before.get(key) for key in objects_before.list())
    assert after.list_adapters("acme") == before.list_adapters("acme")
    assert after.photos("acme", "duck") == before.photos("acme", "duck")
    assert after.list_jobs("acme") == before.list_jobs("acme")
    token = before.list_subjects("acme", page_size=1)[1]
    assert token == after.list_subjects("acme", page_size=1)[1]
    before.close()
    after.close()


def test_a_backup_under_load_holds_what_its_rows_name(state: Path, tmp_path: Path) -> None:
    """Photos come and subjects go, objects with them, all the while."""
    store, objects = open_state(state)
    done, failures = threading.Event(), []

    def change() -> None:
        number = 2
        try:
            while not done.is_set():
                for _ in range(20):
                    put_photo(store, objects, number)
                    number += 1
                for key in store.delete_subject("acme", "duck"):
                    objects.delete(key)
                new_subject(store)
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(4):
            backups.backup(url(state), objects, tmp_path / f"copy{number}")
    finally:
        done.set()
        thread.join()
    store.close()
    assert not failures
    for number in range(4):
        folder = tmp_path / f"restored{number}"
        backups.restore(tmp_path / f"copy{number}", url(folder), LocalObjects(folder / "objects"))
        copy, held = open_state(folder)
        for subject in copy.list_subjects("acme")[0]:  # none, between its deletion and the next
            for photo in copy.photos("acme", subject.subject_id):
                held.get(photo.object_key)
        copy.close()


def test_a_backup_of_a_store_that_lost_an_object_says_so(state: Path, tmp_path: Path) -> None:
    _, objects = open_state(state)
    objects.delete("adapters/a")
    with pytest.raises(MooringError, match="1 objects that rows name are missing, for example adapters/a"):
        backups.backup(url(state), objects, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nothing_is_replaced(state: Path, tmp_path: Path) -> None:
    objects = LocalObjects(state / "objects")
    backups.backup(url(state), objects, tmp_path / "copy")
    with pytest.raises(MooringError, match="exists"):
        backups.backup(url(state), objects, tmp_path / "copy")
    with pytest.raises(MooringError, match="exists"):
        backups.restore(tmp_path / "copy", url(state), objects)
    with pytest.raises(MooringError, match="no complete backup"):
        backups.restore(state, url(tmp_path / "new"), objects)
    with pytest.raises(MooringError, match="pg_dump"):
        backups.backup("postgresql://host/db", objects, tmp_path / "other")


@pytest.mark.parametrize("damage", ["mooring.db", "objects/adapters/a"])
def test_a_damaged_backup_is_not_restored(state: Path, tmp_path: Path, damage: str) -> None:
    backups.backup(url(state), LocalObjects(state / "objects"), tmp_path / "copy")
    path = tmp_path / "copy" / damage
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(MooringError, match="is not what was backed up") as caught:
        backups.restore(tmp_path / "copy", url(tmp_path / "new"), LocalObjects(tmp_path / "new" / "objects"))
    assert caught.value.reason is Reason.OBJECT_DAMAGED
    assert not (tmp_path / "new" / "mooring.db").exists()


def test_the_collector_is_a_command(state: Path) -> None:
    (state / "objects" / "photos" / "u" / "left.png").write_bytes(b"12345")
    os.utime(state / "objects" / "photos" / "u" / "left.png", (1e9, 1e9))
    shown = mooring("gc", "--dry-run", "--state-dir", state)
    assert shown == "photos/u/left.png\n1 of 4 objects would go, 5 bytes\n"
    assert "1 of 4 objects deleted" in mooring("gc", "--state-dir", state)
    assert '"keys": []' in mooring("gc", "--state-dir", state, "--json")
