"""RunBatch and DownloadBatch on a real server: a file of rows in, an image a row and a manifest out."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import uuid

import mooring
import numpy as np
import pytest
from mooring.v1 import job_pb2
from mooring_server.provenance import identity
from mooring_server.provenance.verify import MarkState, examine
from mooring_server.storage.garbage import Retention
from PIL import Image
from rpc_calls import publish

TEXT = "a photo of a dog"


def jsonl(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture(scope="module")
def client(server):
    with mooring.Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def adapter(runtime):
    return publish(runtime, "batched")


@pytest.fixture(scope="module")
def rows(adapter):
    return [
        {"id": "plain", "prompt": TEXT, "steps": 3, "seed": 5},
        {"prompt": "a photo of a <rex> dog", "adapter": "batched", "adapter_scale": 0.5, "steps": 3},
        {"prompt": TEXT, "negative_prompt": "a car", "steps": 4, "sampler": "euler", "guidance_scale": 2},
    ]


@pytest.fixture(scope="module")
def ended(client, rows):
    job = client.run_batch(("three.jsonl", jsonl(*rows)))
    assert (job.batch.row_count, job.batch.adapter_count, job.batch.filename) == (3, 1, "three.jsonl")
    return client.wait(job)


def test_every_row_gives_the_image_that_generate_gives(client, rows, ended):
    assert (ended.batch_result.image_count, ended.batch_result.failed_count) == (3, 0)
    found = {row.row: row for row in client.download_batch(ended)}
    assert sorted(found) == [1, 2, 3]
    assert sorted(row.position for row in found.values()) == [1, 2, 3]
    for number, wanted in enumerate(rows, start=1):
        settings = {key: value for key, value in wanted.items() if key != "id"}
        (image,) = client.images(**settings)
        row = found[number]
        assert row.row_count == 3
        assert hashlib.sha256(row.data).hexdigest() == row.manifest["sha256"]
        pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (row.data, image.data)]
        assert np.array_equal(*pixels), number
        assert hashlib.sha256(pixels[0].tobytes()).hexdigest() == row.manifest["pixels_sha256"]
    assert found[1].manifest["id"] == "plain"
    assert found[2].manifest["adapters"][0]["adapter"] == "batched@1"
    assert found[3].manifest["sampler"] == "euler"


def test_the_manifest_lists_all_rows_and_has_the_digest_that_was_told(client, ended):
    data = client.download_artifact(ended, "manifest.jsonl")
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == ended.batch_result.manifest_digest
    assert [json.loads(line)["row"] for line in data.splitlines()] == [1, 2, 3]
    image = client.download_artifact(ended, "images/000001.png")
    assert image == next(row.data for row in client.download_batch(ended) if row.row == 1)


def test_images_and_steps_of_a_batch_job_are_counted(client, runtime):
    def counted():
        read = runtime.metrics.registry.get_sample_value
        return [read("mooring_images_total"), read("mooring_steps_total")]

    before = counted()
    client.wait(
        client.run_batch(jsonl({"prompt": TEXT, "steps": 3}, {"prompt": TEXT, "steps": 4, "seed": 1}))
    )
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 7]


def test_a_download_goes_on_where_it_stopped(client, ended, tmp_path):
    whole = list(client.download_batch(ended))
    assert [r.position for r in client.download_batch(ended, after_position=2)] == [3]
    saving = client.save_batch(ended, tmp_path)
    first = next(saving)
    saving.close()
    left = list(client.save_batch(ended, tmp_path))
    assert [first.position, *(row.position for row in left)] == [1, 2, 3]
    assert list(client.save_batch(ended, tmp_path)) == []
    for row in whole:
        assert (tmp_path / row.filename).read_bytes() == row.data
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    assert manifest == client.download_artifact(ended, "manifest.jsonl")
    other = client.run_batch(jsonl({"prompt": TEXT, "steps": 1}))
    with pytest.raises(mooring.errors.InvalidArgumentError, match="holds images of"):
        next(client.save_batch(other, tmp_path))
    client.wait(other)


def drawn(client, job):
    """The manifest without what a file's mark changes: its time and its random id."""
    lines = client.download_artifact(job, "manifest.jsonl").splitlines()
    own = {"sha256", "size_bytes"}
    return [{key: value for key, value in json.loads(line).items() if key not in own} for line in lines]


def test_the_same_rows_give_the_same_pixels(client, rows, ended):
    again = client.wait(client.run_batch(jsonl(*rows)))
    assert again.name != ended.name
    first = drawn(client, ended)
    assert drawn(client, again) == first
    assert all(len(record["pixels_sha256"]) == 64 for record in first)


def test_every_image_is_marked_with_the_rows_own_base_and_adapters(client, runtime, ended):
    authority = (runtime.settings.state_dir / identity.FOLDER / identity.AUTHORITY).read_text()
    for row in client.download_batch(ended):
        mark = examine(row.data, authority)
        assert (mark.state, mark.trusted) == (MarkState.VALID, True)
        assert mark.base == row.manifest["base_digest"]
        assert list(mark.adapters) == [use["digest"] for use in row.manifest["adapters"]]


