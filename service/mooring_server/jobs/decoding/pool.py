"""Decoder processes on the server's side: started when first needed, limited, timed, replaced when they die.

A decoder that crashes, runs out of time or says something that makes no sense costs its file an error and its
process its life; the server and the other files of the upload go on.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

from PIL import Image

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.decoding.frames import FrameError, read_frame, write_frame
from mooring_server.jobs.photos import MAX_PHOTO_BYTES, MAX_SIDE, CheckedPhoto, photo_too_large, safe_filename

log = logging.getLogger(__name__)

_REASONS = frozenset({Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE, Reason.TRAINING_NOT_ALLOWED})
_MAX_TEXT = 600
_START_SECONDS = 60.0
"""For the interpreter and its imports, on a machine that is busy with other work."""


@dataclass(frozen=True)
class DecoderLimits:
    """What one decoder may use.

    Attributes:
        memory_bytes: on top of the interpreter's own; a picture of 50 million pixels takes about 800 MB.
        cpu_seconds: processor time of one file.
        wall_seconds: time from handing a file over to its answer.
        files: after so many a decoder is replaced, so that a leak cannot grow.
    """

    memory_bytes: int = 1536 * 2**20
    cpu_seconds: int = 20
    wall_seconds: float = 40.0
    files: int = 200


class DecoderPool:
    """Decodes files in other processes; thread-safe.

    Args:
        size: processes at a time; further files wait.
        limits: of each.
        command: what is started, for tests.
    """

    def __init__(
        self, size: int = 2, limits: DecoderLimits | None = None, *, command: tuple[str, ...] = ()
    ) -> None:
        self._limits = limits or DecoderLimits()
        self._command = command or (sys.executable, "-I", "-m", "mooring_server.jobs.decoding.worker")
        self._turns = threading.Semaphore(size)
        self._lock = threading.Lock()
        self._idle: list[_Decoder] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, data: bytes, filename: str) -> CheckedPhoto:
        """As `photos.decode_photo`, elsewhere. Blocking.

        Raises:
            MooringError: as there; BAD_IMAGE too for a file that a decoder died of.
        """
        name = safe_filename(filename)
        if len(data) > MAX_PHOTO_BYTES:  # no need to send it
            raise photo_too_large(len(data), name)
        with self._turns:
            decoder = self._take()
            try:
                answer, pixels = decoder.ask(data, name)
                photo = _checked(answer, pixels, data, name)
            except _DecoderLostError as lost:
                decoder.kill()
                log.warning("a decoder was lost over %r: %s", name, lost)
                raise _fatal(name, str(lost)) from None
            except MooringError:
                self._give_back(decoder)
                raise
            except BaseException:
                decoder.kill()
                raise
            self._give_back(decoder)
            return photo

    def close(self) -> None:
        """End the idle decoders, and the others when they are done."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for decoder in idle:
            decoder.kill()

    def _take(self) -> _Decoder:
        while True:
            with self._lock:
                decoder = self._idle.pop() if self._idle else None
            if decoder is None:
                return _Decoder(self._command, self._limits)
            if decoder.alive:
                return decoder
            decoder.kill()  # it died while idle, for example of the system's lack of memory

    def _give_back(self, decoder: _Decoder) -> None:
        with self._lock:
            if decoder.files < self._limits.files and not self._closed:
                self._idle.append(decoder)
                return
        decoder.kill()


class _DecoderLostError(Exception):
    """The process ended, ran out of time or answered nonsense; the text says which."""


class _Decoder:
    """One process; used by one thread at a time."""

    def __init__(self, command: tuple[str, ...], limits: DecoderLimits) -> None:
        self._limits = limits
        self.files = 0
        self._late = False
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [*command, str(limits.memory_bytes), str(limits.cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # nothing of the server's environment: it may hold passwords, and threads would cost memory
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,  # Ctrl-C at the terminal is the server's business
        )
        self._ready = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, data: bytes, filename: str) -> tuple[dict[str, Any], bytes]:
        """Have a file decoded; raises `_DecoderLostError`."""
        requests, answers = self._pipes()
        self.files += 1
        try:
            if not self._ready:
                with self._clock(_START_SECONDS):
                    read_frame(answers, max_body=0)
                self._ready = True
            with self._clock(self._limits.wall_seconds):
                write_frame(requests, {"filename": filename}, data)
                return read_frame(answers, max_body=3 * MAX_SIDE * MAX_SIDE)
        except (OSError, ValueError, FrameError) as error:
            raise _DecoderLostError(self._cause(error)) from None

    def kill(self) -> None:
        """End the process, whatever it does, and collect it."""
        self._process.kill()
        for pipe in self._pipes():
            with suppress(OSError):
                pipe.close()
        self._process.wait()

    def _clock(self, seconds: float) -> _Clock:
        return _Clock(seconds, self._expire)

    def _expire(self) -> None:
        self._late = True
        self._process.kill()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _cause(self, error: Exception) -> str:
        if self._late:
            return f"it took longer than {self._limits.wall_seconds:g} s"
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code == -signal.SIGXCPU:
                return f"it took more than {self._limits.cpu_seconds} s of processor time"
            return f"it ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"
        return f"its answer made no sense ({error})"


class _Clock:
    """Calls back unless its block ends in time."""

    def __init__(self, seconds: float, expire: Any) -> None:
        self._timer = threading.Timer(seconds, expire)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _checked(answer: dict[str, Any], pixels: bytes, data: bytes, name: str) -> CheckedPhoto:
    """The answer as a photo, or as the error it reports; nothing of it is believed unseen."""
    reason = answer.get("reason")
    if reason is not None:
        if reason not in _REASONS:
            raise _DecoderLostError("its answer made no sense")
        message, remedy = (str(answer.get(key, ""))[:_MAX_TEXT] for key in ("message", "remedy"))
        raise _refused(Reason(reason), message, remedy)
    size = answer.get("size")
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and 1 <= side <= MAX_SIDE for side in size)
        and len(pixels) == 3 * size[0] * size[1]
    ):
        raise _DecoderLostError("its answer made no sense")
    image = Image.frombytes("RGB", (size[0], size[1]), pixels)
    return CheckedPhoto(name, hashlib.sha256(data).hexdigest(), len(data), image)


def _fatal(name: str, cause: str) -> MooringError:
    return _refused(
        Reason.BAD_IMAGE,
        f"{name} cannot be decoded: the decoder was lost over it ({cause}).",
        "The file is damaged, or was made to do harm. Save the picture anew and upload that.",
    )


def _refused(reason: Reason, message: str, remedy: str) -> MooringError:
    return MooringError(
        reason, message, remedy=remedy, fields=[FieldViolation("file", f"{message} {remedy}")]
    )
