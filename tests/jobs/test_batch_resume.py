"""A batch job that is killed again and again ends with the manifest and the images of an undisturbed one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from mooring_server.engine.base import load_base
from mooring_server.jobs.batch_rows import PinnedAdapter, PinnedRow, dump_rows, image_key, rows_stem
from mooring_server.provenance import identity
from mooring_server.provenance.verify import MarkState, examine
from mooring_server.storage.models import Document, Job, JobState
from mooring_server.storage.objects import content_key
from PIL import Image
from test_resume import FACTORS, finished
from worker import PATIENCE, open_state

ROWS = 24
GONE = PinnedAdapter("rex", 7, "sha256:" + "0" * 64, 1.0)
KILLED_AT = (3, 9)


def new_batch(state: Path, base_digest: str) -> Job:
    """Rows that differ in prompt, seed and sampler; one of them names a version that is no longer there."""
    rows = [
        PinnedRow(
            row=number,
            id=f"r{number}",
            prompt=f"a photo of a {('dog', 'car', 'toy')[number % 3]}",
            negative_prompt="",
            adapters=(GONE,) if number == 5 else (),
            steps=6,
            guidance_scale=3.0,
            width=32,
            height=32,
            seed=number,
            sampler=("ddim", "euler_ancestral")[number % 2],
        )
        for number in range(1, ROWS + 1)
    ]
    store, objects = open_state(state)
    spec = {
        "filename": "rows.jsonl",
        "sha256": "",
        "size_bytes": 0,
        "rows": ROWS,
        "adapters": 0,
        "base_digest": base_digest,
    }
    job = store.create_job("acme", "batch", spec)
    data = dump_rows(rows)
    objects.put(content_key(rows_stem(job.job_id), data, "jsonl"), data)
    store.close()
    return job


def killed(state: Path, base_dir: Path, job: Job, *, at_row: int) -> int:
    """Run the job in a process of its own and kill that once so many rows are recorded."""
    store, _ = open_state(state)
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(state), str(base_dir), "0"]
    with subprocess.Popen(command, env=os.environ | FACTORS) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while len(store.batch_rows("acme", job.job_id)) < at_row:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
    done = len(store.batch_rows("acme", job.job_id))
    store.close()
    return done


def manifest_of_job(state: Path, job: Job) -> list[Document]:
    store, objects = open_state(state)
    (artifact,) = job.result["artifacts"]
    store.close()
    return [json.loads(line) for line in objects.get(artifact["object_key"]).splitlines()]


def drawn(record: Document) -> Document:
    """What a row gave, without the file's own bytes: its mark has a time and a random id."""
    return {key: value for key, value in record.items() if key not in {"sha256", "size_bytes"}}


def test_a_batch_killed_twice_draws_every_row_once_and_ends_as_an_undisturbed_one(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    digest = load_base(str(tiny_sd15), threads=1).digest
    job = new_batch(disturbed, digest)
    for at_row in KILLED_AT:
        assert killed(disturbed, tiny_sd15, job, at_row=at_row) < ROWS
    done = finished(disturbed, tiny_sd15, job)
    undisturbed = finished(calm, tiny_sd15, new_batch(calm, digest))
    assert done.attempts == 1 + len(KILLED_AT)
    assert (done.result["images"], done.result["failed"]) == (ROWS - 1, 1)

    store, objects = open_state(disturbed)
    rows = store.batch_rows("acme", job.job_id)
    assert [row.position for row in rows] == list(range(1, ROWS + 1))
    assert sorted(row.row for row in rows) == list(range(1, ROWS + 1))
    (artifact,) = done.result["artifacts"]
    manifest = [json.loads(line) for line in objects.get(artifact["object_key"]).splitlines()]
    assert [record["row"] for record in manifest] == list(range(1, ROWS + 1))
    for record in manifest:
        if record["row"] == 5:
            assert record["error"]["reason"] == "ADAPTER_NOT_FOUND"
            continue
        data = objects.get(image_key(job.job_id, record["row"], record["sha256"]))
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["pixels_sha256"]
        mark = examine(data, (disturbed / identity.FOLDER / identity.AUTHORITY).read_text())
        assert (mark.state, mark.trusted, mark.base) == (MarkState.VALID, True, digest)
    store.close()
    assert [drawn(record) for record in manifest] == [drawn(r) for r in manifest_of_job(calm, undisturbed)]


def test_a_batch_for_another_base_fails_with_the_reason(tiny_sd15: Path, tmp_path: Path) -> None:
    job = new_batch(tmp_path, "sha256:" + "1" * 64)
    store, _ = open_state(tmp_path)
    try:
        finished(tmp_path, tiny_sd15, job)
    except AssertionError:
        ended = store.get_job("acme", job.job_id)
    assert ended.state is JobState.FAILED
    assert ended.error["reason"] == "BASE_DIGEST_MISMATCH"
    store.close()
