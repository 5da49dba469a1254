"""SIGTERM under streaming load loses no accepted request.

Dozens of Generate streams, a GenerateBatch and a training are under way when the server is told to stop. Then
each accepted request ends in one of two ways: with its image, or with UNAVAILABLE, which a caller that
repeats it turns into the very same image on the next server. With enough time to drain every accepted stream
ends with its image; requests of a batch that had not begun are told DRAINING one by one. With no time at all
everything that was cut off is UNAVAILABLE, never another status that no client repeats.
"""

from __future__ import annotations

import hashlib
import io
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mooring
import pytest
from mooring import errors
from mooring.types import BatchDone, BatchError, BatchImage, Done, Image, Queued
from mooring.v1 import job_pb2
from PIL import Image as Picture

from chaos.processes import PATIENCE, Replica

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STREAMS, BATCH = 36, 40
PROMPT = "a photo of a dog"


@dataclass
class Request:
    """A request and what became of it: the SHA-256 of its pixels, or its failure."""

    number: int
    accepted: threading.Event = field(default_factory=threading.Event)
    image: str = ""
    failure: str = ""

    def arguments(self) -> dict:
        # some are done in a moment, some need more steps than the others leave time for
        adapter = {"adapter": "rex", "prompt": "a <rex> dog"} if self.number % 3 == 0 else {"prompt": PROMPT}
        return {**adapter, "steps": 10 + 4 * (self.number % 10), "seed": self.number}


def pixels(data: bytes) -> str:
    """Their SHA-256; the files are marked with the time they were made."""
    with Picture.open(io.BytesIO(data)) as image:
        return hashlib.sha256(image.tobytes()).hexdigest()


def draw(client: mooring.Client, request: Request) -> None:
    """One stream, told apart by how it ends."""
    done = False
    try:
        for event in client.generate(**request.arguments()):
            if isinstance(event, Queued):
                request.accepted.set()
            elif isinstance(event, Image):
                request.accepted.set()
                request.image = pixels(event.data)
            done = done or isinstance(event, Done)
    except errors.MooringError as error:
        request.failure = f"{type(error).__name__} {error.reason}".strip()
    else:
        assert done, "a stream that ended well without its end"
    request.accepted.set()


def draw_batch(client: mooring.Client, requests: dict[str, Request]) -> str:
    """All requests as one call; what the call itself failed with."""
    try:
        for event in client.generate_batch((name, each.arguments()) for name, each in requests.items()):
            each = requests[event.id]
            each.accepted.set()
            if isinstance(event, BatchImage):
                each.image = pixels(event.image.data)
            elif isinstance(event, BatchError):
                each.failure = f"{type(event.error).__name__} {event.error.reason}".strip()
            else:
                assert isinstance(event, BatchDone)
    except errors.MooringError as error:
        return type(error).__name__
    return ""


def until_drawn(client: mooring.Client, request: Request) -> str:
    """What a caller does that does not give up: repeat what is UNAVAILABLE."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return pixels(client.images(**request.arguments())[0].data)
        except errors.UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def photos(folder: Path) -> list[Path]:
    found = []
    for number in range(2):
        found.append(folder / f"{number}.png")
        Picture.new("RGB", (40, 40), (90 * number, 20, 7)).save(found[-1])
    return found


@pytest.mark.parametrize("drain_seconds", [PATIENCE, 0.0], ids=["in peace", "in a hurry"])
def test_sigterm_under_streaming_load_loses_no_accepted_request(
    tiny_sd15: Path, tmp_path: Path, drain_seconds: float
) -> None:
    variables = {
        "MOORING_LISTEN": f"127.0.0.1:{free_port()}",  # the same for the next server: its clients stay
        "MOORING_DRAIN_SECONDS": str(drain_seconds),
        "MOORING_MAX_QUEUE": "256",
        "MOORING_MAX_BATCH_IN_FLIGHT": "4",
        "MOORING_RANK": "8",
        "MOORING_SLOTS": "4",
    }
    streams = [Request(number) for number in range(STREAMS)]
    batch = {f"b{number}": Request(1000 + number) for number in range(BATCH)}
    with (
        Replica(tmp_path / "state", tiny_sd15, variables) as server,
        server.client() as client,
        ThreadPoolExecutor(STREAMS + 2) as pool,
    ):
        client.create_subject("rex", class_noun="dog", rights="owned", photos=photos(tmp_path))
        quick = {"rank": 2, "batch_size": 1, "preview_every": 0, "checkpoint_every": 5}
        client.wait(client.train("rex", steps=2, **quick))
        job = client.train("rex", adapter_id="later", steps=400, **quick)
        watch = client.watch(job, patience=PATIENCE)
        seen = next(event for event in watch if event.phase == "training" and event.step >= 10)
        running = [pool.submit(draw, client, request) for request in streams]
        batching = pool.submit(draw_batch, client, batch)
        for request in streams:
            assert request.accepted.wait(PATIENCE)
        next(iter(batch.values())).accepted.wait(PATIENCE)

        stopped = pool.submit(server.stop)
        for future in running:
            future.result(PATIENCE)
        call_failure = batching.result(PATIENCE)
        assert stopped.result(PATIENCE) == 0
        assert "Traceback" not in server.log()

        # -- accepted means an image or UNAVAILABLE
        ends = Counter(request.failure.partition(" ")[0] or "image" for request in streams)
        assert set(ends) <= {"image", "UnavailableError"}, ends
        told = Counter(request.failure.partition(" ")[0] for request in batch.values() if request.failure)
        assert set(told) <= {"UnavailableError"}, told
        assert call_failure in {"", "UnavailableError"}
        unanswered = [request for request in batch.values() if not request.image and not request.failure]
        if drain_seconds:
            assert ends["image"] == STREAMS
            assert not call_failure
            assert not unanswered
        else:
            assert ends["UnavailableError"], "nothing was cut off: the test shows nothing"
            assert bool(unanswered) <= bool(call_failure), "a call that ended well without all its answers"

        # -- and what was UNAVAILABLE is drawn by the next server, as the job goes on
        server.start()
        repeated = [request for request in (*streams, *batch.values()) if not request.image]
        for request, image in zip(
            repeated, pool.map(lambda r: until_drawn(client, r), repeated), strict=True
        ):
            request.image = image
        fresh = {}
        for request in (*streams[:6], *list(batch.values())[:3], *repeated[:6]):
            fresh[request.number] = until_drawn(client, request)
            assert request.image == fresh[request.number], "an image that depends on the restart"
        assert len(set(fresh.values())) == len(fresh)
        events = list(watch)
        states = [event.job.state for event in events if event.job is not None]
        assert states[0] == job_pb2.JOB_STATE_PENDING, "the job was not handed back"
        assert states[-1] == job_pb2.JOB_STATE_SUCCEEDED
        begins = [
            n for n, event in enumerate(events) if event.job and event.job.state == job_pb2.JOB_STATE_RUNNING
        ]
        resumed = next(event.step for event in events[begins[-1] :] if event.phase == "training")
        assert resumed > seen.step - int(quick["checkpoint_every"]), "the job began anew"
