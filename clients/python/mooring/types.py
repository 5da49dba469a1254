"""What the streaming calls hand over, with chunks put together and enums spelled as words.

Resources (subjects, adapters, jobs, evaluations) are the protobuf messages of `mooring.v1` as they are; only
what arrives in pieces is wrapped here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from mooring.errors import InternalError
from mooring.v1 import job_pb2, media_pb2, personalization_pb2


@dataclass(frozen=True)
class Image:
    """One finished picture, or a preview.

    Attributes:
        index: which image of the request, from 0.
        seed: the seed that draws this very image again when it is requested alone; 0 for previews.
        width: pixels.
        height: pixels.
        media_type: encoding of `data`, "image/png" today.
        data: the encoded picture.
    """

    index: int
    seed: int
    width: int
    height: int
    media_type: str
    data: bytes = field(repr=False)

    @property
    def image(self) -> Any:
        """The picture as a `PIL.Image` where Pillow is installed (extra `images`), else bytes."""
        try:
            from PIL import Image as PillowImage
        except ImportError:
            return self.data
        return PillowImage.open(io.BytesIO(self.data)).convert("RGB")

    def save(self, path: str | Path) -> Path:
        """Write the encoded picture to a file as it is, provenance mark included, and return the path."""
        path = Path(path)
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True)
class Queued:
    """The request waits; `position` requests are before it."""

    position: int


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` was done; previews come when they were asked for."""

    step: int
    steps: int
    previews: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What one content check of the server found.

    Attributes:
        check: its name.
        allowed: whether what it looked at may pass.
        category: what kind of content refused it, "" when allowed.
        score: how sure it is of content to refuse, 0 to 1.
        image_index: which image, None for the prompts.
    """

    check: str
    allowed: bool
    category: str
    score: float
    image_index: int | None = None


@dataclass(frozen=True)
class Done:
    """Everything was sent.

    Attributes:
        images: how many were drawn.
        adapter: adapter version that was used, "" for the base alone.
        adapter_digest: its digest.
        base_digest: digest of the base model.
        queue_seconds: from the request's arrival to its first step.
        total_seconds: from the request's arrival to its last image.
        unknown_words: words of the prompts that mean nothing to the base, as far as it can tell.
        more_adapters: digests of the other adapter versions that were used, by name.
        safety: what the server's content checks found; empty when nothing was checked.
    """

    images: int
    adapter: str
    adapter_digest: str
    base_digest: str
    queue_seconds: float
    total_seconds: float
    unknown_words: tuple[str, ...] = ()
    more_adapters: Mapping[str, str] = field(default_factory=dict)
    safety: tuple[Verdict, ...] = ()

    @property
    def withheld(self) -> tuple[int, ...]:
        """Indices of images that were drawn and not sent."""
        return tuple(v.image_index for v in self.safety if not v.allowed and v.image_index is not None)


GenerateEvent = Queued | Progress | Image | Done


@dataclass(frozen=True)
class JobEvent:
    """One event of a job: its progress, or its change of state.

    Attributes:
        sequence: number within the job; pass it as `after_sequence` to go on from here.
        job: the job where this event is a change of state, else None.
        phase: what the job does now, "" where `job` is set.
        step: steps of the phase done.
        steps: steps of the phase in all.
        seconds_left: estimate to the end of the job, None when unknown.
        loss: denoising loss of a training step.
        sigma_max: largest spectral norm over the adapted layers.
        drift: last measured drift as a share of the base's guidance energy.
        drift_budget: what the drift may be.
        strength: penalty strength λ in force.
        previews: pictures drawn with the adapter as it is now.
    """

    sequence: int
    job: job_pb2.Job | None = None
    phase: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    loss: float | None = None
    sigma_max: float | None = None
    drift: float | None = None
    drift_budget: float | None = None
    strength: float | None = None
    previews: tuple[Image, ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether the job has ended with this event."""
        return self.job is not None and is_terminal(self.job)


@dataclass(frozen=True)
class BatchImage:
    """An image of one request of `generate_batch`, under the caller's id."""

    id: str
    image: Image


@dataclass(frozen=True)
class BatchDone:
    """A request of `generate_batch` was answered completely."""

    id: str
    done: Done


@dataclass(frozen=True)
class BatchError:
    """A request of `generate_batch` failed; the others go on."""

    id: str
    error: Exception


BatchEvent = BatchImage | BatchDone | BatchError


@dataclass(frozen=True)
class BatchRow:
    """A row of a batch job that is done.

    Args:
        row: number of its line in the file, from 1.
        position: the how-manyth row that was done, from 1.
        row_count: rows of the job.
        filename: of its image, such as "images/000012.png"; "" when the row ended with an error.
        data: the image, PNG; empty with an error.
        manifest: its line of the manifest; with an error it has the key "error".
    """

    row: int
    position: int
    row_count: int
    filename: str
    data: bytes
    manifest: Mapping[str, Any]


