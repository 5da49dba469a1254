"""The clients' part for batch jobs: a file of rows in, an image a row out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from mooring import errors
from mooring._requests import CHUNK_BYTES, header_of, new_request_id, resource_name
from mooring._resume import Resume
from mooring.types import BatchRow, check_content
from mooring.v1 import job_pb2, job_pb2_grpc, personalization_pb2, personalization_pb2_grpc

DONE_FILE = ".mooring-batch.jsonl"
"""In a folder that `save_batch` fills: one line a row that arrived, so that it can go on from there."""
MANIFEST = "manifest.jsonl"

RowsFile = str | Path | bytes | tuple[str, bytes]


class Batching:
    """Methods of `mooring.Client`."""

    _jobs: job_pb2_grpc.JobServiceStub
    _personalization: personalization_pb2_grpc.PersonalizationServiceStub

    def run_batch(self, rows: RowsFile, *, request_id: str = "", timeout: float | None = None) -> job_pb2.Job:
        """Start a job that draws every row of a JSON Lines file; nobody has to stay connected.

        Args:
            rows: path, bytes or (filename, bytes). A line is an object with `prompt` and, as wanted, `id`,
                `negative_prompt`, `adapter`, `adapter_scale`, `more_adapters`, `steps`, `guidance_scale`,
                `width`, `height`, `seed` and `sampler`.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.
            timeout: seconds the upload may take; None for no limit.

        Raises:
            InvalidArgumentError: a line cannot be used (`fields` names each: "lines[12].steps"), or the file
                cannot be read. Nothing was queued.
        """
        messages = run_messages(read_rows(rows), request_id)
        with errors.translated():
            response: Any = self._personalization.RunBatch(messages, timeout=timeout)
        job: job_pb2.Job = response.job
        return job

    def download_batch(
        self, job: Any, *, after_position: int = 0, patience: float = 120.0
    ) -> Iterator[BatchRow]:
        """The rows of a batch job as they get done; ends with the job. A lost server shows as a pause.

        Args:
            job: id, name or message.
            after_position: go on after this row; 0 starts with the first.
            patience: seconds that a running download waits for a lost server.

        Raises:
            InternalError: an image is not what was announced.
        """
        name, resume = resource_name("jobs", job), Resume(after_position, patience)
        while True:
            request = job_pb2.DownloadBatchRequest(name=name, after_position=resume.sequence)
            call: Any = self._jobs.DownloadBatch(request)
            assembler = RowAssembler()
            try:
                with errors.translated():
                    for message in call:
                        for row in assembler.feed(message):
                            resume.received(row.position)
                            yield row
            except errors.MooringError as error:
                time.sleep(resume.pause_after(error))
            else:
                return
            finally:
                call.cancel()

    def save_batch(self, job: Any, directory: str | Path, *, patience: float = 120.0) -> Iterator[BatchRow]:
        """Download a batch job into a folder: `images/000001.png` and so on, and at its end `manifest.jsonl`.

        Called again on the same folder it goes on after the last row that arrived. Each row is on disk when
        it is handed on.

        Args:
            job: id, name or message.
            directory: made if need be.
            patience: as in `download_batch`.

        Raises:
            InvalidArgumentError: the folder holds another job's images.
        """
        folder = BatchFolder(Path(directory), resource_name("jobs", job))
        for row in self.download_batch(folder.job, after_position=folder.after, patience=patience):
            folder.add(row)
            yield row
        with errors.translated():
            ended = self._jobs.GetJob(job_pb2.GetJobRequest(name=folder.job)).job
        if ended.HasField("batch_result"):
            folder.finish(self.download_artifact(folder.job, MANIFEST))

    def download_artifact(self, job: Any, filename: str) -> bytes:
        """See `mooring.Client`."""
        raise NotImplementedError


class AsyncBatching:
    """Methods of `mooring.aio.Client`."""

    _jobs: job_pb2_grpc.JobServiceAsyncStub
    _personalization: personalization_pb2_grpc.PersonalizationServiceAsyncStub

    async def run_batch(
        self,
        rows: RowsFile,
        *,
        request_id: str = "",
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC deadline
    ) -> job_pb2.Job:
        """Start a job that draws every row of a JSON Lines file."""
        messages = run_messages(await asyncio.to_thread(read_rows, rows), request_id)
        with errors.translated():
            return (await self._personalization.RunBatch(messages, timeout=timeout)).job

    async def download_batch(
        self, job: Any, *, after_position: int = 0, patience: float = 120.0
    ) -> AsyncIterator[BatchRow]:
        """The rows of a batch job as they get done; ends with the job."""
        name, resume = resource_name("jobs", job), Resume(after_position, patience)
        while True:
            request = job_pb2.DownloadBatchRequest(name=name, after_position=resume.sequence)
            call = self._jobs.DownloadBatch(request)
            assembler = RowAssembler()
            try:
                with errors.translated():
                    async for message in call:
                        for row in assembler.feed(message):
                            resume.received(row.position)
                            yield row
            except errors.MooringError as error:
                await asyncio.sleep(resume.pause_after(error))
            else:
                return
            finally:
                call.cancel()

    async def save_batch(
        self, job: Any, directory: str | Path, *, patience: float = 120.0
    ) -> AsyncIterator[BatchRow]:
        """Download a batch job into a folder; called again on the same folder it goes on where it was."""
        folder = await asyncio.to_thread(BatchFolder, Path(directory), resource_name("jobs", job))
        async for row in self.download_batch(folder.job, after_position=folder.after, patience=patience):
            await asyncio.to_thread(folder.add, row)
            yield row
        with errors.translated():
            ended = (await self._jobs.GetJob(job_pb2.GetJobRequest(name=folder.job))).job
        if ended.HasField("batch_result"):
            manifest = await self.download_artifact(folder.job, MANIFEST)
            await asyncio.to_thread(folder.finish, manifest)

    async def download_artifact(self, job: Any, filename: str) -> bytes:
        """See `mooring.aio.Client`."""
        raise NotImplementedError


class RowAssembler:
    """Puts rows together out of their announcement and chunks."""

    def __init__(self) -> None:
        self._row: Any = None
        self._data = bytearray()

    def feed(self, message: job_pb2.DownloadBatchResponse) -> Iterator[BatchRow]:
        """Take a message; gives the row that it completes, if it does. Raises InternalError."""
        if message.WhichOneof("content") == "row":
            self._row, self._data = message.row, bytearray()
        else:
            self._data += message.chunk
        row = self._row
        if row is None or len(self._data) < row.size_bytes:
            return
        data = bytes(self._data)
        check_content(row.filename, data, row.size_bytes, row.sha256)
        self._row = None
        yield BatchRow(
            row.row, row.position, row.row_count, row.filename, data, json.loads(row.manifest_line)
        )


def read_rows(rows: RowsFile) -> tuple[str, bytes]:
    """Name and bytes of a file of rows. Raises InvalidArgumentError when it cannot be read."""
    if isinstance(rows, tuple):
        return rows
    if isinstance(rows, bytes):
        return "rows.jsonl", rows
    path = Path(rows)
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror or error}."
        raise errors.InvalidArgumentError(
            message, reason="INVALID_FIELD", remedy="Name a JSON Lines file.", fields=[]
        ) from error


def run_messages(
    file: tuple[str, bytes], request_id: str = ""
) -> Iterator[personalization_pb2.RunBatchRequest]:
    """The stream of RunBatch: settings, the file's header, its chunks."""
    filename, data = file
    settings = personalization_pb2.BatchSettings(request_id=request_id or new_request_id())
    yield personalization_pb2.RunBatchRequest(settings=settings)
    yield personalization_pb2.RunBatchRequest(file=header_of(filename, data))
    for start in range(0, len(data), CHUNK_BYTES):
        yield personalization_pb2.RunBatchRequest(chunk=data[start : start + CHUNK_BYTES])


