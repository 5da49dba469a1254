"""Decoders as processes: the same pictures, limits that hold, and a server that outlives them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.jobs.decoding.frames import read_frame, write_frame
from mooring_server.jobs.decoding.pool import DecoderLimits, DecoderPool
from mooring_server.jobs.photos import MAX_PHOTO_BYTES, decode_photo
from mooring_server.jobs.subjects import PhotoUpload
from pictures import encode, jpeg, png, quarters
from PIL import Image

FAKES = Path(__file__).with_name("fake_decoder.py")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(1) as pool:
        yield pool


def fake(behaviour: str, **limits: float) -> DecoderPool:
    """A pool whose decoders behave as told: see fake_decoder.py."""
    command = (sys.executable, str(FAKES), behaviour)
    return DecoderPool(1, DecoderLimits(**limits), command=command)  # type: ignore[arg-type]


def refused(pool: DecoderPool, data: bytes, name: str = "cat.jpg") -> MooringError:
    with pytest.raises(MooringError) as caught:
        pool.decode(data, name)
    assert name in caught.value.message
    assert caught.value.remedy
    assert caught.value.fields
    return caught.value


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


KINDS = {
    "jpeg": jpeg(),
    "turned jpeg": jpeg(exif=exif(6)),
    "cmyk jpeg": encode(quarters().convert("CMYK"), "JPEG"),
    "large jpeg": jpeg(quarters(3000, 2000)),
    "progressive jpeg": jpeg(progressive=True),
    "multi-picture jpeg": encode(quarters(), "MPO", save_all=True, append_images=[quarters()]),
    "png": png(),
    "palette png": png(quarters().convert("P")),
    "16-bit png": png(quarters().convert("L").convert("I;16")),
    "transparent png": png(quarters().convert("RGBA")),
    "webp": encode(quarters(), "WEBP"),
    "lossless webp": encode(quarters(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_gives_what_decoding_here_gives(pool: DecoderPool, kind: str) -> None:
    there, here = pool.decode(KINDS[kind], "cat.jpg"), decode_photo(KINDS[kind], "cat.jpg")
    assert (there.filename, there.sha256, there.size_bytes) == (here.filename, here.sha256, here.size_bytes)
    assert (there.image.mode, there.image.size) == (here.image.mode, here.image.size)
    assert there.image.tobytes() == here.image.tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", Reason.BAD_IMAGE),
        (jpeg()[:200], Reason.BAD_IMAGE),
        (jpeg(xmp=b"<plus:DataMining>DMI-PROHIBITED</plus:DataMining>"), Reason.TRAINING_NOT_ALLOWED),
        (bytes(MAX_PHOTO_BYTES + 1), Reason.IMAGE_TOO_LARGE),
        (b"", Reason.BAD_IMAGE),
    ],
)
def test_a_decoder_refuses_what_decoding_here_refuses(pool: DecoderPool, data: bytes, reason: Reason) -> None:
    there = refused(pool, data)
    with pytest.raises(MooringError) as here:
        decode_photo(data, "cat.jpg")
    assert there.reason is reason
    assert (there.reason, there.message, there.remedy) == (
        here.value.reason,
        here.value.message,
        here.value.remedy,
    )


def test_a_decoder_is_used_again_and_replaced_in_good_time() -> None:
    with fake("pid", files=3) as pool:
        pids = [refused(pool, b"x").remedy for _ in range(7)]
    assert pids[0] == pids[1] == pids[2] != pids[3]
    assert pids[3] == pids[4] == pids[5] != pids[6]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("segfault", "SIGSEGV"),
        ("exit", "status 3"),
        ("hang", "longer than 5 s"),
        ("spin", "1 s of processor time"),
        ("garbage", "no sense"),
        ("huge", "no sense"),
        ("wrong size", "no sense"),
        ("unknown reason", "no sense"),
        ("not json", "no sense"),
    ],
)
def test_a_decoder_that_fails_costs_its_file_alone(behaviour: str, says: str) -> None:
    limits = {"wall_seconds": 5.0} if behaviour == "hang" else {"cpu_seconds": 1}
    with fake(behaviour, **limits) as pool:
        error = refused(pool, b"x")
        assert error.reason is Reason.BAD_IMAGE
        assert says in error.message
        assert pool.decode(b"good", "dog.jpg").image.size == (1, 1)  # by a new decoder


def test_a_bomb_that_passes_the_header_meets_the_memory_limit() -> None:
    width = height = 7000  # 49 million pixels: allowed by the header's check
    rows = zlib.compress(bytes((1 + 3 * width) * 16), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with DecoderPool(1, DecoderLimits(memory_bytes=64 * 2**20)) as pool:
        error = refused(pool, bomb)
        assert error.reason is Reason.IMAGE_TOO_LARGE
        assert "memory" in error.message
        assert pool.decode(jpeg(), "dog.jpg").image.size == (64, 48)


def test_a_decoder_can_open_nothing_and_start_nothing() -> None:
    code = (
        "import os, socket, sys\n"
        "from mooring_server.jobs.decoding import worker\n"
        "worker._load_everything(); worker._give_up(2**28)\n"
        "def tries(what):\n"
        "    try: what()\n"
        "    except (OSError, MemoryError) as error: return type(error).__name__\n"
        "    return 'done'\n"
        "for what in (lambda: open('/etc/passwd'), socket.socket, os.pipe,\n"
        "             lambda: os.write(1, b''), lambda: bytearray(2**30)):\n"
        "    print(tries(what))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "done", "MemoryError"]


def test_a_decoder_sees_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORING_DATABASE_URL", "postgresql://user:secret@host/db")
    with fake("environment") as pool:
        assert "secret" not in refused(pool, b"x").remedy


def test_a_decoder_that_died_while_idle_is_replaced_unnoticed(pool: DecoderPool) -> None:
    assert pool.decode(jpeg(), "cat.jpg")
    process = pool._idle[0]._process
    process.kill()
    process.wait()
    assert pool.decode(jpeg(), "cat.jpg")


def test_no_process_is_left_when_the_pool_closes() -> None:
    with DecoderPool(1) as pool:
        pool.decode(jpeg(), "cat.jpg")
        pid = pool._idle[0]._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_as_many_files_as_there_are_decoders_are_decoded_at_a_time() -> None:
    with DecoderPool(2) as pool:
        threads = [threading.Thread(target=pool.decode, args=(jpeg(), f"{i}.jpg")) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(pool._idle) <= 2


def test_one_file_that_kills_its_decoder_is_named_beside_good_ones(store, objects) -> None:
    store.create_subject(
        "acme", "duck", class_noun="duck", placeholder="<duck>", rights={"basis": "OWNED"}, display_name="D"
    )
    with fake("segfault") as pool:
        upload = PhotoUpload(store, objects, "acme", "duck", decode=pool.decode)
        upload.add("bad.jpg", b"x")
        upload.add("good.jpg", b"good")
        with pytest.raises(MooringError) as caught:
            upload.commit()
    assert [violation.field for violation in caught.value.fields] == ["files[0]"]


def test_frames_carry_a_header_and_bytes(tmp_path: Path) -> None:
    with (tmp_path / "pipe").open("wb") as stream:
        write_frame(stream, {"filename": "ü.jpg"}, b"\0\1")
    with (tmp_path / "pipe").open("rb") as stream:
        assert read_frame(stream, max_body=2) == ({"filename": "ü.jpg"}, b"\0\1")
