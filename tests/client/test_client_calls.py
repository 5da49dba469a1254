"""Both clients against real gRPC: errors, retries, deadlines, paging, uploads, assembly of chunks."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import mooring
import pytest
from mooring import errors
from mooring.v1 import (
    adapter_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)
from PIL import Image as PillowImage
from scripted_server import ScriptedServer, abort_with

Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["sync", "aio"])
async def call(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Call]:
    """`await call("method", …)` on either client; streams come back as lists."""
    if request.param == "sync":
        with mooring.Client(server.target, timeout=240) as client:

            async def run(name: str, *args: Any, **kwargs: Any) -> Any:
                result = getattr(client, name)(*args, **kwargs)
                return list(result) if hasattr(result, "__next__") else result

            yield run
    else:
        async with mooring.aio.Client(server.target, timeout=240) as client:

            async def run_async(name: str, *args: Any, **kwargs: Any) -> Any:
                result = getattr(client, name)(*args, **kwargs)
                return [item async for item in result] if hasattr(result, "__anext__") else await result

            yield run_async


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    PillowImage.effect_noise(size, 90).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def image_chunks(index: int, data: bytes, piece: int) -> list[media_pb2.ImageChunk]:
    digest = hashlib.sha256(data).hexdigest()
    return [
        media_pb2.ImageChunk(
            index=index,
            seed=7 + index,
            media_type="image/png",
            width=8,
            height=8,
            size_bytes=len(data),
            sha256=digest,
            offset=start,
            data=data[start : start + piece],
            last=start + piece >= len(data),
        )
        for start in range(0, len(data), piece)
    ]


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgumentError),
        (grpc.StatusCode.OUT_OF_RANGE, errors.OutOfRangeError),
        (grpc.StatusCode.NOT_FOUND, errors.NotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, errors.AlreadyExistsError),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.FailedPreconditionError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.UnauthenticatedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhaustedError),
        (grpc.StatusCode.CANCELLED, errors.CancelledError),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
async def test_every_status_code_has_its_class(
    server: ScriptedServer, call: Call, code: grpc.StatusCode, kind: type[errors.MooringError]
) -> None:
    server.answers["GetJob"] = lambda _, c: abort_with(c, code, "No.", reason="R")
    with pytest.raises(kind) as caught:
        await call("get_job", "x")
    assert type(caught.value) is kind
    assert caught.value.code is code
    assert server.calls["GetJob"] == 1, "only UNAVAILABLE may be retried"


async def test_errors_carry_reason_remedy_fields_and_retry_delay(server: ScriptedServer, call: Call) -> None:
    server.answers["GetAdapter"] = lambda _, c: abort_with(
        c,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "The queue is full.",
        reason="QUEUE_FULL",
        remedy="Try again later.",
        fields={"name": "too popular"},
        retry_seconds=2.5,
        metadata={"limit": "64"},
    )
    with pytest.raises(errors.ResourceExhaustedError) as caught:
        await call("get_adapter", "rex")
    error = caught.value
    assert (error.message, error.remedy) == ("The queue is full.", "Try again later.")
    assert str(error) == "The queue is full. Try again later."
    assert error.reason == "QUEUE_FULL"
    assert error.fields == (errors.FieldViolation("name", "too popular"),)
    assert error.retry_after == 2.5
    assert error.metadata == {"limit": "64"}


async def test_unavailable_is_retried_with_the_same_request_id(server: ScriptedServer, call: Call) -> None:
    seen: list[str] = []

    def answer(request: personalization_pb2.TrainRequest, context: Any) -> Any:
        seen.append(request.request_id)
        if len(seen) < 3:
            abort_with(context, grpc.StatusCode.UNAVAILABLE, "Starting.", reason="DRAINING")
        return personalization_pb2.TrainResponse(job=job_pb2.Job(name="tenants/local/jobs/1"))

    server.answers["Train"] = answer
    assert (await call("train", "rex")).name == "tenants/local/jobs/1"
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert seen[0]


async def test_unavailable_for_good_is_a_typed_error(server: ScriptedServer, call: Call) -> None:
    server.answers["GetJob"] = lambda _, c: abort_with(
        c, grpc.StatusCode.UNAVAILABLE, "Draining.", reason="DRAINING"
    )
    with pytest.raises(errors.UnavailableError, match="Draining") as caught:
        await call("get_job", "x")
    assert caught.value.reason == "DRAINING"


async def test_deadline_of_a_stream(server: ScriptedServer, call: Call) -> None:
    def answer(_: Any, context: Any) -> Any:
        yield personalization_pb2.GenerateResponse(queued=personalization_pb2.GenerateQueued(position=3))
        while context.is_active():
            time.sleep(0.005)

    server.answers["Generate"] = answer
    with pytest.raises(errors.DeadlineExceededError):
        await call("generate", "a dog", timeout=0.3)


# -- requests -----------------------------------------------------------------------------------------------


async def test_words_become_enums_and_unset_stays_unset(server: ScriptedServer, call: Call) -> None:
    seen: list[personalization_pb2.TrainRequest] = []

    def answer(request: personalization_pb2.TrainRequest, _: Any) -> Any:
        seen.append(request)
        return personalization_pb2.TrainResponse()

    server.answers["Train"] = answer
    await call("train", "rex", method="prior_preservation", preset="adaptive", targets="attention_ff", seed=0)
    config = seen[0].config
    assert seen[0].subject == "tenants/-/subjects/rex"
    assert config.method == training_pb2.TRAINING_METHOD_PRIOR_PRESERVATION
    assert config.preset == training_pb2.DRIFT_PRESET_ADAPTIVE
    assert config.targets == training_pb2.TRAINING_TARGETS_ATTENTION_FF
    assert config.HasField("seed")
    assert not config.HasField("steps")
    await call("train", "tenants/acme/subjects/rex", fixed_strength=0.0)
    assert seen[1].subject == "tenants/acme/subjects/rex"
    assert seen[1].config.WhichOneof("strength") == "fixed_strength"


async def test_unknown_words_are_refused_with_the_known_ones(call: Call) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="none, l2, factor_decay, spectral") as caught:
        await call("train", "rex", method="magic")
    assert caught.value.fields[0].field == "config.method"
    with pytest.raises(errors.InvalidArgumentError, match="exclude each other"):
        await call("train", "rex", preset="balanced", drift_budget=0.1)


async def test_resources_stand_for_their_names(server: ScriptedServer, call: Call) -> None:
    seen: list[str] = []

    def answer(request: adapter_pb2.GetAdapterRequest, _: Any) -> Any:
        seen.append(request.name)
        return adapter_pb2.GetAdapterResponse()

    server.answers["GetAdapter"] = answer
    for given in ("rex@2", "tenants/a/adapters/rex@2", adapter_pb2.Adapter(name="tenants/a/adapters/rex@3")):
        await call("get_adapter", given)
    assert seen == ["tenants/-/adapters/rex@2", "tenants/a/adapters/rex@2", "tenants/a/adapters/rex@3"]


async def test_all_pages_are_read(server: ScriptedServer, call: Call) -> None:
    def answer(request: job_pb2.ListJobsRequest, _: Any) -> Any:
        assert request.state == job_pb2.JOB_STATE_RUNNING
        start = int(request.page_token or 0)
        return job_pb2.ListJobsResponse(
            jobs=[job_pb2.Job(name=f"tenants/local/jobs/{i}") for i in range(start, start + 2)],
            next_page_token="" if start >= 4 else str(start + 2),
        )

    server.answers["ListJobs"] = answer
    found = await call("list_jobs", state="running")
    assert [job.name[-1] for job in found] == list("012345")


# -- uploads ------------------------------------------------------------------------------------------------


async def test_upload_sends_every_kind_of_photo_in_small_pieces(
    server: ScriptedServer, call: Call, tmp_path: Any
) -> None:
    big = bytes(range(256)) * 4096  # 1 MiB
    (tmp_path / "a.jpg").write_bytes(big)
    picture = PillowImage.new("RGB", (4, 4), "red")
    got: dict[str, bytes] = {}
    headers: list[media_pb2.FileHeader] = []

    def answer(messages: Any, _: Any) -> Any:
        first = next(messages)
        assert first.subject == "tenants/-/subjects/rex"
        for message in messages:
            if message.WhichOneof("content") == "file":
                headers.append(message.file)
                got[message.file.filename] = b""
            else:
                assert len(message.chunk) <= 1024 * 1024
                got[headers[-1].filename] += message.chunk
        return subject_pb2.UploadPhotosResponse(added_count=len(got))

    server.answers["UploadPhotos"] = answer
    photos = [tmp_path / "a.jpg", b"raw", ("named.png", b"abc"), picture]
    assert (await call("upload_photos", "rex", photos)).added_count == 4
    assert got["a.jpg"] == big
    assert got["photo-1"] == b"raw"
    assert got["named.png"] == b"abc"
    assert PillowImage.open(io.BytesIO(got["photo-3.png"])).getpixel((0, 0)) == (255, 0, 0)
    for header in headers:
        assert header.size_bytes == len(got[header.filename])
        assert header.sha256 == hashlib.sha256(got[header.filename]).hexdigest()


async def test_unreadable_photos_are_named_before_anything_is_created(
    server: ScriptedServer, call: Call, tmp_path: Any
) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        await call(
            "create_subject",
            "rex",
            class_noun="dog",
            rights="owned",
            photos=[b"x", tmp_path / "no.jpg", tmp_path / "none.png"],
        )
    assert [violation.field for violation in caught.value.fields] == ["files[1]", "files[2]"]
    assert "no.jpg" in caught.value.fields[0].description
    assert not server.calls


async def test_upload_survives_an_unavailable_server(server: ScriptedServer, call: Call) -> None:
    tries: list[int] = []

    def answer(messages: Any, context: Any) -> Any:
        size = sum(len(message.chunk) for message in messages)
        tries.append(size)
        if len(tries) == 1:
            abort_with(context, grpc.StatusCode.UNAVAILABLE, "Restarting.", reason="DRAINING")
        return subject_pb2.UploadPhotosResponse(added_count=1)

    server.answers["UploadPhotos"] = answer
    assert (await call("upload_photos", "rex", [b"x" * 3_000_000])).added_count == 1
    assert tries == [3_000_000, 3_000_000]


# -- images and files ---------------------------------------------------------------------------------------


async def test_generate_puts_chunks_together_and_reports_progress(server: ScriptedServer, call: Call) -> None:
    pictures = [png(), png((64, 64))]

    def answer(request: personalization_pb2.GenerateRequest, _: Any) -> Any:
        assert request.adapter == "tenants/-/adapters/rex"
        assert not request.HasField("guidance_scale")
        response = personalization_pb2.GenerateResponse
        yield response(queued=personalization_pb2.GenerateQueued(position=1))
        preview = media_pb2.PreviewImage(index=0, media_type="image/png", width=8, height=8, data=png())
        yield response(progress=personalization_pb2.GenerateProgress(step=1, steps=2, previews=[preview]))
        for index in (1, 0):  # images finish in any order
            for chunk in image_chunks(index, pictures[index], 100):
                yield response(image=chunk)
        name, unknown = "tenants/local/adapters/rex@1", ["zeppelin"]
        done = personalization_pb2.GenerateDone(images=2, adapter=name, unknown_words=unknown)
        done.total_time.FromMilliseconds(1500)
        yield response(done=done)

    server.answers["Generate"] = answer
    events = await call("generate", "a <rex> dog", adapter="rex", count=2)
    assert [type(event) for event in events] == [
        mooring.Queued,
        mooring.Progress,
        mooring.Image,
        mooring.Image,
        mooring.Done,
    ]
    assert events[1].previews[0].width == 8
    assert events[-1].total_seconds == 1.5
    assert events[-1].unknown_words == ("zeppelin",)
    images = await call("images", "a <rex> dog", adapter="rex", count=2)
    assert [image.data for image in images] == pictures
    assert [image.seed for image in images] == [7, 8]
    assert images[1].image.size == (64, 64)


@pytest.mark.parametrize("fault", ["lost", "changed"])
async def test_broken_images_are_refused(server: ScriptedServer, call: Call, fault: str) -> None:
    def answer(_: Any, __: Any) -> Any:
        chunks = image_chunks(0, png((64, 64)), 500)
        if fault == "lost":
            del chunks[1]
        else:
            chunks[1].data = bytes(len(chunks[1].data))
        for chunk in chunks:
            yield personalization_pb2.GenerateResponse(image=chunk)

    server.answers["Generate"] = answer
    with pytest.raises(errors.InternalError, match="image 0"):
        await call("images", "a dog")


async def test_export_returns_whole_files(server: ScriptedServer, call: Call) -> None:
    contents = {"a.safetensors": b"x" * 300, "README.txt": b"hello"}

    def answer(request: adapter_pb2.ExportAdapterRequest, _: Any) -> Any:
        assert request.format == adapter_pb2.ADAPTER_FORMAT_DIFFUSERS
        for filename, data in contents.items():
            digest = hashlib.sha256(data).hexdigest()
            header = media_pb2.FileHeader(filename=filename, size_bytes=len(data), sha256=digest)
            yield adapter_pb2.ExportAdapterResponse(file=header)
            for start in range(0, len(data), 128):
                yield adapter_pb2.ExportAdapterResponse(chunk=data[start : start + 128])

    server.answers["ExportAdapter"] = answer
    assert await call("export_adapter", "rex", file_format="diffusers") == contents


async def test_an_import_streams_its_files(server: ScriptedServer, call: Call, tmp_path: Path) -> None:
    seen: list[adapter_pb2.ImportAdapterRequest] = []

    def answer(messages: Any, _: Any) -> Any:
        seen[:] = list(messages)
        name = "tenants/local/adapters/rex@1"
        return adapter_pb2.ImportAdapterResponse(adapter=adapter_pb2.Adapter(name=name))

    server.answers["ImportAdapter"] = answer
    data = b"x" * 300_000
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "README.md").write_bytes(b"not sent")
    told = {"rights": "licensed", "statement": "contract 7", "class_noun": "dog", "placeholder": "<rex>"}
    for files in (
        tmp_path,  # a folder
        str(tmp_path / "adapter_model.safetensors"),  # brings its settings along
        [("adapter_config.json", b"{}"), ("adapter_model.safetensors", data)],
    ):
        made = await call("import_adapter", "rex", files, request_id="r", **told)
        assert made.name == "tenants/local/adapters/rex@1"
        first = seen[0].adapter
        assert (first.adapter_id, first.class_noun, first.placeholder) == ("rex", "dog", "<rex>")
        assert (first.rights.basis, first.rights.statement) == (2, "contract 7")
        assert first.request_id == "r"
        received: dict[str, bytes] = {}
        for message in seen[1:]:
            if message.HasField("file"):
                current = message.file
                received[current.filename] = b""
            else:
                assert 0 < len(message.chunk) <= 2**20
                received[current.filename] += message.chunk
        assert received == {"adapter_model.safetensors": data, "adapter_config.json": b"{}"}
    assert current.sha256 in {hashlib.sha256(content).hexdigest() for content in received.values()}


async def test_an_import_that_cannot_start_sends_nothing(
    server: ScriptedServer, call: Call, tmp_path: Path
) -> None:
    for files, rights, says in (
        (tmp_path / "none.safetensors", "owned", "cannot be read"),
        (tmp_path, "owned", "holds no .safetensors file"),
        ([("a", b"b")], "stolen", "stolen"),
    ):
        with pytest.raises(errors.InvalidArgumentError, match=says):
            await call("import_adapter", "rex", files, rights=rights)
    assert "ImportAdapter" not in server.calls


async def test_a_cut_download_is_refused(server: ScriptedServer, call: Call) -> None:
    def answer(_: Any, __: Any) -> Any:
        yield job_pb2.DownloadArtifactResponse(file=media_pb2.FileHeader(filename="r.html", size_bytes=10))
        yield job_pb2.DownloadArtifactResponse(chunk=b"12345")

    server.answers["DownloadArtifact"] = answer
    with pytest.raises(errors.InternalError, match=r"r\.html"):
        await call("download_artifact", "1", "r.html")


async def test_batch_results_come_under_their_ids(server: ScriptedServer, call: Call) -> None:
    def answer(messages: Any, _: Any) -> Any:
        response = personalization_pb2.GenerateBatchResponse
        for message in messages:
            if message.request.prompt == "bad":
                failure = response(id=message.id)
                failure.error.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
                failure.error.message = "Too long."
                yield failure
                continue
            for chunk in image_chunks(0, png(), 50):
                yield response(id=message.id, image=chunk)
            yield response(id=message.id, done=personalization_pb2.GenerateDone(images=1))

    server.answers["GenerateBatch"] = answer
    events = await call("generate_batch", [("a", {"prompt": "one"}), ("b", {"prompt": "bad"})])
    assert [(type(e).__name__, e.id) for e in events] == [
        ("BatchImage", "a"),
        ("BatchDone", "a"),
        ("BatchError", "b"),
    ]
    assert isinstance(events[-1].error, errors.InvalidArgumentError)


async def test_a_bad_batch_item_raises_its_own_error(server: ScriptedServer, call: Call) -> None:
    server.answers["GenerateBatch"] = lambda messages, _: iter([m for m in messages if False])
    with pytest.raises(errors.InvalidArgumentError, match="sampler"):
        await call("generate_batch", [("a", {"prompt": "one", "sampler": "magic"})])
