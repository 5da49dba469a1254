"""A worker: callers who ask for everything at once, and the server's real parts that do it.

Store, objects, sessions, runner, gate and collector are the service's own; only the tensors are pretended, so
that a job takes a fraction of a second: a training is a chain of hashes that shows every lost, repeated or
reordered step, and an image is noise from its prompt and seed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fakes import BASE_DIGEST, FakeTraining, chain, fake_certificate, real_engine, weights_of
from mooring_server.engine.adapters import AdapterWeights, from_safetensors, to_safetensors
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import GenerationRequest, ImageReady
from mooring_server.errors import MooringError
from mooring_server.jobs import train_job
from mooring_server.jobs.batch_job import queue_batch
from mooring_server.jobs.batch_rows import PinnedAdapter, PinnedRow, filename_of, manifest_of
from mooring_server.jobs.runner import JobRunner, RunnerSettings
from mooring_server.jobs.session import JobSession
from mooring_server.jobs.subjects import PhotoUpload, load_photos
from mooring_server.rpc.publishing import judgement
from mooring_server.storage.database import new_id
from mooring_server.storage.garbage import Retention
from mooring_server.storage.models import Adapter, Job, JobState
from mooring_server.storage.objects import ObjectStore, content_key
from mooring_server.storage.store import Store
from PIL import Image

from .place import RIGHTS, TENANT, Place

STEPS = 40
ROWS = 8
JOB_KINDS = {"training": "train", "evaluation": "evaluate", "batch": "batch"}
OPS = ("upload", "import", "train", "evaluate", "batch", "publish")
NO_GRACE = Retention(orphans=0.0, results=1e9, deleted_adapters=0.0)
_WAITING = 3  # unfinished jobs of one kind, beyond which no caller asks for more
_UPLOADS = 80  # photos of one worker's subject
_FIGURES = {
    "adapter_scale": 1.0,
    "subject": "duck",
    "prompts": 12,
    "generic_prompts": 24,
    "dino": 0.77,
    "base_dino": 0.48,
    "generic_clip_t_drop": [0.0006, -0.0004, 0.0017],
    "drift": {"value": 0.13, "low": 0.11, "high": 0.15},
}
BASE = SimpleNamespace(digest=BASE_DIGEST, unet=torch.nn.ModuleDict(), text_encoders=())
BASE.unet["layer"] = torch.nn.Linear(16, 16)


@dataclass(frozen=True)
class Orders:
    """What a worker is to do.

    Attributes:
        seed: of its choices; its requests' numbers begin at a thousand times this.
        focus: what callers ask for most of the time; "" for everything alike.
        produce: whether callers ask for anything new. Without, it ends once all is answered and done.
        seconds: it ends by itself after these.
        file_limit: bytes beyond which no file may grow; 0 for none.
    """

    seed: int
    focus: str = ""
    produce: bool = True
    seconds: float = 120.0
    file_limit: int = 0


def run(place: Place, orders: Orders) -> None:
    """Do it, in a process of its own."""
    log = os.open(place.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format=f"{os.getpid()} %(asctime)s %(message)s", force=True)
    notes = os.open(place.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if orders.file_limit:
        # The notes are not part of what may not grow: a process without the limit writes them.
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=notes)
        notes = writer.stdin.fileno()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (orders.file_limit, orders.file_limit))
    try:
        _run(place, orders, notes)
    except MooringError as error:  # it could not even start: a supervisor would start it again
        logging.getLogger(__name__).warning("no worker: %s", error)
    except Exception as error:
        logging.getLogger(__name__).exception("an untyped fault")
        os.write(notes, (json.dumps({"fault": repr(error)[:300]}) + "\n").encode())
    finally:
        os._exit(0)


def _run(place: Place, orders: Orders, notes: int) -> None:
    train_job.train = training = FakeTraining()
    training.step_seconds = 0.004
    train_job.certificate.build = certificate
    store, objects = place.store(), place.objects()
    # A storm kills more often than a machine does: no job is to be given up for it.
    store.claim_job = functools.partial(store.claim_job, max_crashes=10**6)
    settings = RunnerSettings(
        f"worker-{os.getpid()}", lease_seconds=1.0, poll_seconds=0.05, progress_seconds=0.05
    )
    runner = JobRunner(
        store,
        objects,
        real_engine(),
        BASE,
        None,
        None,
        settings,
        drawer=Drawer(),
        adapters=SimpleNamespace(get=functools.partial(load, objects)),
    )
    runner._works = {**runner._works, "evaluate": Evaluation()}
    runner.start()
    threading.Thread(target=_collect, args=[store, objects], daemon=True).start()
    callers = Callers(place, store, objects, orders, notes)
    end, storm = time.monotonic() + orders.seconds, multiprocessing.parent_process()
    # the storm, not the fork server: that one lives for as long as this process does
    while time.monotonic() < end and storm.is_alive():
        with contextlib.suppress(MooringError):  # a typed refusal: nothing was acknowledged
            if not callers.ask() and all(state.final for _, state in store.count_jobs()):
                break
        time.sleep(0.03)
    runner.stop(10.0)


def _collect(store: Store, objects: ObjectStore) -> None:
    """A collector without any grace, all the while."""
    while True:
        with contextlib.suppress(MooringError):
            for key in store.condemn(list(objects.list()), NO_GRACE):
                objects.delete(key)
        time.sleep(0.3)


def load(objects: ObjectStore, adapter: Adapter) -> AdapterWeights:
    """The adapter as a server reads it. Raises when it is not the one that its row says."""
    weights = from_safetensors(objects.get(adapter.object_key), BASE)
    if weights.digest != adapter.digest:
        raise ValueError(f"{adapter.name} has digest {weights.digest}, its row says {adapter.digest}")
    return weights


def certificate(base: Any, weights: AdapterWeights, drift: Any, *, budget: float | None) -> SimpleNamespace:
    """One that the gate lets pass."""
    made = fake_certificate(base, weights, drift, budget=budget).to_json() | {"relative_max": 0.01}
    return SimpleNamespace(dumps=lambda: json.dumps(made), to_json=lambda: made)


class Evaluation:
    """Stands in for `EvaluateJob`: reads the adapter, some ticks, files, figures."""

    def run(self, session: JobSession) -> None:
        job = session.job
        adapter_id, _, version = job.spec["adapter"].partition("@")
        adapter = session.store.get_adapter(TENANT, adapter_id, int(version))
        load(session.objects, adapter)

        def ticks() -> Iterator[None]:
            for step in range(20):
                session.report({"phase": "drawing", "step": step, "steps": 20})
                time.sleep(0.004)
                yield

        session.drive(ticks(), TaskClass.EVALUATION)
        files = [session.put_artifact(f"{n}.json", "application/json", b'{"n": %d}' % n) for n in range(3)]
        figures = _FIGURES | {"adapter_digest": adapter.digest, "base_digest": adapter.base_digest}
        result = {
            "evaluation": files[0]["object_key"],
            "artifacts": files,
            "metrics": {},
            "figures": figures,
        }
        session.persist(
            lambda: session.store.finish_job(
                job.tenant, job.job_id, job.lease, JobState.SUCCEEDED, result=result
            )
        )


class Drawer:
    """Stands in for the engine where batches draw."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)

    def generate(
        self,
        request: GenerationRequest,
        on_event: Callable[[ImageReady], None],
        *,
        klass: TaskClass,
        tenant: str,
        trace: None,
    ) -> Handle:
        assert (klass, tenant, trace) == (TaskClass.BATCH, TENANT, None)

        def draw() -> None:
            time.sleep(0.02)
            digests = [use.weights.digest for use in request.adapters]
            on_event(ImageReady(0, request.seed, pixels(request.prompt, request.seed, digests)))

        return Handle(self._pool.submit(draw))


