"""Limits of what a tenant keeps, with many callers at once on two stores, and the account of device time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mooring_server.config import Quota
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.models import JobState
from mooring_server.storage.store import Store
from mooring_server.storage.usage import DAY_SECONDS
from store_rows import new_photo, new_subject, publish

WAIT_SECONDS = 60.0

ADDS: dict[str, Callable[[Store, int], Any]] = {
    "concurrent_jobs": lambda store, _: store.create_job("acme", "evaluate", {}),
    "adapters": lambda store, n: publish(store, adapter_id=f"a{n}", object_key=f"adapters/{n}"),
    "adapters by training": lambda store, _: store.create_job("acme", "train", {}),
    "stored_bytes": lambda store, n: store.add_photos("acme", f"s{n}", [new_photo(n)]),
    "stored_bytes by imports": lambda store, n: publish(
        store, adapter_id=f"a{n}", object_key=f"adapters/{n}", size_bytes=1000
    ),
}
LIMITS = {"concurrent_jobs": 3, "adapters": 3, "stored_bytes": 3500}


@pytest.mark.parametrize("what", ADDS)
def test_of_many_callers_at_once_no_more_get_through_than_there_is_room_for(
    open_store: Callable[[], Store], what: str
) -> None:
    limit = what.split(" ", maxsplit=1)[0]
    stores = [open_store() for _ in range(2)]
    for store in stores:
        store.quota_of = lambda tenant: Quota(**{limit: LIMITS[limit]}) if tenant == "acme" else Quota()
    for n in range(8):
        new_subject(stores[0], subject_id=f"s{n}")
    together = threading.Barrier(8)

    def add(n: int) -> MooringError | None:
        together.wait(WAIT_SECONDS)
        try:
            ADDS[what](stores[n % 2], n)
        except MooringError as error:
            return error
        return None

    with ThreadPoolExecutor(8) as threads:
        refusals = [error for error in threads.map(add, range(8)) if error is not None]
    assert len(refusals) == 5
    for error in refusals:
        assert error.reason is Reason.QUOTA_EXCEEDED
        assert error.metadata["cause"] == limit
        assert error.metadata["scope"] == "tenant"
        assert error.metadata["limit"] == f"{LIMITS[limit]:g}"


def test_nothing_is_trained_while_the_bytes_are_used_up(store: Store) -> None:
    store.quota_of = lambda _tenant: Quota(stored_bytes=1000)
    store.create_job("acme", "train", {})
    publish(store, object_key="adapters/large", size_bytes=1000)
    with pytest.raises(MooringError, match="stored_bytes"):
        store.create_job("acme", "train", {})
    store.create_job("acme", "evaluate", {})  # makes nothing that counts
    store.delete_adapter("acme", "duck")
    store.create_job("acme", "train", {})


def test_a_repeated_request_is_answered_though_the_limit_is_reached(store: Store) -> None:
    store.quota_of = lambda _tenant: Quota(concurrent_jobs=1)
    job = store.create_job("acme", "evaluate", {}, request_id="r")
    assert store.create_job("acme", "evaluate", {}, request_id="r").job_id == job.job_id
    with pytest.raises(MooringError, match="concurrent_jobs"):
        store.create_job("acme", "evaluate", {}, request_id="s")
    store.request_cancel("acme", job.job_id)
    store.create_job("acme", "evaluate", {}, request_id="s")  # the refused one left nothing behind


def test_what_is_deleted_or_has_ended_makes_room(store: Store) -> None:
    store.quota_of = lambda _tenant: Quota(adapters=1, stored_bytes=1500)
    publish(store)
    with pytest.raises(MooringError, match="adapters"):
        publish(store, adapter_id="next")
    store.delete_adapter("acme", "duck")
    job = store.create_job("acme", "train", {})
    with pytest.raises(MooringError, match="adapters"):
        publish(store, adapter_id="next")
    claimed = store.claim_job("worker", 30.0)
    assert claimed is not None
    store.finish_job("acme", job.job_id, claimed.lease, JobState.FAILED)
    publish(store, adapter_id="next", object_key="adapters/next")
    new_subject(store)
    store.add_photos("acme", "duck", [new_photo(1)])
    with pytest.raises(MooringError, match="stored_bytes"):
        store.add_photos("acme", "duck", [new_photo(2)])
    store.add_photos("acme", "duck", [new_photo(1)])  # known bytes are not stored again


def test_a_training_that_was_let_in_may_publish(store: Store) -> None:
    store.quota_of = lambda _tenant: Quota(adapters=1, concurrent_jobs=1)
    store.create_job("acme", "train", {})
    job = store.claim_job("worker", 30.0)
    assert job is not None
    publish(store, job_id=job.job_id, lease=job.lease)
    with pytest.raises(MooringError, match="adapters"):
        store.create_job("acme", "train", {})


def test_tenants_do_not_count_for_each_other(store: Store) -> None:
    store.quota_of = lambda _tenant: Quota(concurrent_jobs=1)
    store.create_job("acme", "evaluate", {})
    store.create_job("other", "evaluate", {})


def test_device_time_adds_up_over_replicas_and_begins_anew_each_day(
    open_store: Callable[[], Store], clock: Any
) -> None:
    one, two = open_store(), open_store()
    one.add_device_seconds({"acme": 1.5, "other": 8.0})
    two.add_device_seconds({"acme": 2.0})
    assert two.device_seconds("acme") == (3.5, clock.now)
    assert one.device_seconds("nobody")[0] == 0.0
    clock.now += DAY_SECONDS
    assert one.device_seconds("acme")[0] == 0.0


def test_replicas_that_write_device_time_at_once_lose_none(open_store: Callable[[], Store]) -> None:
    stores = [open_store() for _ in range(2)]
    together = threading.Barrier(4)

    def write(n: int) -> None:
        together.wait(WAIT_SECONDS)
        for _ in range(10):
            stores[n % 2].add_device_seconds({"acme": 1.0, "other": 1.0})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert stores[0].device_seconds("acme")[0] == stores[0].device_seconds("other")[0] == 40.0
