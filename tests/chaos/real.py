"""A real server (gRPC, engine, a tiny base, judges) that is killed while a client uses all of it.

The client repeats every call with its `request_id` until it is answered, as the shipped one does when a
server is away. What the storage scenarios pretend is real here: the server's start, its networks, training,
drawing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import random
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, partialmethod
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
import mooring
import mooring_server.server
from mooring import errors
from mooring_server.config import Settings
from mooring_server.engine.adapters import from_safetensors
from mooring_server.engine.base import load_base
from mooring_server.storage.garbage import Retention, collect
from mooring_server.storage.models import Job, JobState
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store
from mooring_server.storage.verify import verify
from PIL import Image
from tiny_bases import save_tiny_sd
from tiny_judges import save_tiny_clip, save_tiny_vit

from .checks import orphans
from .place import pages
from .table import Row

TENANT = "local"
PATIENCE = 300.0
_AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
SEEDS = 3  # trainings and batches that differ; equal ones must end equal
TRAINING = {
    "steps": 24,
    "rank": 2,
    "batch_size": 1,
    "checkpoint_every": 4,
    "preview_every": 8,
    "fixed_strength": 0.001,
}
ROWS = "".join(f'{{"prompt": "a photo of a duck", "steps": 4, "seed": {seed}}}\n' for seed in range(8))


def serve(settings: dict[str, Any]) -> None:
    """A server, in a process of its own; it does not outlive the one that asked for it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # A storm kills more often than a machine does: no job is to be given up for it.
    Store.claim_job = partialmethod(Store.claim_job, max_crashes=10**6)
    log = os.open(settings["state_dir"].parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    asyncio.run(mooring_server.server.serve(Settings(**settings)))


@dataclass
class World:
    """Where the server keeps its state, and how to reach it.

    Attributes:
        folder: of everything.
        target: host:port, the same after every start.
        settings: of the server.
        answered: op → resource name by request number.
        faults: what calls said beside "the server is away".
    """

    folder: Path
    target: str
    settings: dict[str, Any]
    answered: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    faults: list[str] = field(default_factory=list)

    @staticmethod
    def make(folder: Path) -> World:
        """Save the networks and choose a port."""
        from transformers import CLIPTokenizer

        base = save_tiny_sd(folder / "base")
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            target = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "base": str(base),
            "state_dir": folder / "state",
            "listen": target,
            "metrics_listen": "",
            "clip_judge": str(save_tiny_clip(folder / "clip", tokenizer)),
            "dino_judge": str(save_tiny_vit(folder / "dino")),
            "lease_seconds": 2.0,
            "threads": 1,
            "rank": 4,
            "slots": 4,
        }
        return World(folder, target, settings)

    def store(self, clock: Callable[[], float] | None = None) -> Store:
        """Its database."""
        return Store(f"sqlite:///{self.settings['state_dir']}/mooring.db", clock=clock)

    def objects(self) -> LocalObjects:
        """Its objects."""
        return LocalObjects(self.settings["state_dir"] / "objects")


