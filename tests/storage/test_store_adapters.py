from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import JobState
from mooring_server.storage.store import Store
from store_rows import publish


def not_found(call, *args) -> bool:
    with pytest.raises(MooringError) as caught:
        call(*args)
    return caught.value.reason is Reason.ADAPTER_NOT_FOUND


def test_versions_count_up_and_the_newest_is_found(store: Store) -> None:
    first, second = publish(store, rank=4), publish(store, rank=8)
    assert (first.name, second.name) == ("duck@1", "duck@2")
    assert store.get_adapter("acme", "duck") == second
    assert store.get_adapter("acme", "duck", 1) == first
    assert first.certificate == {"sigma_max": 0.5}
    assert not_found(store.get_adapter, "acme", "duck", 3)
    assert not_found(store.get_adapter, "other", "duck")
    assert publish(store, tenant="other").version == 1


def test_a_deleted_version_is_gone_and_its_number_too(store: Store) -> None:
    for _ in range(3):
        publish(store)
    assert [adapter.version for adapter in store.delete_adapter("acme", "duck", 3)] == [3]
    assert not_found(store.get_adapter, "acme", "duck", 3)
    assert not_found(store.delete_adapter, "acme", "duck", 3)
    assert store.get_adapter("acme", "duck").version == 2
    assert publish(store).version == 4
    assert sorted(adapter.version for adapter in store.delete_adapter("acme", "duck")) == [1, 2, 4]
    assert store.list_adapters("acme") == ([], "")
    assert not_found(store.delete_adapter, "acme", "duck")
    assert publish(store).version == 5


def test_another_tenants_adapter_cannot_be_deleted(store: Store) -> None:
    publish(store, tenant="other")
    assert not_found(store.delete_adapter, "acme", "duck", 1)
    assert store.get_adapter("other", "duck").version == 1


def test_versions_published_at_the_same_time_differ(open_store) -> None:
    replicas = [open_store() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        versions = [a.version for a in pool.map(lambda n: publish(replicas[n % 4]), range(16))]
    assert sorted(versions) == list(range(1, 17))


def test_lists_filter_by_adapter_and_subject(store: Store) -> None:
    publish(store, adapter_id="a", subject_id="s1")
    publish(store, adapter_id="b", subject_id="s2")
    publish(store, adapter_id="a", subject_id="s2")

    def names(**filters):
        return [adapter.name for adapter in store.list_adapters("acme", **filters)[0]]

    assert names() == ["a@2", "b@1", "a@1"]
    assert names(adapter_id="a") == ["a@2", "a@1"]
    assert names(subject_id="s2") == ["a@2", "b@1"]
    first, token = store.list_adapters("acme", page_size=2)
    assert [a.name for a in first + store.list_adapters("acme", page_token=token)[0]] == names()


def test_publishing_ends_the_job_in_the_same_transaction(store: Store) -> None:
    store.create_job("acme", "train", {})
    job = store.claim_job("w", 30)
    adapter = publish(store, job_id=job.job_id, lease=job.lease, artifacts=[{"filename": "f"}])
    ended = store.get_job("acme", job.job_id)
    assert ended.state is JobState.SUCCEEDED
    assert ended.result == {
        "adapter": "duck@1",
        "digest": adapter.digest,
        "summary": {"method": "spectral"},
        "artifacts": [{"filename": "f"}],
    }
    assert store.get_adapter("acme", "duck").job_id == job.job_id
    with pytest.raises(LeaseLostError):
        publish(store, job_id=job.job_id, lease=job.lease)
    assert [a.version for a in store.list_adapters("acme")[0]] == [1]


def test_a_refused_publication_leaves_no_trace(store: Store) -> None:
    store.create_job("acme", "train", {})
    job = store.claim_job("w", 30)
    with pytest.raises(LeaseLostError):
        publish(store, job_id=job.job_id, lease="another")
    assert publish(store).version == 1


def test_an_import_is_idempotent(store: Store) -> None:
    first = publish(store, request_id="r", object_key="adapters/1")
    assert publish(store, request_id="r", object_key="adapters/2") == first
    with pytest.raises(MooringError) as caught:
        publish(store, request_id="r", digest="sha256:" + "9" * 64)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
