"""Every Python block of the client's README runs, in its order, against real gRPC."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import mooring
import pytest
from mooring.v1 import (
    batch_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
)
from scripted_server import ScriptedServer, abort_with

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "clients" / "python" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PNG = b"png"
JOB = job_pb2.Job(
    name="tenants/-/jobs/j", state=job_pb2.JOB_STATE_SUCCEEDED, adapter="tenants/-/adapters/rex@1"
)


def image(index: int) -> media_pb2.ImageChunk:
    return media_pb2.ImageChunk(index=index, seed=index, media_type="image/png", data=PNG, last=True)


def batch(requests: Any, _: Any) -> Iterator[personalization_pb2.GenerateBatchResponse]:
    for request in requests:
        yield personalization_pb2.GenerateBatchResponse(id=request.id, image=image(0))
        yield personalization_pb2.GenerateBatchResponse(
            id=request.id, done=personalization_pb2.GenerateDone()
        )


def watched(_request: Any, _context: Any) -> Iterator[job_pb2.WatchJobResponse]:
    training = job_pb2.TrainingFigures(loss=0.1, drift=0.01, drift_budget=0.05)
    yield job_pb2.WatchJobResponse(
        sequence=1, progress=job_pb2.JobProgress(phase="training", step=1, steps=2, training=training)
    )
    yield job_pb2.WatchJobResponse(sequence=1, job=JOB)


def rows(_request: Any, _context: Any) -> Iterator[job_pb2.DownloadBatchResponse]:
    row = batch_pb2.BatchRow(
        row=1, position=1, row_count=1, filename="images/000001.png", size_bytes=3, manifest_line='{"row": 1}'
    )
    yield job_pb2.DownloadBatchResponse(row=row)
    yield job_pb2.DownloadBatchResponse(chunk=PNG)


def taken(answer: Any) -> Callable[[Any, Any], Any]:
    """Read what is uploaded, then answer."""

    def method(requests: Any, _: Any) -> Any:
        list(requests)
        return answer

    return method


@pytest.fixture
def answering(server: ScriptedServer) -> ScriptedServer:
    subject = subject_pb2.Subject(name="tenants/-/subjects/rex")
    server.answers |= {
        "CreateSubject": lambda *_: subject_pb2.CreateSubjectResponse(subject=subject),
        "UploadPhotos": taken(subject_pb2.UploadPhotosResponse(subject=subject)),
        "Train": lambda *_: personalization_pb2.TrainResponse(job=JOB),
        "WatchJob": watched,
        "GetJob": lambda *_: job_pb2.GetJobResponse(job=JOB),
        "Generate": lambda *_: iter(
            [personalization_pb2.GenerateResponse(image=image(number)) for number in range(4)]
        ),
        "GenerateBatch": batch,
        "RunBatch": taken(personalization_pb2.RunBatchResponse(job=JOB)),
        "DownloadBatch": rows,
    }
    return server


def test_every_block_runs(
    answering: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("rex1.jpg", "rex2.jpg", "rows.jsonl"):
        (tmp_path / name).write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOORING_API_KEY", "key")

    def here(client: type) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(client).bind(*args, **kwargs)
            return client(answering.target)

        return make

    monkeypatch.setattr(mooring, "Client", here(mooring.Client))
    monkeypatch.setattr(mooring.aio, "Client", here(mooring.aio.Client))
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS, start=1):
        if "ResourceExhaustedError" in block:
            answering.answers["Train"] = lambda _, context: abort_with(
                context, grpc.StatusCode.RESOURCE_EXHAUSTED, "Full.", reason="QUEUE_FULL", retry_seconds=2
            )
        exec(compile(block, f"README block {number}", "exec"), names)
    assert "QUEUE_FULL" in capsys.readouterr().out
    called = {"Train", "WatchJob", "Generate", "GenerateBatch", "RunBatch", "DownloadBatch"}
    assert called <= answering.calls.keys()
    assert len(list(tmp_path.rglob("*.png"))) >= 6
