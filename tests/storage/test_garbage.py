"""Garbage goes, and nothing that is needed ever does, whatever the interleaving."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from mooring_server.errors import MooringError, StorageUnavailableError
from mooring_server.storage import schema
from mooring_server.storage.database import new_id
from mooring_server.storage.garbage import Retention, collect
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import JobState, NewPhoto
from mooring_server.storage.objects import LocalObjects, content_key
from mooring_server.storage.store import Store
from sqlalchemy import Connection, select
from store_rows import new_subject, publish

DAY = 86_400.0
AT_ONCE = Retention(0.0, 0.0, 0.0)


class SteppingClock:
    def __init__(self) -> None:
        self.now = 4_000_000_000.0  # later than any file's time: nothing is too young

    def __call__(self) -> float:
        return self.now


def photo(key: str, number: int) -> NewPhoto:
    return NewPhoto("x.png", f"{number:064x}", key, 1, 1, 1)


def referenced(store: Store) -> set[str]:
    """Every key that a row needs, read without the collector's own rules."""
    with store.reading() as connection:
        keys = set(connection.scalars(select(schema.photos.c.object_key)))
        live = select(schema.adapters.c.object_key).where(schema.adapters.c.delete_time.is_(None))
        keys |= set(connection.scalars(live))
        keys |= set(
            connection.scalars(
                select(schema.jobs.c.checkpoint_key).where(
                    schema.jobs.c.checkpoint_key.is_not(None),
                    schema.jobs.c.state.in_(["PENDING", "RUNNING"]),
                )
            )
        )
        batches = select(schema.jobs.c.job_id).filter_by(kind="batch", state="PENDING")
        keys |= {rows_of(job_id) for job_id in connection.scalars(batches)}
    return keys


def rows_of(job_id: str) -> str:
    return f"jobs/{job_id}/rows.jsonl"


class Interleavings(RuleBasedStateMachine):
    """Uploads, imports, trainings and two collectors, each cut into steps that any other may come between.

    The graces are zero: only the protocol protects.
    """

    pending_photos = Bundle("pending_photos")
    pending_imports = Bundle("pending_imports")
    pending_batches = Bundle("pending_batches")
    claims = Bundle("claims")
    trained = Bundle("trained")
    listed = Bundle("listed")
    doomed = Bundle("doomed")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.clock = SteppingClock()
        self.store = Store(f"sqlite:///{self._folder.name}/db", clock=self.clock)
        self.objects = LocalObjects(Path(self._folder.name) / "objects")
        self._numbers = itertools.count(1)

    def teardown(self) -> None:
        self.store.close()
        self._folder.cleanup()

    @initialize()
    def begin(self) -> None:
        new_subject(self.store)

    @rule(target=pending_photos)
    def put_photo(self) -> Any:
        number = next(self._numbers)
        key = content_key(f"photos/u/{number}", b"p", "png")
        self.objects.put(key, b"p")
        return key, number

    @rule(pending=consumes(pending_photos))
    def add_photo(self, pending: Any) -> None:
        with contextlib.suppress(StorageUnavailableError):
            self.store.add_photos("acme", "duck", [photo(*pending)])

    @rule()
    def delete_subject(self) -> None:
        for key in self.store.delete_subject("acme", "duck"):
            self.objects.delete(key)
        new_subject(self.store)

    @rule(target=pending_imports)
    def put_import(self) -> Any:
        key = content_key(f"adapters/import{next(self._numbers)}", b"a", "safetensors")
        self.objects.put(key, b"a")
        return key

    @rule(key=consumes(pending_imports))
    def publish_import(self, key: str) -> None:
        with contextlib.suppress(StorageUnavailableError):
            publish(self.store, object_key=key)

    @rule(target=pending_batches)
    def put_rows(self) -> Any:
        job_id = new_id()
        self.objects.put(rows_of(job_id), b"r")
        return job_id

    @rule(job_id=consumes(pending_batches))
    def queue_batch(self, job_id: str) -> None:
        with contextlib.suppress(StorageUnavailableError):
            self.store.create_job("acme", "batch", {}, job_id=job_id, objects=[rows_of(job_id)])

    @rule(target=claims)
    def claim(self) -> Any:
        self.store.create_job("acme", "train", {})
        job = self.store.claim_job("worker", 30.0, kinds=["train"])
        return multiple() if job is None else job

    @rule(job=claims)
    def checkpoint(self, job: Any) -> None:
        data = str(next(self._numbers)).encode()
        key = content_key(f"jobs/{job.job_id}/checkpoint-{job.lease[:8]}", data, "bin")
        self.objects.put(key, data)
        try:
            before = self.store.note_checkpoint("acme", job.job_id, job.lease, key)
        except LeaseLostError:
            return
        if before is not None:
            self.objects.delete(before)

    @rule(job=claims, target=trained)
    def put_trained(self, job: Any) -> Any:
        key = content_key(f"adapters/{job.job_id}", b"t", "safetensors")
        self.objects.put(key, b"t")
        return job, key

    @rule(made=trained)
    def publish_trained(self, made: Any) -> None:
        job, key = made
        with contextlib.suppress(LeaseLostError):
            publish(self.store, object_key=key, job_id=job.job_id, lease=job.lease)

    @rule(job=claims)
    def fail(self, job: Any) -> None:
        with contextlib.suppress(LeaseLostError):
            self.store.finish_job("acme", job.job_id, job.lease, JobState.FAILED, error={"reason": "X"})

    @rule()
    def leases_run_out(self) -> None:
        self.clock.now += 60.0

    @rule()
    def delete_adapters(self) -> None:
        with contextlib.suppress(MooringError):
            self.store.delete_adapter("acme", "duck")

    @rule(target=listed)
    def list_objects(self) -> Any:
        return list(self.objects.list())

    @rule(keys=consumes(listed), target=doomed)
    def condemn(self, keys: Any) -> Any:
        return self.store.condemn(keys, AT_ONCE)

    @rule(keys=doomed, data=st.data())
    def delete_some(self, keys: Any, data: st.DataObject) -> None:
        # a collector that was frozen may delete long after another one has, and more than once
        if keys:
            self.objects.delete(data.draw(st.sampled_from(keys)))

    @rule()
    def sweep(self) -> None:
        collect(self.store, self.objects, AT_ONCE)

    @invariant()
    def everything_needed_is_there(self) -> None:
        present = set(self.objects.list())
        assert referenced(self.store) <= present


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def _no_refusal(_store: Store, _connection: Connection, _keys: Sequence[str]) -> None:
    """A writer that does not look whether its object is condemned."""