class Client(threading.Thread):
    """Asks for one thing after another until it is told to stop, and repeats what was not answered."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()
        self._world, self._chance = world, random.Random(seed)
        self._client = mooring.Client(world.target)

    def run(self) -> None:
        try:
            photos = [("photo.png", _photo())]
            self._call(
                lambda request_id: self._client.create_subject(
                    "duck", class_noun="duck", rights="owned", request_id=request_id
                ),
                "subject",
                0,
            )
            self._call(lambda _: self._client.upload_photos("duck", photos).subject, "upload", 0)
            self._call(lambda _: self._client.update_gate_policy(mode="warn"), "policy", 0)
            number = 0
            while not self.stopping.is_set():
                number += 1
                self._next(number)
        except Exception as error:  # noqa: BLE001 - shown in the table
            self._world.faults.append(repr(error)[:300])

    def _next(self, number: int) -> None:
        unfinished = self._call(lambda _: list(self._client.list_jobs()), "", 0)
        if sum(job.state <= 2 for job in unfinished) > 4:  # pending, running
            time.sleep(0.2)
            return
        kind = self._chance.choice(("train", "evaluate", "batch", "publish", "upload", "generate"))
        adapters = self._call(lambda _: list(self._client.list_adapters()), "", 0)
        if kind in {"evaluate", "publish"} and not adapters:
            kind = "train"
        client, chosen = self._client, self._chance.choice(adapters) if adapters else None
        calls: dict[str, Callable[[str], Any]] = {
            "train": lambda request_id: client.train(
                "duck",
                adapter_id=f"seed{number % SEEDS}",
                seed=number % SEEDS,
                request_id=request_id,
                **TRAINING,
            ),
            "evaluate": lambda request_id: client.evaluate(
                chosen,
                prompts=["a photo of a {}"],
                generic_prompts=["a photo of a car"],
                seeds=[0],
                steps=1,
                class_samples=0,
                request_id=request_id,
            ),
            "batch": lambda request_id: client.run_batch(
                ("rows.jsonl", ROWS.encode()), request_id=request_id
            ),
            "publish": lambda request_id: client.publish_adapter(chosen, request_id=request_id).decision,
            "upload": lambda request_id: client.create_subject(
                f"album{number}",
                class_noun="toy",
                rights="owned",
                photos=[_photo(number)],
                request_id=request_id,
            ),
            "generate": lambda _: client.images("a photo of a duck", steps=2, seed=number),
        }
        self._call(calls[kind], "" if kind == "generate" else kind, number)

    def _call(self, call: Callable[[str], Any], op: str, number: int) -> Any:
        """Repeat until answered; then once more, as a client does that did not hear it."""
        request_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{op}-{number}"))
        # several kills may come before an answer, each followed by the whole start of a server
        deadline = time.monotonic() + 10 * PATIENCE
        for _ in range(2 if op else 1):
            while True:
                try:
                    answer = call(request_id)
                    break
                except errors.MooringError as error:
                    if error.code not in _AGAIN or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            if op and self._world.answered[op].setdefault(number, answer.name) != answer.name:
                self._world.faults.append(f"{op} {number} was answered twice with different resources")
        return answer


def _photo(number: int = 0) -> bytes:
    image = Image.new("RGB", (48, 40), (40, 200 - number % 200, number // 200 % 256))
    image.paste((250, 250, 10), (5, 5, 20, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def kills(folder: Path, times: int, seed: int, start: Callable[..., BaseProcess]) -> Row:
    """kill -9 of the server at random instants; every fifth one while it starts.

    Args:
        folder: for everything.
        times: kills.
        seed: of their instants and of what the client asks for.
        start: makes a process of a function and its arguments.
    """
    row, chance, world = Row("kill -9, a real server over gRPC"), random.Random(seed), World.make(folder)
    server = start(serve, world.settings)
    client = Client(world, seed)
    client.start()
    if not _until(partial(_draws, world), PATIENCE):
        raise AssertionError((folder / "log").read_text()[-2000:])
    store, held = world.store(), {}
    waited_for, started = 0, time.monotonic()
    for time_ in range(times):
        if time_ % 5 != 4:
            if waited_for and _goes_on(world, store, held):
                row.recovered += waited_for
                row.seconds.append(time.monotonic() - started)
                waited_for = 0
            _until(lambda: bool(_running(store)), 20.0)
        time.sleep(chance.uniform(0.0, 2.0))
        row.struck += bool(_running(store))
        server.kill()
        server.join()
        row.times += 1
        waited_for += 1
        held = _running(store)
        _look(world, store, row)
        server, started = start(serve, world.settings), time.monotonic()
    if _goes_on(world, store, held):
        row.recovered += waited_for
        row.seconds.append(time.monotonic() - started)
    client.stopping.set()
    client.join(PATIENCE)
    # the same once more, with nobody in its way
    with mooring.Client(world.target) as calm:
        for number in range(SEEDS):
            calm.train("duck", adapter_id=f"seed{number}", seed=number, **TRAINING)
        calm.run_batch(("rows.jsonl", ROWS.encode()))
    _until(lambda: all(job.state.final for job in pages(store.list_jobs, TENANT)), PATIENCE)
    server.terminate()
    server.join()
    _look(world, store, row, finished=True)
    later = world.store(clock=lambda: time.time() + 10)
    row.collected = len(collect(later, world.objects(), Retention(0.0, 1e9, 0.0)).keys)
    later.close()
    _look(world, store, row, finished=True)
    store.close()
    return row


def _until(condition: Callable[[], bool], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _running(store: Store) -> dict[str, str]:
    return {job.job_id: job.lease for job in pages(store.list_jobs, TENANT, states=[JobState.RUNNING])}


def _draws(world: World) -> bool:
    with contextlib.suppress(errors.MooringError), mooring.Client(world.target) as client:
        return bool(client.images("a photo of a duck", steps=1))
    return False


def _goes_on(world: World, store: Store, held: dict[str, str]) -> bool:
    """Wait until an image is drawn and the interrupted jobs run again or have ended."""

    def taken_over() -> bool:
        for job_id, lease in held.items():
            job = store.get_job(TENANT, job_id)
            if not job.state.final and (job.state is not JobState.RUNNING or job.lease == lease):
                return False
        return True

    return _until(partial(_draws, world), PATIENCE) and _until(taken_over, PATIENCE)


def _pictures(objects: LocalObjects, job: Job) -> str:
    """What a batch drew, without the files' signatures, each of which differs."""
    (artifact,) = job.result["artifacts"]
    records = [json.loads(line) for line in objects.get(artifact["object_key"]).splitlines()]
    return " ".join(f"{record['row']}:{record.get('pixels_sha256', 'none')[:8]}" for record in records)


