"""The decoder process: `python -I -m mooring_server.jobs.decoding.worker MEMORY CPU_SECONDS`.

It reads files from standard input and answers with pixels on standard output, until its input ends. Before
the first file it gives up what decoding does not need: memory beyond a limit, new files and sockets, writing
to files, new processes, new privileges, core dumps. Each file gets its own share of processor time.

Left out: a seccomp filter and a user namespace, which need privileges or a library that is not everywhere.
A decoder that was taken over could still read what is open already (nothing but its pipes) and use the
processor until the server ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import resource
import sys
from typing import Any

from PIL import Image, ImageOps

from mooring_server.errors import MooringError
from mooring_server.jobs.decoding.frames import FrameError, read_frame, write_frame
from mooring_server.jobs.photos import MAX_PHOTO_BYTES, decode_photo

_PR_SET_NO_NEW_PRIVS = 38


def main(memory_bytes: int, cpu_seconds: int) -> None:
    """Serve until the input ends.

    Args:
        memory_bytes: that decoding may take on top of what the interpreter has now.
        cpu_seconds: processor time for one file.
    """
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _load_everything()
    _give_up(memory_bytes)
    write_frame(answers, {"ready": True})
    while True:
        try:
            header, data = read_frame(requests, max_body=MAX_PHOTO_BYTES + 1)
        except FrameError:
            return
        _allow_processor(cpu_seconds)
        answer, pixels = _decoded(data, str(header.get("filename", "")))
        write_frame(answers, answer, pixels)


def _decoded(data: bytes, filename: str) -> tuple[dict[str, Any], bytes]:
    try:
        photo = decode_photo(data, filename)
    except MooringError as error:
        return {"reason": error.reason, "message": error.message, "remedy": error.remedy}, b""
    return {"size": photo.image.size}, photo.image.tobytes()


def _load_everything() -> None:
    """Use every decoder once: Pillow imports its parts when they are first needed, which opens files."""
    Image.init()
    for file_format, options in (
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {}),
        ("MPO", {"save_all": True}),
    ):
        image, buffer = Image.new("RGB", (32, 32), "red"), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        with contextlib.suppress(OSError, KeyError):  # a Pillow without that format
            image.save(buffer, file_format, exif=exif, **options)
            decode_photo(buffer.getvalue(), "warm-up")
    ImageOps.exif_transpose(Image.new("RGB", (1, 1)))
    with contextlib.suppress(MooringError):
        decode_photo(b"\xff\xd8\xffdamaged", "warm-up")


def _give_up(memory_bytes: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Nothing may be imported from here on: the limits take the rest of the file system away.
    limit = _virtual_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _virtual_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - before and after, as little as possible
        return int(statm.read().split()[0]) * resource.getpagesize()


def _allow_processor(seconds: int) -> None:
    """The limit counts from the start of the process: move it by what was used up to now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