class Handle:
    """A task of the drawer."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def cancel(self) -> None:
        """Nothing: it ends soon."""

    def result(self, timeout: float | None = None) -> None:
        return self._future.result(timeout)

    def done(self) -> bool:
        return self._future.done()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._future.add_done_callback(lambda _future: callback(self))


class Callers:
    """Ask for things, note that before and the answer after, and repeat what was never answered."""

    def __init__(self, place: Place, store: Store, objects: ObjectStore, orders: Orders, notes: int) -> None:
        self._place, self._store, self._objects, self._orders = place, store, objects, orders
        self._chance = random.Random(orders.seed)
        self._number = orders.seed * 1000
        self._notes = notes
        self._unanswered = place.unanswered()
        self._uploads = 0

    def ask(self) -> bool:
        """One request, twice, as of a caller who did not hear the first answer; False: nothing to ask."""
        asked = (
            self._unanswered.pop(0) if self._unanswered else self._next() if self._orders.produce else None
        )
        if asked is None:
            return False
        op, number, given = asked["begin"], asked["number"], asked["given"]
        try:
            answers = [getattr(self, f"_{op}")(number, **given) for _ in range(2)]
        except MooringError:
            self._unanswered.append(asked)
            raise
        self._note(done=op, number=number, given=given, answers=answers)
        return True

    def _note(self, **said: Any) -> None:
        os.write(self._notes, (json.dumps(said) + "\n").encode())

    def _next(self) -> dict[str, Any]:
        """The next request, noted as begun."""
        op = self._chance.choice(OPS)
        focus = self._orders.focus
        if focus and self._chance.random() < 0.6:
            op = JOB_KINDS.get(focus, focus)
        given: dict[str, Any] = {}
        if op == "publish":
            given = self._evaluated()
            op = op if given else "evaluate"
        if op == "evaluate":
            given = self._trained()
            op = op if given else "train"
        if op == "batch":
            given = self._trained()
        if op in JOB_KINDS.values():
            counts = self._store.count_jobs()
            if (
                sum(count for (kind, state), count in counts.items() if kind == op and not state.final)
                >= _WAITING
            ):
                op, given = "upload", {}
        if op == "upload":
            self._uploads += 1
            op = op if self._uploads <= _UPLOADS else "import"
        self._number += 1
        asked = {"begin": op, "number": self._number, "given": given}
        self._note(**asked)
        return asked

    def _trained(self) -> dict[str, Any]:
        """A version to evaluate or to draw with; none while there is none."""
        found, _ = self._store.list_adapters(TENANT, adapter_id="duck", page_size=20)
        if not found:
            return {}
        adapter = self._chance.choice(found)
        return {"version": adapter.version, "digest": adapter.digest}

    def _evaluated(self) -> dict[str, Any]:
        """A version that the gate will let pass."""
        jobs, _ = self._store.list_jobs(TENANT, kinds=["evaluate"], states=[JobState.SUCCEEDED], page_size=20)
        if not jobs:
            return {}
        job = self._chance.choice(jobs)
        version = int(job.spec["adapter"].partition("@")[2])
        return {"version": version, "digest": job.result["figures"]["adapter_digest"]}

    # -- the requests: equal numbers and arguments are equal requests -------------------------------------

    def _upload(self, number: int) -> str:
        subject = f"album{number // 1000}"
        self._store.create_subject(
            TENANT, subject, class_noun="bird", placeholder="<album>", rights=RIGHTS, request_id=subject
        )
        upload = PhotoUpload(self._store, self._objects, TENANT, subject)
        upload.add(f"{number}.png", png(number))
        return upload.commit()[0][0].object_key

    def _import(self, number: int) -> str:
        weights = weights_of(hashlib.sha256(b"import %d" % number).hexdigest())
        data = to_safetensors(weights)
        key = content_key(f"adapters/{new_id()}", data, "safetensors")
        self._objects.put(key, data)
        return self._store.publish_adapter(
            TENANT,
            f"import{number}",
            object_key=key,
            digest=weights.digest,
            base_digest=BASE_DIGEST,
            rank=1,
            size_bytes=len(data),
            class_noun="",
            placeholder="",
            rights=RIGHTS,
            certificate={},
            summary={},
            request_id=f"import-{number}",
        ).object_key

    def _train(self, number: int) -> str:
        config = {"steps": STEPS, "preview_every": 20, "seed": number % 256}
        spec = {"subject": "duck", "adapter_id": "duck", "config": config}
        return self._store.create_job(TENANT, "train", spec, request_id=f"train-{number}").job_id

    def _evaluate(self, number: int, version: int, digest: str) -> str:
        del digest
        spec = {"adapter": f"duck@{version}", "subject": "duck", "config": {}}
        return self._store.create_job(TENANT, "evaluate", spec, request_id=f"evaluate-{number}").job_id

    def _batch(self, number: int, version: int = 0, digest: str = "") -> str:
        rows = rows_of(number, version, digest)
        spec = {"filename": f"{number}.jsonl", "rows": len(rows), "base_digest": BASE_DIGEST}
        spec |= {"version": version, "digest": digest}
        queued = queue_batch(self._store, self._objects, TENANT, rows, spec, request_id=f"batch-{number}")
        return queued.job_id

    def _publish(self, number: int, version: int, digest: str) -> str:
        del digest
        _, decision = self._store.publish_alias(
            TENANT,
            "duck",
            version,
            "live",
            judge=judgement,
            actor="chaos",
            request_id=f"publish-{number}",
        )
        return decision.decision_id


# -- what an undisturbed run gives ---------------------------------------------------------------------------


def png(number: int) -> bytes:
    """A photo that no other number has."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 256, number // 256 % 256, number // 65_536 % 256)).save(file, "PNG")
    return file.getvalue()