def test_a_repeated_call_gives_the_first_job(client):
    request_id, data = str(uuid.uuid4()), jsonl({"prompt": TEXT, "steps": 1})
    first = client.run_batch(data, request_id=request_id)
    assert client.run_batch(data, request_id=request_id).name == first.name
    with pytest.raises(mooring.errors.MooringError) as refused:
        client.run_batch(jsonl({"prompt": "a car", "steps": 1}), request_id=request_id)
    assert refused.value.reason == "REQUEST_ID_REUSED"
    client.wait(first)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"{", "lines[2]"),
        (b"[1]", "lines[2]"),
        (b"\xff", "lines[2]"),
        ({"prompt": ""}, "lines[2].prompt"),
        ({"prompt": TEXT, "steps": 0}, "lines[2].steps"),
        ({"prompt": TEXT, "steps": 2**40}, "lines[2]"),
        ({"prompt": TEXT, "steps": True}, "lines[2].steps"),
        ({"prompt": TEXT, "step": 4}, "lines[2].step"),
        ({"prompt": TEXT, "sampler": "none"}, "lines[2].sampler"),
        ({"prompt": TEXT, "adapter": "nobody"}, "lines[2].adapter"),
        ({"prompt": TEXT, "adapter": "../x"}, "lines[2].adapter"),
        ({"prompt": "a photo of a <max> dog"}, "lines[2].prompt"),
        ({"prompt": TEXT, "id": "one"}, "lines[2].id"),
        (b'{"prompt": "a dog", "guidance_scale": NaN}', "lines[2]"),
        (b'{"prompt": "a dog", "guidance_scale": 1' + b"0" * 400 + b"}", "lines[2].guidance_scale"),
        (b'{"prompt": "a dog", "steps": 1' + b"0" * 400 + b"}", "lines[2]"),
        (b'{"prompt": "a dog", "\\ud800": 1}', "lines[2].?"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_nothing_is_queued(client, line, field):
    before = [job.name for job in client.list_jobs(kind="batch")]
    with pytest.raises(mooring.errors.InvalidArgumentError) as refused:
        client.run_batch(jsonl({"prompt": TEXT, "id": "one"}, line))
    assert refused.value.reason == "BATCH_NOT_VALID"
    assert [fault.field for fault in refused.value.fields] == [field]
    assert [job.name for job in client.list_jobs(kind="batch")] == before


def test_an_empty_file_is_refused(client):
    with pytest.raises(mooring.errors.InvalidArgumentError) as refused:
        client.run_batch(b"\n \n")
    assert refused.value.reason == "BATCH_NOT_VALID"


def test_a_batch_can_be_cancelled_and_keeps_what_it_has(client):
    rows = [{"prompt": TEXT, "steps": 50, "seed": n} for n in range(200)]
    job = client.run_batch(jsonl(*rows))
    for _ in client.download_batch(job):
        client.cancel_job(job)
        break
    with pytest.raises(mooring.errors.MooringError):
        client.wait(job)
    kept = list(client.download_batch(job))
    assert 1 <= len(kept) < 200
    assert client.get_job(job).state == job_pb2.JOB_STATE_CANCELLED


def test_other_jobs_have_no_rows(client, server, ended):
    with pytest.raises(mooring.errors.NotFoundError):
        list(client.download_batch("tenants/local/jobs/0000000000000000"))


def test_the_asyncio_client_does_the_same(server, rows, ended):
    async def run():
        async with mooring.aio.Client(server.target) as client:
            job = await client.run_batch(jsonl(*rows))
            found = [row async for row in client.download_batch(job)]
            return found, await client.wait(job)

    found, job = asyncio.run(run())
    assert sorted(row.row for row in found) == [1, 2, 3]
    assert job.batch_result.image_count == ended.batch_result.image_count == 3


def test_rows_that_are_taken_for_garbage_before_the_job_exists_make_no_job(client, runtime, monkeypatch):
    put = runtime.objects.put

    def put_then_condemned(key, data):
        put(key, data)
        if "/rows" in key:
            assert runtime.store.condemn([key], Retention()) == [key]

    before = [job.name for job in client.list_jobs(kind="batch")]
    with monkeypatch.context() as patched:
        patched.setattr(runtime.objects, "put", put_then_condemned)
        with pytest.raises(mooring.errors.UnavailableError) as refused:
            client.run_batch(jsonl({"prompt": TEXT, "steps": 1}))
    assert refused.value.reason == "STORAGE_UNAVAILABLE"
    assert [job.name for job in client.list_jobs(kind="batch")] == before
    client.wait(client.run_batch(jsonl({"prompt": TEXT, "steps": 1})))
