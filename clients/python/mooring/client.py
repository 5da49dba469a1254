"""The blocking client. `mooring.aio.Client` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from mooring import _requests, errors
from mooring._batching import Batching
from mooring._channel import Pem, channel_credentials, channel_options
from mooring._publishing import Publishing
from mooring._requests import AdapterFiles, Photo, resource_name
from mooring._resume import Resume
from mooring._tracing import traced
from mooring.errors import translated
from mooring.types import (
    BatchDone,
    BatchError,
    BatchEvent,
    BatchImage,
    FileAssembler,
    GenerateEvent,
    Image,
    ImageAssembler,
    JobEvent,
    done_of,
    enum_word,
    generate_event_of,
    is_terminal,
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

Response = TypeVar("Response")
DEFAULT_TARGET = "127.0.0.1:50051"


class Client(Publishing, Batching):
    """A connection to a Mooring server; thread-safe, to be closed or used as a context manager.

    It speaks TLS, but for a loopback target where nothing of TLS is given.

    Every call may raise a class of `mooring.errors`. Where a subject, adapter or job is asked for, its id
    ("rex", "rex@2"), its resource name or the message itself will do.

    Args:
        target: "host:port".
        credentials: gRPC's own, where the arguments below do not reach.
        api_key: sent with every call; over TLS only.
        token: called for the token (a JWT) of every call, on a thread of gRPC's; over TLS only.
        root_certificates: PEM of the authorities to trust, as path or bytes; None: the system's.
        client_certificate: PEM of certificate chain and private key, shown to the server.
        timeout: seconds that a short call may take; streams and uploads have none unless given.

    Example:
        >>> with mooring.Client() as client:
        ...     client.create_subject("rex", class_noun="dog", rights="owned", photos=["rex.jpg"])
        ...     adapter = client.wait(client.train("rex")).adapter
        ...     client.images("a photo of <rex> on the beach", adapter=adapter)[0].save("rex.png")

    Raises:
        ValueError: a credential would travel in the clear, or the arguments exclude each other.
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
        self._channel = traced(
            grpc.secure_channel(target, security, options)
            if security
            else grpc.insecure_channel(target, options)
        )
        self._personalization = personalization_pb2_grpc.PersonalizationServiceStub(self._channel)
        self._subjects = subject_pb2_grpc.SubjectServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._jobs = job_pb2_grpc.JobServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; calls under way end with CancelledError."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- server ---------------------------------------------------------------------------------------------

    def server_info(self) -> personalization_pb2.GetServerInfoResponse:
        """What the server runs: base model, limits, methods, presets, defaults."""
        return self._unary(self._personalization.GetServerInfo, personalization_pb2.GetServerInfoRequest())

    # -- subjects -------------------------------------------------------------------------------------------

    def create_subject(
        self,
        subject_id: str,
        *,
        class_noun: str,
        rights: str,
        statement: str = "",
        placeholder: str = "",
        display_name: str = "",
        photos: Iterable[Photo] = (),
        request_id: str = "",
    ) -> subject_pb2.Subject:
        """Create a subject and upload its photos.

        Args:
            subject_id: 1 to 63 lower-case letters, digits and hyphens, starting with a letter.
            class_noun: what the subject is an instance of, in the base model's words ("dog").
            rights: by what right the photos may be used: "owned", "licensed", "consent" or "public_domain".
            statement: free text for the record, such as a contract number.
            placeholder: the word that stands for the subject in prompts; "" is "<" + id + ">".
            display_name: name to show to people.
            photos: paths, bytes, (filename, bytes) or `PIL.Image`; they are read before anything is created.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.
        """
        files = _requests.read_photos(photos)
        request = _requests.create_subject(
            subject_id,
            class_noun=class_noun,
            rights=rights,
            statement=statement,
            placeholder=placeholder,
            display_name=display_name,
            request_id=request_id,
        )
        subject: subject_pb2.Subject = self._unary(self._subjects.CreateSubject, request).subject
        return self.upload_photos(subject, files).subject if files else subject

    def upload_photos(
        self, subject: Any, photos: Iterable[Photo], *, timeout: float | None = None
    ) -> subject_pb2.UploadPhotosResponse:
        """Add photos to a subject, all or none; what it already has is not stored twice.

        Args:
            subject: id, name or message.
            photos: paths, bytes, (filename, bytes) or `PIL.Image`.
            timeout: seconds the upload may take; None for no limit.

        Raises:
            InvalidArgumentError: `fields` has one entry per bad file.
        """
        files = _requests.read_photos(photos)
        with translated():
            return self._subjects.UploadPhotos(_requests.upload_messages(subject, files), timeout=timeout)

    def get_subject(self, subject: Any) -> subject_pb2.Subject:
        """One subject with its photos' descriptions."""
        request = subject_pb2.GetSubjectRequest(name=resource_name("subjects", subject))
        return self._unary(self._subjects.GetSubject, request).subject

    def list_subjects(self) -> Iterator[subject_pb2.Subject]:
        """All subjects, newest first; pages are fetched as they are needed."""
        return self._pages(self._subjects.ListSubjects, subject_pb2.ListSubjectsRequest(), "subjects")

    def delete_subject(self, subject: Any) -> None:
        """Delete a subject and its photos; adapters trained on it stay."""
        request = subject_pb2.DeleteSubjectRequest(name=resource_name("subjects", subject))
        self._unary(self._subjects.DeleteSubject, request)

    # -- training and evaluation ----------------------------------------------------------------------------

    def train(
        self,
        subject: Any,
        *,
        adapter_id: str = "",
        method: str = "",
        preset: str = "",
        drift_budget: float | None = None,
        fixed_strength: float | None = None,
        rank: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        embedding_learning_rate: float | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        targets: str = "",
        learn_embedding: bool | None = None,
        framing: str = "",
        views: int | None = None,
        flip: bool | None = None,
        prior_images: int | None = None,
        probe_every: int | None = None,
        checkpoint_every: int | None = None,
        preview_every: int | None = None,
        request_id: str = "",
    ) -> job_pb2.Job:
        """Start training an adapter; whatever is left out takes the server's default.

        Args:
            subject: what to learn: id, name or message.
            adapter_id: adapter to publish a version of; "" is the subject's id.
            method: "none", "l2", "factor_decay", "spectral" or "prior_preservation".
            preset: drift budget by name: "conservative", "balanced" or "adaptive".
            drift_budget: drift budget as a share of the base's guidance energy, instead of a preset.
            fixed_strength: a fixed penalty strength λ, instead of a budget.
            rank: of the factors.
            steps: optimiser steps.
            learning_rate: of the factors, at its peak.
            embedding_learning_rate: of the placeholder's embedding, relative to the embedding table's RMS.
            batch_size: photo views per step.
            seed: of everything random.
            targets: adapted layers: "attention" or "attention_ff".
            learn_embedding: whether the placeholder's token embedding is learned too.
            framing: how a photo becomes a square: "crop" or "letterbox".
            views: slightly shifted and zoomed variants per photo.
            flip: whether every second view is mirrored; wrong for whatever carries text.
            prior_images: pictures of the class for "prior_preservation".
            probe_every: steps between two drift measurements, which steer the penalty strength.
            checkpoint_every: steps between checkpoints.
            preview_every: steps between previews, 0 for none.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.
        """
        request = _requests.train(
            subject,
            adapter_id=adapter_id,
            method=method,
            preset=preset,
            drift_budget=drift_budget,
            fixed_strength=fixed_strength,
            targets=targets,
            framing=framing,
            request_id=request_id,
            rank=rank,
            steps=steps,
            learning_rate=learning_rate,
            embedding_learning_rate=embedding_learning_rate,
            batch_size=batch_size,
            seed=seed,
            learn_embedding=learn_embedding,
            views=views,
            flip=flip,
            prior_images=prior_images,
            probe_every=probe_every,
            checkpoint_every=checkpoint_every,
            preview_every=preview_every,
        )
        return self._unary(self._personalization.Train, request).job

    def evaluate(
        self,
        adapter: Any = "",
        *,
        subject: Any = "",
        prompts: Iterable[str] | None = None,
        generic_prompts: Iterable[str] | None = None,
        seeds: Iterable[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        adapter_scale: float | None = None,
        class_samples: int | None = None,
        request_id: str = "",
    ) -> job_pb2.Job:
        """Start an evaluation; its figures come from `get_evaluation` when the job has succeeded.

        Args:
            adapter: what to evaluate; "" is the base alone.
            subject: whose photos to compare with; "" is the adapter's own.
            prompts: prompts of the subject in new scenes; `{}` or the placeholder stands for the subject.
            generic_prompts: prompts without the subject, which the adapter should leave as they are.
            seeds: every prompt is drawn with each.
            steps: denoising steps.
            guidance_scale: classifier-free guidance.
            adapter_scale: scale of the adapter.
            class_samples: class-prompt samples for PRES and DIV; 0 leaves both out.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.
        """
        request = _requests.evaluate(
            adapter,
            subject=subject,
            request_id=request_id,
            prompts=prompts,
            generic_prompts=generic_prompts,
            seeds=seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            adapter_scale=adapter_scale,
            class_samples=class_samples,
        )
        return self._unary(self._personalization.Evaluate, request).job

    # -- jobs -----------------------------------------------------------------------------------------------

    def get_job(self, job: Any) -> job_pb2.Job:
        """One job as it is now."""
        return self._unary(self._jobs.GetJob, job_pb2.GetJobRequest(name=resource_name("jobs", job))).job

    def list_jobs(self, *, kind: str = "", state: str = "") -> Iterator[job_pb2.Job]:
        """Jobs, newest first.

        Args:
            kind: "train", "evaluate", "batch" or "" for all.
            state: "pending", "running", "succeeded", "failed", "cancelled" or "" for all.
        """
        return self._pages(self._jobs.ListJobs, _requests.list_jobs(kind=kind, state=state), "jobs")

    def cancel_job(self, job: Any) -> job_pb2.Job:
        """Ask a job to stop; a running one stops at its next step."""
        request = job_pb2.CancelJobRequest(name=resource_name("jobs", job))
        return self._unary(self._jobs.CancelJob, request).job

    def watch(self, job: Any, *, after_sequence: int = 0, patience: float = 120.0) -> Iterator[JobEvent]:
        """A job's events as they come; ends with the job in its terminal state.

        A connection that breaks is taken up again after the last event, so that a restart of the server shows
        as a pause; nothing comes twice and nothing is left out.

        Args:
            job: id, name or message.
            after_sequence: go on after this event; 0 starts with the first.
            patience: seconds that a running watch waits for a lost server.
        """
        name = resource_name("jobs", job)
        resume = Resume(after_sequence, patience)
        ended = False
        while True:
            call: Any = self._jobs.WatchJob(
                job_pb2.WatchJobRequest(name=name, after_sequence=resume.sequence)
            )
            try:
                with translated():
                    for message in call:
                        resume.received(message.sequence)
                        event = job_event_of(message)
                        ended = event.terminal
                        yield event
                if ended:  # and the call with it: cancelling it would look like a lost client to the server
                    return
                resume.cut_short()
            except errors.MooringError as error:
                if ended:  # the end was told; that the call broke after it is nobody's loss
                    return
                time.sleep(resume.pause_after(error))
            finally:
                call.cancel()

    def wait(
        self, job: Any, *, on_event: Callable[[JobEvent], None] | None = None, patience: float = 120.0
    ) -> job_pb2.Job:
        """Wait for a job's end.

        Args:
            job: id, name or message.
            on_event: called with every event.
            patience: see `watch`.

        Returns:
            The succeeded job.

        Raises:
            JobFailedError: it failed or was cancelled.
        """
        last: job_pb2.Job | None = None
        for event in self.watch(job, patience=patience):
            if on_event:
                on_event(event)
            last = event.job
        return succeeded(last or self.get_job(job))

    def get_evaluation(self, job: Any) -> evaluation_pb2.Evaluation:
        """Figures of a succeeded evaluation job."""
        request = job_pb2.GetEvaluationRequest(name=resource_name("jobs", job))
        return self._unary(self._jobs.GetEvaluation, request).evaluation

    def download_artifact(self, job: Any, filename: str) -> bytes:
        """One of the files that a job made.

        Args:
            job: id, name or message.
            filename: one of the job's `artifacts`.
        """
        request = job_pb2.DownloadArtifactRequest(name=resource_name("jobs", job), filename=filename)
        return next(iter(self._files(self._jobs.DownloadArtifact(request)).values()))

    # -- images ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        *,
        adapter: Any = "",
        adapter_scale: float | None = None,
        more_adapters: Mapping[Any, float] | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        count: int | None = None,
        sampler: str = "",
        preview_interval: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[GenerateEvent]:
        """Draw images, with everything that happens on the way; `images` gives the pictures alone.

        The same request gives the same images. Leaving the iterator early stops the work at its next step.

        Args:
            prompt: what to draw; with an adapter its placeholder stands for the subject.
            adapter: which adapter; "" is the base alone.
            adapter_scale: 0 (the base) to 2.
            more_adapters: up to 3 more adapters and their scales; all changes add up.
            negative_prompt: what to keep away from.
            steps: denoising steps.
            guidance_scale: classifier-free guidance, 1 is off.
            width: pixels; None is the base's native size.
            height: pixels; None is the base's native size.
            seed: of the first image; image i uses seed + i.
            count: images to draw.
            sampler: "ddim", "euler", "euler_ancestral" or "dpmpp_2m".
            preview_interval: steps between previews.
            timeout: seconds the whole request may take.
        """
        request = _requests.generate(
            prompt,
            adapter=adapter,
            sampler=sampler,
            adapter_scale=adapter_scale,
            more_adapters=more_adapters,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            seed=seed,
            count=count,
            preview_interval=preview_interval,
        )
        assembler = ImageAssembler()
        call: Any = self._personalization.Generate(request, timeout=timeout)
        try:
            with translated():
                for message in call:
                    event = generate_event_of(message, assembler)
                    if event is not None:
                        yield event
        finally:
            call.cancel()

    def images(self, prompt: str, **arguments: Any) -> list[Image]:
        """Draw images and return them in order; takes what `generate` takes."""
        found = [event for event in self.generate(prompt, **arguments) if isinstance(event, Image)]
        return sorted(found, key=lambda image: image.index)

    def generate_batch(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[BatchEvent]:
        """Draw many requests over one connection; results come as they finish, in any order.

        Args:
            requests: pairs of an id of your own and the keyword arguments of `generate`, `prompt` included.
                The iterable is read as fast as the server takes requests.

        Yields:
            BatchImage, then BatchDone, or BatchError, each under its request's id.
        """
        assemblers: dict[str, ImageAssembler] = {}
        failures: list[BaseException] = []
        call: Any = self._personalization.GenerateBatch(_requests.batch_messages(requests, failures))
        try:
            with translated():
                for message in call:
                    event = batch_event_of(message, assemblers)
                    if event is not None:
                        yield event
        except errors.MooringError as error:
            raise (failures or [error])[0] from None
        finally:
            call.cancel()

    # -- adapters -------------------------------------------------------------------------------------------

    def get_adapter(self, adapter: Any, *, show_deleted: bool = False) -> adapter_pb2.Adapter:
        """One adapter version with its certificate.

        Args:
            adapter: "rex@2", "rex@live", name or message; without `@version` the newest.
            show_deleted: what is left of a deleted version ("rex@2") too; it has a `delete_time`.
        """
        request = adapter_pb2.GetAdapterRequest(
            name=resource_name("adapters", adapter), show_deleted=show_deleted
        )
        return self._unary(self._adapters.GetAdapter, request).adapter

    def list_adapters(self, *, show_deleted: bool = False) -> Iterator[adapter_pb2.Adapter]:
        """All adapter versions, newest first, without their certificates' layers.

        Args:
            show_deleted: those that were deleted too; they have a `delete_time`.
        """
        request = adapter_pb2.ListAdaptersRequest(show_deleted=show_deleted)
        return self._pages(self._adapters.ListAdapters, request, "adapters")

    def delete_adapter(self, adapter: Any) -> None:
        """Delete one version ("rex@2"), or all versions of an adapter ("rex")."""
        request = adapter_pb2.DeleteAdapterRequest(name=resource_name("adapters", adapter))
        self._unary(self._adapters.DeleteAdapter, request)

    def export_adapter(self, adapter: Any, *, file_format: str = "") -> dict[str, bytes]:
        """An adapter version as files.

        Args:
            adapter: id, name or message.
            file_format: "native" (Mooring's own safetensors; the default) or "diffusers".

        Returns:
            Bytes by file name.
        """
        request = _requests.export_adapter(adapter, file_format=file_format)
        return self._files(self._adapters.ExportAdapter(request))

    def import_adapter(
        self,
        adapter_id: str,
        files: AdapterFiles,
        *,
        rights: str,
        statement: str = "",
        class_noun: str = "",
        placeholder: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> adapter_pb2.Adapter:
        """Publish an adapter that another tool made (diffusers, PEFT, kohya, textual inversion).

        Args:
            adapter_id: the adapter to publish a version of.
            files: a safetensors file or a folder, several of them, or (filename, bytes) pairs.
            rights: by what right it may be used: "owned", "licensed", "consent" or "public_domain".
            statement: free text for the record, such as where it came from.
            class_noun: what its subject is an instance of.
            placeholder: the word of its learned embeddings, or of its subject; "" is what the files say.
            request_id: UUID that makes the call safe to repeat; "" makes a new one.
            timeout: seconds the import may take; None for no limit.

        Raises:
            InvalidArgumentError: a tensor fits no layer of the server's base, or the file is of a kind that
                cannot be used; the message names it and nothing was stored.
        """
        messages = _requests.import_messages(
            adapter_id,
            _requests.read_adapter_files(files),
            rights=rights,
            statement=statement,
            class_noun=class_noun,
            placeholder=placeholder,
            request_id=request_id,
        )
        with translated():
            response: adapter_pb2.ImportAdapterResponse = self._adapters.ImportAdapter(
                messages, timeout=timeout
            )
        return response.adapter

    # -- shared ---------------------------------------------------------------------------------------------

    def _unary(self, method: Callable[..., Response], request: Any) -> Response:
        with translated():
            return method(request, timeout=self._timeout)

    def _pages(self, method: Any, request: Any, field: str) -> Iterator[Any]:
        while True:
            page = self._unary(method, request)
            yield from getattr(page, field)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    @staticmethod
    def _files(call: Any) -> dict[str, bytes]:
        assembler = FileAssembler()
        with translated():
            for message in call:
                assembler.feed(message)
        return assembler.finish()


def succeeded(job: job_pb2.Job) -> job_pb2.Job:
    """The job, if it has succeeded.

    Raises:
        JobFailedError: it failed or was cancelled; carries reason and remedy of its error.
    """
    if job.state == job_pb2.JOB_STATE_SUCCEEDED or not is_terminal(job):
        return job
    error = errors.from_status(job.error)
    word = enum_word(job_pb2.JobState, job.state)
    raise errors.JobFailedError(
        error.message or f"The job {'was ' if word == 'cancelled' else ''}{word}.",
        job=job.name,
        reason=error.reason,
        remedy=error.remedy,
    )


def batch_event_of(
    message: personalization_pb2.GenerateBatchResponse, assemblers: dict[str, ImageAssembler]
) -> BatchEvent | None:
    """One event of a batch; None for a piece of an image that is not complete yet."""
    match message.WhichOneof("result"):
        case "image":
            image = assemblers.setdefault(message.id, ImageAssembler()).feed(message.image)
            return BatchImage(message.id, image) if image else None
        case "done":
            assemblers.pop(message.id, None)
            return BatchDone(message.id, done_of(message.done))
        case "error":
            assemblers.pop(message.id, None)
            return BatchError(message.id, errors.from_status(message.error))
        case _:  # a result of a newer server
            return None