class BatchFolder:
    """A folder that a batch job is downloaded into, and how far that has got.

    Args:
        path: made if need be.
        job: the job's full name.

    Raises:
        InvalidArgumentError: the folder holds another job's images.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.job = job
        self._path, self._record = path, path / DONE_FILE
        path.mkdir(parents=True, exist_ok=True)
        records = self._read()
        if records and records[0].get("job") != job:
            message = f"{path} holds images of {records[0].get('job')}."
            raise errors.InvalidArgumentError(
                message, reason="INVALID_FIELD", remedy="Name another folder, or empty it.", fields=[]
            )
        if not records:
            self._note({"job": job})
        self.after = max((int(record.get("position", 0)) for record in records), default=0)

    def add(self, row: BatchRow) -> None:
        """Write a row's image, then note that it is there."""
        if row.filename:
            self._write(Path("images", Path(row.filename).name), row.data)  # whatever a server calls it
        self._note({"position": row.position, "row": row.row})

    def finish(self, manifest: bytes) -> None:
        """All rows are there."""
        self._write(Path(MANIFEST), manifest)

    def _read(self) -> list[dict[str, Any]]:
        try:
            text = self._record.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        if not text.endswith("\n"):  # a download that was killed: what follows is a line of its own
            self._record.write_text(text + "\n", encoding="utf-8")
        records: list[dict[str, Any]] = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def _note(self, record: dict[str, Any]) -> None:
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write(self, name: Path, data: bytes) -> None:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(data)
        os.replace(part, path)  # noqa: PTH105 - replaces on every system
