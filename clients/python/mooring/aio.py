"""The asyncio client: `mooring.Client` with `await`, `async for` and `async with`.

async with mooring.aio.Client() as client:
    job = await client.train("rex")
    async for event in client.watch(job):
        print(event.step, event.drift)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from mooring import _requests, errors
from mooring._batching import AsyncBatching
from mooring._channel import Pem, channel_credentials, channel_options
from mooring._publishing import AsyncPublishing
from mooring._requests import AdapterFiles, Photo, resource_name
from mooring._resume import Resume
from mooring._tracing import traced_aio
from mooring.client import DEFAULT_TARGET, Response, batch_event_of, succeeded
from mooring.errors import translated
from mooring.types import (
    BatchEvent,
    FileAssembler,
    GenerateEvent,
    Image,
    ImageAssembler,
    JobEvent,
    generate_event_of,
    job_event_of,
)
from mooring.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    evaluation_pb2,
    job_pb2,
    job_pb2_grpc,
    personalization_pb2,
    personalization_pb2_grpc,
    subject_pb2,
    subject_pb2_grpc,
)


class Client(AsyncPublishing, AsyncBatching):
    """A connection to a Mooring server for one event loop.

    Every method takes what its namesake of `mooring.Client` takes, and may raise a class of `mooring.errors`.

    Args:
        target: "host:port".
        credentials: gRPC's own; this and the next four are those of `mooring.Client`.
        api_key: sent with every call; over TLS only.
        token: called for the token of every call; over TLS only.
        root_certificates: PEM of the authorities to trust; None: the system's.
        client_certificate: PEM of certificate chain and private key.
        timeout: seconds that a short call may take; streams and uploads have none unless given.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        token: Callable[[], str] | None = None,
        root_certificates: Pem | None = None,
        client_certificate: tuple[Pem, Pem] | None = None,
        timeout: float = 30.0,
    ) -> None:
        options: Any = channel_options()
        security = channel_credentials(
            target,
            credentials=credentials,
            api_key=api_key,
            token=token,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
        )
        self.target = target
        self._timeout = timeout
        self._channel = traced_aio(
            grpc.aio.secure_channel(target, security, options)
            if security
            else grpc.aio.insecure_channel(target, options)
        )
        self._personalization = personalization_pb2_grpc.PersonalizationServiceStub(self._channel)
        self._subjects = subject_pb2_grpc.SubjectServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._jobs = job_pb2_grpc.JobServiceStub(self._channel)

    async def close(self) -> None:
        """Close the connection; calls under way end with CancelledError."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- server ---------------------------------------------------------------------------------------------

    async def server_info(self) -> personalization_pb2.GetServerInfoResponse:
        """What the server runs: base model, limits, methods, presets, defaults."""
        return await self._unary(
            self._personalization.GetServerInfo, personalization_pb2.GetServerInfoRequest()
        )

    # -- subjects -------------------------------------------------------------------------------------------

    async def create_subject(
        self, subject_id: str, *, photos: Iterable[Photo] = (), **arguments: Any
    ) -> subject_pb2.Subject:
        """Create a subject and upload its photos."""
        files = await asyncio.to_thread(_requests.read_photos, photos)
        request = _requests.create_subject(subject_id, **arguments)
        subject: subject_pb2.Subject = (await self._unary(self._subjects.CreateSubject, request)).subject
        return (await self.upload_photos(subject, files)).subject if files else subject

    async def upload_photos(
        self,
        subject: Any,
        photos: Iterable[Photo],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC deadline
    ) -> subject_pb2.UploadPhotosResponse:
        """Add photos to a subject, all or none."""
        files = await asyncio.to_thread(_requests.read_photos, photos)
        with translated():
            return await self._subjects.UploadPhotos(
                _requests.upload_messages(subject, files), timeout=timeout
            )

    async def get_subject(self, subject: Any) -> subject_pb2.Subject:
        """One subject with its photos' descriptions."""
        request = subject_pb2.GetSubjectRequest(name=resource_name("subjects", subject))
        return (await self._unary(self._subjects.GetSubject, request)).subject

    def list_subjects(self) -> AsyncIterator[subject_pb2.Subject]:
        """All subjects, newest first."""
        return self._pages(self._subjects.ListSubjects, subject_pb2.ListSubjectsRequest(), "subjects")

    async def delete_subject(self, subject: Any) -> None:
        """Delete a subject and its photos; adapters trained on it stay."""
        request = subject_pb2.DeleteSubjectRequest(name=resource_name("subjects", subject))
        await self._unary(self._subjects.DeleteSubject, request)

    # -- training and evaluation ----------------------------------------------------------------------------

    async def train(self, subject: Any, **arguments: Any) -> job_pb2.Job:
        """Start training an adapter."""
        return (await self._unary(self._personalization.Train, _requests.train(subject, **arguments))).job

    async def evaluate(self, adapter: Any = "", **arguments: Any) -> job_pb2.Job:
        """Start an evaluation."""
        request = _requests.evaluate(adapter, **arguments)
        return (await self._unary(self._personalization.Evaluate, request)).job

    # -- jobs -----------------------------------------------------------------------------------------------

    async def get_job(self, job: Any) -> job_pb2.Job:
        """One job as it is now."""
        request = job_pb2.GetJobRequest(name=resource_name("jobs", job))
        return (await self._unary(self._jobs.GetJob, request)).job

    def list_jobs(self, *, kind: str = "", state: str = "") -> AsyncIterator[job_pb2.Job]:
        """Jobs, newest first."""
        return self._pages(self._jobs.ListJobs, _requests.list_jobs(kind=kind, state=state), "jobs")

    async def cancel_job(self, job: Any) -> job_pb2.Job:
        """Ask a job to stop; a running one stops at its next step."""
        request = job_pb2.CancelJobRequest(name=resource_name("jobs", job))
        return (await self._unary(self._jobs.CancelJob, request)).job

    async def watch(
        self, job: Any, *, after_sequence: int = 0, patience: float = 120.0
    ) -> AsyncIterator[JobEvent]:
        """A job's events as they come; a broken connection is taken up again after the last event."""
        name = resource_name("jobs", job)
        resume = Resume(after_sequence, patience)
        ended = False
        while True:
            call = self._jobs.WatchJob(job_pb2.WatchJobRequest(name=name, after_sequence=resume.sequence))
            try:
                with translated():
                    async for message in call:
                        resume.received(message.sequence)
                        event = job_event_of(message)
                        ended = event.terminal
                        yield event
                if ended:  # and the call with it: cancelling it would look like a lost client to the server
                    return
                resume.cut_short()
            except errors.MooringError as error:
                if ended:
                    return
                await asyncio.sleep(resume.pause_after(error))
            finally:
                call.cancel()

    async def wait(
        self, job: Any, *, on_event: Callable[[JobEvent], None] | None = None, patience: float = 120.0
    ) -> job_pb2.Job:
        """Wait for a job's end; raises JobFailedError unless it succeeds."""
        last: job_pb2.Job | None = None
        async for event in self.watch(job, patience=patience):
            if on_event:
                on_event(event)
            last = event.job
        return succeeded(last or await self.get_job(job))

    async def get_evaluation(self, job: Any) -> evaluation_pb2.Evaluation:
        """Figures of a succeeded evaluation job."""
        request = job_pb2.GetEvaluationRequest(name=resource_name("jobs", job))
        return (await self._unary(self._jobs.GetEvaluation, request)).evaluation

    async def download_artifact(self, job: Any, filename: str) -> bytes:
        """One of the files that a job made."""
        request = job_pb2.DownloadArtifactRequest(name=resource_name("jobs", job), filename=filename)
        return next(iter((await self._files(self._jobs.DownloadArtifact(request))).values()))

    # -- images ---------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's own deadline
        **arguments: Any,
    ) -> AsyncIterator[GenerateEvent]:
        """Draw images, with everything that happens on the way."""
        assembler = ImageAssembler()
        call = self._personalization.Generate(_requests.generate(prompt, **arguments), timeout=timeout)
        try:
            with translated():
                async for message in call:
                    event = generate_event_of(message, assembler)
                    if event is not None:
                        yield event
        finally:
            call.cancel()

    async def images(self, prompt: str, **arguments: Any) -> list[Image]:
        """Draw images and return them in order."""
        found = [event async for event in self.generate(prompt, **arguments) if isinstance(event, Image)]
        return sorted(found, key=lambda image: image.index)

    async def generate_batch(
        self, requests: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> AsyncIterator[BatchEvent]:
        """Draw many requests over one connection; results come as they finish, in any order."""
        assemblers: dict[str, ImageAssembler] = {}
        failures: list[BaseException] = []
        call = self._personalization.GenerateBatch(_requests.batch_messages(requests, failures))
        try:
            with translated():
                async for message in call:
                    event = batch_event_of(message, assemblers)
                    if event is not None:
                        yield event
        except (errors.MooringError, asyncio.CancelledError) as error:
            # a request iterator that raised shows here as a call cancelled by ourselves
            raise (failures or [error])[0] from None
        finally:
            call.cancel()

    # -- adapters -------------------------------------------------------------------------------------------

    async def get_adapter(self, adapter: Any, *, show_deleted: bool = False) -> adapter_pb2.Adapter:
        """One adapter version with its certificate; without `@version` the newest."""
        request = adapter_pb2.GetAdapterRequest(
            name=resource_name("adapters", adapter), show_deleted=show_deleted
        )
        return (await self._unary(self._adapters.GetAdapter, request)).adapter

    def list_adapters(self, *, show_deleted: bool = False) -> AsyncIterator[adapter_pb2.Adapter]:
        """All adapter versions, newest first, without their certificates' layers."""
        request = adapter_pb2.ListAdaptersRequest(show_deleted=show_deleted)
        return self._pages(self._adapters.ListAdapters, request, "adapters")

    async def delete_adapter(self, adapter: Any) -> None:
        """Delete one version ("rex@2"), or all versions of an adapter ("rex")."""
        request = adapter_pb2.DeleteAdapterRequest(name=resource_name("adapters", adapter))
        await self._unary(self._adapters.DeleteAdapter, request)

    async def export_adapter(self, adapter: Any, *, file_format: str = "") -> dict[str, bytes]:
        """An adapter version as files, bytes by file name."""
        request = _requests.export_adapter(adapter, file_format=file_format)
        return await self._files(self._adapters.ExportAdapter(request))

    async def import_adapter(
        self,
        adapter_id: str,
        files: AdapterFiles,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC deadline
        **arguments: Any,
    ) -> adapter_pb2.Adapter:
        """Publish an adapter that another tool made (diffusers, PEFT, kohya, textual inversion)."""
        read = await asyncio.to_thread(_requests.read_adapter_files, files)
        messages = _requests.import_messages(adapter_id, read, **arguments)
        with translated():
            return (await self._adapters.ImportAdapter(messages, timeout=timeout)).adapter

    # -- shared ---------------------------------------------------------------------------------------------

    async def _unary(self, method: Callable[..., Awaitable[Response]], request: Any) -> Response:
        with translated():
            return await method(request, timeout=self._timeout)

    async def _pages(self, method: Any, request: Any, field: str) -> AsyncIterator[Any]:
        while True:
            page = await self._unary(method, request)
            for item in getattr(page, field):
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    @staticmethod
    async def _files(call: Any) -> dict[str, bytes]:
        assembler = FileAssembler()
        with translated():
            async for message in call:
                assembler.feed(message)
        return assembler.finish()