def pixels(prompt: str, seed: int, digests: list[str]) -> np.ndarray:
    """The image of a row."""
    state = hashlib.sha256(json.dumps([prompt, seed, digests]).encode()).digest()
    return np.frombuffer(state * 24, np.uint8).reshape(16, 16, 3)


def rows_of(number: int, version: int, digest: str) -> list[PinnedRow]:
    """The rows of a batch; half of them with an adapter, where there is one."""
    use = (PinnedAdapter("duck", version, digest, 1.0),) if version else ()
    return [
        PinnedRow(
            row=row,
            id=f"{number}-{row}",
            prompt="a bird",
            negative_prompt="",
            adapters=use if row % 2 else (),
            steps=4,
            guidance_scale=3.0,
            width=16,
            height=16,
            seed=number * 100 + row,
            sampler="ddim",
        )
        for row in range(1, ROWS + 1)
    ]


def records_of(job: Job) -> list[dict[str, Any]]:
    """The manifest that this batch has to end with, but for the files' bytes: each signature differs."""
    records = []
    number = int(job.spec["filename"].partition(".")[0])
    for row in rows_of(number, job.spec["version"], job.spec["digest"]):
        image = pixels(row.prompt, row.seed, [use.digest for use in row.adapters])
        drawn = {"file": filename_of(row.row), "pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest()}
        records.append(manifest_of(row, BASE_DIGEST) | drawn)
    return records


def trained_digest(photos: list[bytes], job: Job) -> str:
    """Of the adapter that this training has to end with."""
    return weights_of(chain(photos, STEPS, job.spec["config"]["seed"])).digest


def settle(place: Place) -> None:
    """Make the subject that trainings learn; it gets no more photos, so that their digests are known."""
    store, objects = place.store(), place.objects()
    store.create_subject(TENANT, "duck", class_noun="bird", placeholder="<duck>", rights=RIGHTS)
    upload = PhotoUpload(store, objects, TENANT, "duck")
    upload.add("first.png", png(0))
    upload.commit()
    store.close()


def photos_of(store: Store, objects: ObjectStore) -> list[bytes]:
    """Of that subject."""
    return [image.tobytes() for image in load_photos(store, objects, TENANT, "duck")]
