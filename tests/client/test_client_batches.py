"""A batch job downloaded into a folder by either client, against real gRPC."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import mooring
import pytest
from mooring.v1 import batch_pb2, job_pb2, media_pb2
from scripted_server import ScriptedServer, abort_with

JOB = "tenants/acme/jobs/j"
MANIFEST = b'{"row": 1}\n{"row": 2}\n{"row": 3}\n'
ROWS = 3
Save = Callable[[Path], Any]


@pytest.fixture(params=["sync", "aio"])
def save(request: pytest.FixtureRequest, server: ScriptedServer) -> Save:
    """`await save(folder)`: positions of the rows that arrived."""

    async def sync(folder: Path) -> list[int]:
        with mooring.Client(server.target) as client:
            return [row.position for row in client.save_batch(JOB, folder)]

    async def aio(folder: Path) -> list[int]:
        async with mooring.aio.Client(server.target) as client:
            return [row.position async for row in client.save_batch(JOB, folder)]

    return sync if request.param == "sync" else aio


def image_of(position: int) -> bytes:
    return f"image {position} ".encode() * 50


def rows_after(position: int) -> Iterator[job_pb2.DownloadBatchResponse]:
    for number in range(position + 1, ROWS + 1):
        data = image_of(number)
        row = batch_pb2.BatchRow(
            row=number,
            position=number,
            row_count=ROWS,
            filename=f"images/{number:06}.png",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            manifest_line=json.dumps({"row": number}),
        )
        yield job_pb2.DownloadBatchResponse(row=row)
        yield job_pb2.DownloadBatchResponse(chunk=data[:100])
        yield job_pb2.DownloadBatchResponse(chunk=data[100:])


@pytest.fixture
def served(server: ScriptedServer) -> list[int]:
    """A batch job that has ended; `after_position` of each download."""
    asked: list[int] = []

    def download(request: Any, _: Any) -> Iterator[job_pb2.DownloadBatchResponse]:
        asked.append(request.after_position)
        return rows_after(request.after_position)

    def artifact(_request: Any, _context: Any) -> Iterator[job_pb2.DownloadArtifactResponse]:
        yield job_pb2.DownloadArtifactResponse(file=media_pb2.FileHeader(filename="manifest.jsonl"))
        yield job_pb2.DownloadArtifactResponse(chunk=MANIFEST)

    ended = job_pb2.Job(name=JOB, batch_result=batch_pb2.BatchResult(image_count=ROWS))
    server.answers["DownloadBatch"] = download
    server.answers["GetJob"] = lambda _, __: job_pb2.GetJobResponse(job=ended)
    server.answers["DownloadArtifact"] = artifact
    return asked


async def test_a_job_fills_a_folder_and_goes_on_where_it_was(
    served: list[int], server: ScriptedServer, save: Save, tmp_path: Path
) -> None:
    def cut(request: Any, context: Any) -> Iterator[job_pb2.DownloadBatchResponse]:
        served.append(request.after_position)
        messages = list(rows_after(0))
        yield from messages[:4]  # the first row, and a part of the second
        abort_with(context, grpc.StatusCode.INTERNAL, "Broken.")

    whole = server.answers["DownloadBatch"]
    server.answers["DownloadBatch"] = cut
    with pytest.raises(mooring.errors.InternalError):
        await save(tmp_path)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000001.png"]
    assert not (tmp_path / "manifest.jsonl").exists()

    server.answers["DownloadBatch"] = whole
    assert await save(tmp_path) == [2, 3]
    assert served == [0, 1]
    images = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert images == {f"{number:06}.png": image_of(number) for number in range(1, ROWS + 1)}
    assert (tmp_path / "manifest.jsonl").read_bytes() == MANIFEST


async def test_a_torn_record_costs_its_row_alone(served: list[int], save: Save, tmp_path: Path) -> None:
    await save(tmp_path)
    record = tmp_path / ".mooring-batch.jsonl"
    torn = record.read_text().splitlines(keepends=True)
    record.write_text("".join(torn[:2]) + torn[2][:5])  # killed while it noted the second row
    assert await save(tmp_path) == [2, 3]
    assert await save(tmp_path) == []
    assert served == [0, 1, 3]


async def test_the_folder_of_another_job_is_left_alone(served: list[int], save: Save, tmp_path: Path) -> None:
    (tmp_path / ".mooring-batch.jsonl").write_text('{"job": "tenants/acme/jobs/other"}\n')
    with pytest.raises(mooring.errors.InvalidArgumentError, match="holds images of"):
        await save(tmp_path)
    assert served == []
