"""A short storm in every run of the tests; `python -m tests.chaos` is the long one."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mooring_server.storage import garbage
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store

from . import storm
from .place import Place, pages
from .table import Row


def rows_of(times: int, only: str) -> list[Row]:
    rows = [row for _, row in storm.storm(times, only=only)]
    assert rows
    for row in rows:
        if not row.not_run:
            assert row.problems == [], row
            assert row.times
    return rows


@pytest.mark.parametrize("focus", storm.FOCI)
def test_kills_on_sqlite_lose_nothing(focus: str) -> None:
    (row,) = rows_of(10, f"kill-local-{focus}")
    assert row.acknowledged
    assert row.recovered == row.times


def test_files_that_cannot_grow_lose_nothing() -> None:
    rows_of(2, "disk-limit")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("scenario", ["kill-shared", "replicas", "postgresql", "s3", "disk-full"])
def test_a_storm_on_everything_loses_nothing(scenario: str) -> None:
    rows = rows_of(20, scenario)
    assert all(row.acknowledged and row.jobs for row in rows if not row.not_run)


# -- the checks can fail: what they would have to find is done to a place that is whole ------------------


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where nothing broke, with some of everything."""
    folder = tmp_path_factory.mktemp("calm")
    place = Place(folder, f"sqlite:///{folder}/mooring.db", root=str(folder / "objects"))
    scene = storm.Scene(place, Row("calm"), 3)
    worker = scene.start()
    kinds: set[str] = set()

    def has_everything() -> bool:
        kinds.update(note["done"] for note in place.said() if "done" in note)
        return kinds >= {"upload", "import", "train", "evaluate", "batch", "publish"}

    assert storm._until(has_everything)
    scene.kill(worker)
    row = scene.finish()
    assert row.lost + row.half + row.double + row.orphans == []
    return place


def found(place: Place) -> Row:
    checker, row = storm.Checker(place), Row("")
    checker.look(row, finished=True)
    checker.close()
    return row


def damaged(place: Place, harm: Callable[[Store, LocalObjects], None], tmp_path: Path) -> Row:
    """What the checks say of a copy that came to harm."""
    folder = tmp_path / "copy"
    storm.shutil.copytree(place.folder, folder)
    copy = dataclasses.replace(
        place, folder=folder, url=f"sqlite:///{folder}/mooring.db", root=str(folder / "objects")
    )
    store, objects = copy.store(), copy.objects()
    harm(store, objects)
    store.close()
    return found(copy)


def truncate(objects: LocalObjects, key: str) -> None:
    path = objects.root / key
    path.write_bytes(path.read_bytes()[:-1])


def test_a_lost_adapter_is_found(calm: Place, tmp_path: Path) -> None:
    row = damaged(calm, lambda _, objects: objects.delete(next(objects.list("adapters/"))), tmp_path)
    assert "which is not there" in row.lost[0]


@pytest.mark.parametrize("what", ["adapters/", "photos/album"])
def test_half_an_object_is_found(calm: Place, tmp_path: Path, what: str) -> None:
    def harm(store: Store, objects: LocalObjects) -> None:
        if what == "adapters/":
            truncate(objects, next(objects.list(what)))
            return
        album = next(one for one in pages(store.list_subjects, "acme") if one.subject_id != "duck")
        truncate(objects, store.photos("acme", album.subject_id)[0].object_key)

    assert "is not the one that was written" in damaged(calm, harm, tmp_path).half[0]


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM adapters WHERE job_id IS NULL", "lost"),
        ("DELETE FROM photos WHERE subject_id != 'duck'", "lost"),
        ("DELETE FROM jobs WHERE kind = 'evaluate'", "half"),
        ("DELETE FROM adapters WHERE job_id IS NOT NULL", "half"),
        ("DELETE FROM batch_rows WHERE position = 1", "half"),
        ("UPDATE audit_log SET subject = 'mallory' WHERE number = 2", "half"),
        ("DELETE FROM gate_decisions", "orphans"),
        ("UPDATE jobs SET state = 'FAILED' WHERE kind = 'batch'", "lost"),
    ],
)
def test_a_row_that_is_gone_or_forged_is_found(
    calm: Place, tmp_path: Path, statement: str, kind: str
) -> None:
    def harm(store: Store, _objects: LocalObjects) -> None:
        # a connection of its own, which does not look at foreign keys
        with contextlib.closing(sqlite3.connect(store._engine.url.database)) as connection:
            connection.execute(statement)
            connection.commit()

    assert getattr(damaged(calm, harm, tmp_path), kind)


def test_two_things_of_one_request_are_found(calm: Place, tmp_path: Path) -> None:
    def harm(store: Store, _objects: LocalObjects) -> None:
        job = next(iter(pages(store.list_jobs, "acme", kinds=["train"])))
        for _ in range(2):  # the answer may have been begun once more than it was given
            store.create_job("acme", "train", job.spec)

    assert damaged(calm, harm, tmp_path).double


def test_a_collector_without_its_protection_is_found(
    calm: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(store: Store, objects: LocalObjects) -> None:
        store._clock = lambda: storm.time.time() + 10
        assert garbage.collect(store, objects, storm.NO_GRACE).keys == []
        monkeypatch.setattr(Store, "_needed_adapters", lambda *_: iter(()))
        monkeypatch.setattr(Store, "_needed_by_jobs", lambda *_: iter(()))
        assert garbage.collect(store, objects, storm.NO_GRACE).keys

    assert damaged(calm, harm, tmp_path).lost