def _look(world: World, store: Store, row: Row, *, finished: bool = False) -> None:
    objects = world.objects()
    for fault in world.faults:
        row.found("lost", f"a call failed: {fault}")
    jobs = {job.job_id: job for job in pages(store.list_jobs, TENANT)}
    adapters = list(pages(store.list_adapters, TENANT))
    subjects = {subject.subject_id for subject in pages(store.list_subjects, TENANT)}
    decisions = {decision.decision_id for decision in pages(store.list_gate_decisions, TENANT)}
    row.acknowledged = sum(map(len, world.answered.values()))
    row.jobs, row.takeovers = len(jobs), sum(max(0, job.attempts - 1) for job in jobs.values())
    there = {"subject": subjects, "upload": subjects, "publish": decisions}
    for op, names in list(world.answered.items()):
        for name in list(names.values()):
            if op != "policy" and name.rpartition("/")[2] not in there.get(op, jobs.keys()):
                row.found("lost", f"{op} was answered with {name}, which is not there")
    found = verify(store, objects)
    for key in found.missing:
        row.found("lost", f"a row names {key}, which is not there")
    for key in found.damaged:
        row.found("half", key)
    digests: dict[str, set[str]] = defaultdict(set)
    for adapter in adapters:
        digests[adapter.adapter_id].add(adapter.digest)
    for job in jobs.values():
        if job.state is JobState.FAILED:
            row.found("lost", f"{job.kind} {job.job_id} failed: {job.error}")
        elif job.state is JobState.SUCCEEDED:
            if job.kind == "train" and sum(adapter.job_id == job.job_id for adapter in adapters) != 1:
                row.found("half", f"{job.job_id} succeeded without its adapter")
            if job.kind == "batch":
                digests["batch"].add(_pictures(objects, job))
            for artifact in job.result["artifacts"]:
                if not objects.exists(artifact["object_key"]):
                    row.found(
                        "lost", f"{job.kind} {job.job_id} made {artifact['filename']}, which is not there"
                    )
        elif finished:
            row.found("lost", f"{job.kind} {job.job_id} is still {job.state}")
    for what, different in digests.items():
        if len(different) > 1:
            row.found("half", f"{what}: runs that are equal ended with {sorted(different)}")
    with store.reading() as connection:
        for problem in orphans(connection):
            row.found("orphans", problem)
    if finished:
        base = load_base(world.settings["base"], threads=1)
        for adapter in adapters:
            if from_safetensors(objects.get(adapter.object_key), base).digest != adapter.digest:
                row.found("half", f"{adapter.name} is not what its row says")
        calm = {"train": SEEDS, "batch": 1}
        for kind in ("train", "evaluate", "batch"):
            asked = len(world.answered[kind]) + calm.get(kind, 0)
            made = sum(job.kind == kind for job in jobs.values())
            if made != asked:
                row.found("double" if made > asked else "lost", f"{asked} requests of {kind} made {made}")