def _no_look(_store: Store, _connection: Connection, keys: Sequence[str], _retention: Retention) -> list[str]:
    """A collector that does not look who refers to an object."""
    return list(keys)


@pytest.mark.parametrize(
    ("protection", "broken"), [("require_not_condemned", _no_refusal), ("_unneeded", _no_look)]
)
def test_without_its_protection_a_loss_is_found(
    protection: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interleavings are worth what they can find: each half of the protocol alone loses objects."""
    monkeypatch.setattr(Store, protection, broken)
    many = settings(
        max_examples=300,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Interleavings, settings=many)


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def test_what_stays_and_what_goes(store: Store, clock: Any, objects: LocalObjects) -> None:
    clock.now = 4_000_000_000.0
    new_subject(store)
    running = store.create_job("acme", "train", {})
    job = store.claim_job("worker", 1e9)
    ended = store.create_job("acme", "evaluate", {})
    other = store.claim_job("worker", 1e9)
    assert (job.job_id, other.job_id) == (running.job_id, ended.job_id)
    store.finish_job("acme", other.job_id, other.lease, JobState.SUCCEEDED, result={})
    kept = [
        "photos/u/1",
        "adapters/live",
        f"adapters/{job.job_id}.x",
        f"jobs/{job.job_id}/checkpoint-1.x",
        f"jobs/{job.job_id}/photos.json",
        f"jobs/{ended.job_id}/artifacts/report.html",
        f"jobs/{ended.job_id}/previews/1.png",
        f"jobs/{ended.job_id}/rows.jsonl",
        "somebody/elses",
    ]
    garbage = [
        "photos/u/2",
        "adapters/crashed-import",
        f"adapters/{ended.job_id}.x",
        f"jobs/{ended.job_id}/checkpoint-1.x",
        f"jobs/{ended.job_id}/photos.json",
        "jobs/never-was/artifacts/x.png",
    ]
    for key in kept + garbage:
        objects.put(key, b"12")
    store.add_photos("acme", "duck", [photo("photos/u/1", 1)])
    publish(store, object_key="adapters/live")

    would = collect(store, objects, dry_run=True)
    assert sorted(would.keys) == sorted(garbage)
    assert (would.seen, would.size) == (len(kept) + len(garbage) - 1, 2 * len(garbage))
    assert len(list(objects.list())) == len(kept) + len(garbage)
    assert sorted(collect(store, objects).keys) == sorted(garbage)
    assert sorted(objects.list()) == sorted(kept)

    store.delete_adapter("acme", "duck")
    clock.now += 6.9 * DAY
    assert collect(store, objects).keys == []
    clock.now += 0.2 * DAY
    assert collect(store, objects).keys == ["adapters/live"]
    clock.now += 83 * DAY  # 90.1 since the evaluation's end
    assert sorted(collect(store, objects).keys) == sorted(kept[5:8])


def test_what_is_young_stays(store: Store, clock: Any, objects: LocalObjects) -> None:
    objects.put("photos/u/1", b"")
    clock.now = (objects.root / "photos/u/1").stat().st_mtime + DAY - 60
    assert collect(store, objects).keys == []
    clock.now += 120
    assert collect(store, objects).keys == ["photos/u/1"]


def test_one_replica_at_a_time_takes_a_background_task(store: Store, open_store: Any, clock: Any) -> None:
    other = open_store()
    assert store.take_turn("gc", "one", 60)
    assert not other.take_turn("gc", "two", 60)
    assert not store.take_turn("gc", "one", 60)
    assert store.take_turn("else", "two", 60)
    clock.now += 60
    assert other.take_turn("gc", "two", 60)


def test_a_publisher_and_a_collector_at_once_never_both_win(open_store: Any, objects: LocalObjects) -> None:
    """On PostgreSQL both transactions run side by side; the lock makes one of them see the other."""
    stores = [open_store(), open_store()]
    new_subject(stores[0])
    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            key, start = f"adapters/{number}", threading.Barrier(2)

            def import_(key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                try:
                    publish(stores[0], adapter_id=f"a{key[9:]}", object_key=key)
                except StorageUnavailableError:
                    return False
                return True

            def condemn(key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return stores[1].condemn([key], AT_ONCE) == [key]

            published, condemned = pool.submit(import_), pool.submit(condemn)
            assert published.result() != condemned.result()