def is_terminal(job: job_pb2.Job) -> bool:
    """Whether a job has succeeded, failed or was cancelled."""
    return job.state in {
        job_pb2.JOB_STATE_SUCCEEDED,
        job_pb2.JOB_STATE_FAILED,
        job_pb2.JOB_STATE_CANCELLED,
    }


def enum_word(enum: Any, value: int) -> str:
    """The word of an enum's value: "spectral" for TRAINING_METHOD_SPECTRAL, "" for the zero value."""
    names = list(enum.keys())
    prefix = next(name for name in names if name.endswith("UNSPECIFIED")).removesuffix("UNSPECIFIED")
    word: str = enum.Name(value).removeprefix(prefix).lower()
    return "" if word == "unspecified" else word


class ImageAssembler:
    """Puts the chunks of the images of one call together; images are not interleaved."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def feed(self, chunk: media_pb2.ImageChunk) -> Image | None:
        """Take one chunk; return the image when it is complete.

        Raises:
            InternalError: bytes are missing or do not have the announced SHA-256.
        """
        if chunk.offset != len(self._parts):
            raise InternalError(
                f"image {chunk.index}: bytes {len(self._parts)} to {chunk.offset} are missing"
            )
        self._parts += chunk.data
        if not chunk.last:
            return None
        data, self._parts = bytes(self._parts), bytearray()
        check_content(f"image {chunk.index}", data, chunk.size_bytes, chunk.sha256)
        return Image(chunk.index, chunk.seed, chunk.width, chunk.height, chunk.media_type, data)


class FileAssembler:
    """Puts files together out of headers and chunks, as exports and downloads send them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._header: media_pb2.FileHeader | None = None
        self._parts = bytearray()

    def feed(self, message: Any) -> None:
        """Take one message whose oneof `content` is `file` or `chunk`."""
        if message.WhichOneof("content") == "file":
            self.finish()
            self._header = message.file
        else:
            self._parts += message.chunk

    def finish(self) -> dict[str, bytes]:
        """Close the current file and return all files by name.

        Raises:
            InternalError: the bytes do not have the announced size or SHA-256.
        """
        if self._header is not None:
            data = bytes(self._parts)
            check_content(self._header.filename, data, self._header.size_bytes, self._header.sha256)
            self.files[self._header.filename] = data
        self._header, self._parts = None, bytearray()
        return self.files


def check_content(what: str, data: bytes, size: int, sha256: str) -> None:
    """Raise InternalError unless `data` has the announced size and SHA-256 (empty: not announced)."""
    if (size and len(data) != size) or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
        raise InternalError(f"{what}: what arrived differs from what was announced.", remedy="Try again.")


def previews_of(messages: Iterable[media_pb2.PreviewImage]) -> tuple[Image, ...]:
    """Previews as images."""
    return tuple(Image(p.index, 0, p.width, p.height, p.media_type, p.data) for p in messages)


def done_of(message: personalization_pb2.GenerateDone) -> Done:
    """The closing message of a generation."""
    return Done(
        images=message.images,
        adapter=message.adapter,
        adapter_digest=message.adapter_digest,
        base_digest=message.base_digest,
        queue_seconds=message.queue_time.ToTimedelta() / timedelta(seconds=1),
        total_seconds=message.total_time.ToTimedelta() / timedelta(seconds=1),
        unknown_words=tuple(message.unknown_words),
        more_adapters={use.adapter: use.digest for use in message.more_adapters},
        safety=tuple(
            Verdict(
                v.check,
                v.allowed,
                v.category,
                v.score,
                v.image_index if v.HasField("image_index") else None,
            )
            for v in message.safety
        ),
    )


def generate_event_of(
    message: personalization_pb2.GenerateResponse, assembler: ImageAssembler
) -> GenerateEvent | None:
    """One event of a generation; None for a piece of an image that is not complete yet."""
    match message.WhichOneof("event"):
        case "queued":
            return Queued(message.queued.position)
        case "progress":
            progress = message.progress
            return Progress(progress.step, progress.steps, previews_of(progress.previews))
        case "image":
            return assembler.feed(message.image)
        case "done":
            return done_of(message.done)
        case _:  # an event of a newer server
            return None


def job_event_of(message: job_pb2.WatchJobResponse) -> JobEvent:
    """One event of a job."""
    if message.WhichOneof("event") == "job":
        return JobEvent(message.sequence, job=message.job)
    return progress_event(message.sequence, message.progress)


def progress_event(sequence: int, progress: job_pb2.JobProgress) -> JobEvent:
    """A job's progress message as an event."""
    figures: Any = progress.training

    def figure(name: str) -> float | None:
        return getattr(figures, name) if figures.HasField(name) else None

    left = progress.time_left.ToTimedelta() if progress.HasField("time_left") else None
    return JobEvent(
        sequence,
        phase=progress.phase,
        step=progress.step,
        steps=progress.steps,
        seconds_left=left / timedelta(seconds=1) if left is not None else None,
        loss=figures.loss if progress.HasField("training") else None,
        sigma_max=figure("sigma_max"),
        drift=figure("drift"),
        drift_budget=figure("drift_budget"),
        strength=figure("strength"),
        previews=previews_of(progress.previews),
    )
