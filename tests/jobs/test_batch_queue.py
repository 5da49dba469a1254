"""The rows of a batch and its job come together, whatever happens between the two writes."""

from __future__ import annotations

from typing import Any

import pytest
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.jobs.batch_job import queue_batch
from mooring_server.jobs.batch_rows import PinnedRow, dump_rows, load_rows, rows_stem
from mooring_server.storage.garbage import Retention, collect
from mooring_server.storage.objects import LocalObjects, content_key
from mooring_server.storage.store import Store

ROWS = [
    PinnedRow(
        row=1,
        id="",
        prompt="a red car",
        negative_prompt="",
        adapters=(),
        steps=4,
        guidance_scale=3.0,
        width=32,
        height=32,
        seed=1,
        sampler="ddim",
    )
]
SPEC = {"rows": 1, "base_digest": "sha256:" + "b" * 64}
AT_ONCE = Retention(0.0, 0.0, 0.0)


def rows_key(job_id: str) -> str:
    return content_key(rows_stem(job_id), dump_rows(ROWS), "jsonl")


def queue(store: Store, objects: LocalObjects, request_id: str = "", **spec: Any) -> str:
    return queue_batch(store, objects, "acme", ROWS, SPEC | spec, request_id=request_id).job_id


def test_a_repeated_request_gives_the_same_job_and_leaves_no_second_file(
    store: Store, objects: LocalObjects
) -> None:
    job_id = queue(store, objects, "r")
    assert queue(store, objects, "r") == job_id
    assert list(objects.list("jobs/")) == [rows_key(job_id)]
    assert load_rows(objects.get(rows_key(job_id))) == ROWS


def test_a_refused_request_leaves_nothing(store: Store, objects: LocalObjects) -> None:
    job_id = queue(store, objects, "r")
    with pytest.raises(MooringError) as caught:
        queue(store, objects, "r", rows=2)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert list(objects.list("jobs/")) == [rows_key(job_id)]


def test_a_job_whose_answer_is_lost_keeps_its_rows(
    store: Store, objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database commits and the connection breaks before it can say so."""
    real = store.create_job

    def unheard(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise StorageUnavailableError("The database is away.")

    monkeypatch.setattr(store, "create_job", unheard)
    with pytest.raises(StorageUnavailableError):
        queue(store, objects, "r")
    monkeypatch.undo()
    (job,) = store.list_jobs("acme")[0]
    assert load_rows(objects.get(rows_key(job.job_id))) == ROWS
    assert queue(store, objects, "r") == job.job_id


def test_rows_that_are_collected_before_their_job_is_made_are_written_anew(
    store: Store, objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.create_job

    def overtaken(*args: Any, **kwargs: Any) -> None:
        later = Store(store._engine.url.render_as_string(), clock=lambda: 4_000_000_000.0)
        assert len(collect(later, objects, AT_ONCE).keys) == 1
        later.close()
        real(*args, **kwargs)

    monkeypatch.setattr(store, "create_job", overtaken)
    with pytest.raises(StorageUnavailableError, match="taken for garbage"):
        queue(store, objects, "r")
    assert store.list_jobs("acme")[0] == []
    monkeypatch.undo()
    assert load_rows(objects.get(rows_key(queue(store, objects, "r")))) == ROWS
