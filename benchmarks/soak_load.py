"""The mixed load of `benchmarks.soak`: what several customers do with one server, all at once, for hours.

Each kind of work is a thread of its own that repeats itself, at random from a fixed seed, until it is told to
stop. What it makes it deletes again, so that the server holds as much at the end as at the begin.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mooring
from mooring import errors
from mooring_server.engine.adapters import LORA_FILE
from safetensors.numpy import load, save

ADAPTERS = 24
"""More than the server's slots, so that they are swapped all the time."""
SUBJECT = "soak"
RESTS = (1.0, 4.0)
"""How long a caller rests, as a multiple of what its work took: jobs get what interactive callers leave, and
without rests, on a slow machine, that is too little for any to end."""
WORKERS: Mapping[str, int] = {
    "interactive": 2,
    "batch": 1,
    "uploads": 1,
    "jobs": 1,
    "imports": 1,
    "leaving": 1,
    "dropping": 1,
}
"""Threads of each kind of work."""


@dataclass
class Load:
    """Runs the work of `WORKERS` against a server.

    Args:
        target: the server.
        prompts: that the base can read.
        photos: of the subject, as files.
        adapter: a file of factors, as diffusers has it.
        workers: threads of each kind of work.
        seed: of everything random.

    Attributes:
        done: finished pieces of work by kind.
        failed: failures that were not asked for, by kind and reason.
    """

    target: str
    prompts: Sequence[str]
    photos: Sequence[tuple[str, bytes]]
    adapter: bytes
    workers: Mapping[str, int] = field(default_factory=lambda: WORKERS)
    seed: int = 1
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Make what the work refers to, then begin it."""
        with mooring.Client(self.target) as client:
            client.create_subject(SUBJECT, class_noun="dog", rights="owned", photos=self.photos)
            for number in range(ADAPTERS):
                client.import_adapter(f"a{number}", varied(self.adapter, number), rights="owned")
        for kind, count in self.workers.items():
            for index in range(count):
                work: Callable[[mooring.Client, random.Random], None] = getattr(self, f"_{kind}")
                name = f"{kind}-{index}"
                thread = threading.Thread(target=self._repeat, args=(kind, work, name), name=name)
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """Let every thread finish what it is at; jobs, which would take a minute, are cancelled."""
        self._stop.set()
        with contextlib.suppress(errors.MooringError), mooring.Client(self.target) as client:
            while alive := [thread for thread in self._threads if thread.is_alive()]:
                for job in (*client.list_jobs(state="pending"), *client.list_jobs(state="running")):
                    with contextlib.suppress(errors.FailedPreconditionError):  # it has just ended
                        client.cancel_job(job)
                alive[0].join(1.0)
        for thread in self._threads:  # the server has died: their calls fail by themselves
            thread.join()

    def _repeat(self, kind: str, work: Callable[[mooring.Client, random.Random], None], name: str) -> None:
        rng = random.Random(f"{self.seed}-{name}")
        with mooring.Client(self.target) as client:
            while not self._stop.is_set():
                begin = time.monotonic()
                try:
                    work(client, rng)
                    self.done[kind] += 1
                    if kind != "jobs":
                        self._stop.wait(max(0.5, rng.uniform(*RESTS) * (time.monotonic() - begin)))
                except errors.JobFailedError as error:
                    if not self._stop.is_set():
                        self.failed[f"{kind}: {error.reason or error}"] += 1
                except errors.MooringError as error:
                    self.failed[f"{kind}: {error.reason or type(error).__name__}"] += 1
                    self._stop.wait(1.0)
                except Exception as error:  # noqa: BLE001 - a thread that ended would be load that is missing
                    self.failed[f"{kind}: {type(error).__name__}: {error}"] += 1
                    self._stop.wait(1.0)

    def _request(self, rng: random.Random, *, most: int = 6) -> dict[str, Any]:
        number = rng.randrange(ADAPTERS + 4)
        adapter = {"adapter": f"a{number}"} if number < ADAPTERS else {}
        size = rng.choice([None, None, 48])
        return {
            "prompt": rng.choice(self.prompts),
            "steps": rng.randint(1, most),
            "seed": rng.randrange(1000),
            "sampler": rng.choice(["ddim", "euler", "dpmpp_2m"]),
            "guidance_scale": rng.choice([1.0, 4.0]),
            **({"width": size, "height": size} if size else {}),
            **adapter,
        }

    # ------------------------------------------------------------------ kinds of work

    def _interactive(self, client: mooring.Client, rng: random.Random) -> None:
        client.images(**self._request(rng), preview_interval=rng.choice([None, 2]))

    def _batch(self, client: mooring.Client, rng: random.Random) -> None:
        numbers = itertools.takewhile(lambda _: not self._stop.is_set(), range(12))
        requests = ((f"r{number}", self._request(rng, most=3)) for number in numbers)
        for _ in client.generate_batch(requests):
            pass

    def _uploads(self, client: mooring.Client, rng: random.Random) -> None:
        name = f"up-{rng.getrandbits(40):x}"
        client.create_subject(name, class_noun="cat", rights="owned", photos=self.photos)
        list(client.list_subjects())
        client.delete_subject(name)

    def _jobs(self, client: mooring.Client, rng: random.Random) -> None:
        name = f"job-{rng.getrandbits(40):x}"
        train = client.train(
            SUBJECT,
            adapter_id=name,
            steps=6,
            rank=4,
            batch_size=1,
            preview_every=3,
            checkpoint_every=2,
        )
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0.0, 2.0))
            with contextlib.suppress(errors.FailedPreconditionError):  # it had ended
                client.cancel_job(train)
            with contextlib.suppress(errors.JobFailedError):
                client.delete_adapter(client.wait(train).adapter)
            return
        client.wait(train)
        evaluation = client.evaluate(
            name,
            prompts=["a photo of a {}"],
            generic_prompts=list(self.prompts[:2]),
            seeds=[rng.randrange(1000)],
            steps=2,
            class_samples=0,
        )
        client.wait(evaluation)
        client.get_evaluation(evaluation)
        client.delete_adapter(name)

    def _imports(self, client: mooring.Client, rng: random.Random) -> None:
        name = f"imp-{rng.getrandbits(40):x}"
        client.import_adapter(name, varied(self.adapter, rng.randrange(10**6)), rights="licensed")
        client.images(**{**self._request(rng, most=2), "adapter": name})
        client.export_adapter(name)
        client.delete_adapter(name)

    def _leaving(self, client: mooring.Client, rng: random.Random) -> None:
        """Cancels in the middle of a stream."""
        events = client.generate(**{**self._request(rng), "steps": 20})
        for _, _ in zip(range(rng.randint(1, 4)), events, strict=False):
            pass
        events.close()  # type: ignore[attr-defined]

    def _dropping(self, _client: mooring.Client, rng: random.Random) -> None:
        """Breaks a connection with calls on it, one of them an upload that never ends."""
        relay = Relay(self.target)
        with mooring.Client(relay.target) as other:
            events = [other.generate(**{**self._request(rng), "steps": 20}) for _ in range(3)]
            for each in events:
                next(each)
            upload = threading.Thread(target=_half_upload, args=(other, self.photos[0]), name="half-upload")
            upload.start()
            time.sleep(rng.uniform(0.05, 0.3))
            if rng.random() < 0.5:
                relay.cut()  # as a cable does
        relay.cut()  # after its client has said goodbye
        upload.join()


class Relay:
    """Passes one connection on to a server. gRPC's clients of a process share one; this one breaks alone.

    Args:
        server: "host:port" that it leads to.

    Attributes:
        target: "host:port" to connect to.
    """

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30.0)
        self.target = "127.0.0.1:{1}".format(*self._listener.getsockname())
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay")
        self._thread.start()

    def cut(self) -> None:
        """Reset both ends, and take no connection again."""
        self._cut.set()
        self._thread.join()

    def _run(self) -> None:
        with self._listener:
            near, _ = self._listener.accept()
        with near, socket.create_connection(self._server) as far:
            other = {near: far, far: near}
            with contextlib.suppress(OSError):  # the client or the server has gone
                while not self._cut.is_set():
                    for end in select.select([near, far], [], [], 0.05)[0]:
                        data = end.recv(2**16)
                        if not data:
                            return
                        other[end].sendall(data)
            for end in other:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def varied(adapter: bytes, number: int) -> list[tuple[str, bytes]]:
    """Another adapter of the same size: equal ones would share a slot."""
    tensors = {
        key: (values * (1.0 + number / 1000)).astype(values.dtype) for key, values in load(adapter).items()
    }
    return [(LORA_FILE, save(tensors, metadata={"format": "pt"}))]


def _half_upload(client: mooring.Client, photo: tuple[str, bytes]) -> None:
    """Announces a photo, sends its begin, and says nothing more."""
    from mooring import _requests

    def messages() -> Iterator[Any]:
        whole = _requests.upload_messages(SUBJECT, [(photo[0], photo[1])])
        yield next(whole)
        yield next(whole)
        time.sleep(1.0)

    with contextlib.suppress(Exception):  # whatever the closed connection makes of it
        client._subjects.UploadPhotos(messages(), timeout=5.0)  # noqa: SLF001 - half a call is no call of the client's
