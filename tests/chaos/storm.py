"""Chaos over the storage: work goes on while things break, and afterwards nothing is lost, half or double.

Each trial forks a worker that uploads photos, imports adapters and runs training and evaluation jobs through
the real store, objects, sessions and runner; only the tensors are pretended, so that a trial takes a second.
Every acknowledgement is noted in a file. The parent breaks something at a random instant, then checks:

- lost: what was acknowledged is there, every object that a row names reads back with the digest of its key;
- half: no succeeded job without its adapter, none with another digest than an undisturbed run gives;
- double: no job with two adapters, no request answered twice with different resources.

At the end an undisturbed worker finishes every job, the collector runs without any grace, and all is checked
again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "jobs"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fakes import FakeTraining, chain, fake_certificate, real_engine, weights_of  # noqa: E402
from faulty_s3 import Faults, faulty  # noqa: E402
from mooring_server.engine.policy import TaskClass  # noqa: E402
from mooring_server.errors import MooringError  # noqa: E402
from mooring_server.jobs import train_job  # noqa: E402
from mooring_server.jobs.runner import JobRunner, RunnerSettings  # noqa: E402
from mooring_server.jobs.session import JobSession  # noqa: E402
from mooring_server.jobs.subjects import PhotoUpload, load_photos  # noqa: E402
from mooring_server.storage.garbage import Retention, collect  # noqa: E402
from mooring_server.storage.models import JobState  # noqa: E402
from mooring_server.storage.objects import LocalObjects, ObjectStore, content_key  # noqa: E402
from mooring_server.storage.store import Store  # noqa: E402
from PIL import Image  # noqa: E402
from servers import Postgres, moto  # noqa: E402

RIGHTS = {"basis": "OWNED"}
STEPS = 40
PATIENCE = 300.0


@dataclass
class Row:
    """One line of the table."""

    name: str
    trials: int = 0
    acknowledged: int = 0
    jobs: int = 0
    takeovers: int = 0
    orphans: int = 0
    problems: list[str] = field(default_factory=list)


class FakeEvaluation:
    """Stands in for `EvaluateJob`: some ticks, files, the end."""

    def run(self, session: JobSession) -> None:
        def ticks() -> Iterator[None]:
            for step in range(10):
                session.report({"phase": "drawing", "step": step, "steps": 10})
                time.sleep(0.002)
                yield

        session.drive(ticks(), TaskClass.EVALUATION)
        files = [session.put_artifact(f"{n}.json", "application/json", b'{"n": %d}' % n) for n in range(3)]
        result = {"evaluation": files[0]["object_key"], "artifacts": files, "metrics": {}}
        job = session.job
        session.persist(
            lambda: session.store.finish_job(
                job.tenant, job.job_id, job.lease, JobState.SUCCEEDED, result=result
            )
        )


class Place:
    """A database and objects that workers and the parent open for themselves."""

    def __init__(self, folder: Path, url: str, objects: Callable[[], ObjectStore]) -> None:
        self.folder, self.url, self.objects = folder, url, objects
        self.notes = folder / "acknowledged"
        self.notes.touch()
        store = Store(url)
        store.create_subject("acme", "duck", class_noun="bird", placeholder="<duck>", rights=RIGHTS)
        upload = PhotoUpload(store, objects(), "acme", "duck")
        upload.add("first.png", _png(0))
        upload.commit()
        # The jobs' subject gets no more photos, so that one digest is right for all of them.
        store.create_subject("acme", "album", class_noun="bird", placeholder="<album>", rights=RIGHTS)
        photos = [image.tobytes() for image in load_photos(store, objects(), "acme", "duck")]
        self.digest = weights_of(chain(photos, STEPS, 0)).digest
        store.close()


def _png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 256, number // 256 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def worker(place: Place, seed: int, *, produce: bool, seconds: float) -> None:
    """Do everything at once until `seconds` are over; never returns."""
    fake = FakeTraining()
    fake.step_seconds = 0.004
    train_job.train = fake
    train_job.certificate.build = fake_certificate
    store, objects = Store(place.url), place.objects()
    engine = real_engine()
    # A storm kills more often than a machine does: no job is to be given up for it.
    store.claim_job = functools.partial(store.claim_job, max_crashes=10**6)
    paces = {"lease_seconds": 1.0, "poll_seconds": 0.05, "progress_seconds": 0.05}
    settings = RunnerSettings(f"worker-{os.getpid()}", **paces)
    runner = JobRunner(store, objects, engine, None, None, None, settings)
    runner._works = {**runner._works, "evaluate": FakeEvaluation()}
    runner.start()
    end = time.monotonic() + seconds
    number = seed * 1000
    notes = os.open(place.notes, os.O_WRONLY | os.O_APPEND)

    def note(**said: object) -> None:
        os.write(notes, (json.dumps(said) + "\n").encode())

    while time.monotonic() < end:
        number += 1
        try:
            if produce:
                _produce(store, objects, number, note)
            elif all(job.state.final for job in store.list_jobs("acme", page_size=1000)[0]):
                break
        except MooringError:
            pass  # a typed refusal: nothing was acknowledged
        time.sleep(0.02)
    runner.stop(10.0)
    os._exit(0)


def _produce(store: Store, objects: ObjectStore, number: int, note: Callable[..., None]) -> None:
    upload = PhotoUpload(store, objects, "acme", "album")
    if number % 1000 < 90:
        upload.add(f"{number}.png", _png(number))
        photos, _ = upload.commit()
        note(photo=photos[0].sha256)
    data = b"imported %d" % number
    key = content_key(f"adapters/import{number}", data, "safetensors")
    objects.put(key, data)
    for _ in range(2):  # repeated, as a client does that did not hear the answer
        made = store.publish_adapter(
            "acme",
            f"import{number}",
            object_key=key,
            digest=f"sha256:{number:064x}",
            base_digest="sha256:" + "b" * 64,
            rank=1,
            size_bytes=len(data),
            class_noun="",
            placeholder="",
            rights=RIGHTS,
            certificate={},
            summary={},
            request_id=f"import-{number}",
        )
        note(adapter=made.name, object_key=made.object_key)
    config = {"steps": STEPS, "preview_every": 20}
    spec = {"subject": "duck", "adapter_id": "duck", "config": config}
    if number % 1000 in {2, 6}:
        note(job=store.create_job("acme", "train", spec, request_id=f"train-{number}").job_id)
    if number % 1000 == 3:
        spec = {"adapter": "", "subject": "duck", "config": {}}
        note(job=store.create_job("acme", "evaluate", spec, request_id=f"evaluate-{number}").job_id)


def fork(place: Place, seed: int, *, produce: bool = True, seconds: float = 3.0, limit: int = 0) -> int:
    """Start a worker; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        worker(place, seed, produce=produce, seconds=seconds)
    finally:
        os._exit(1)


def check(place: Place, row: Row, *, finished: bool = False) -> None:
    """Look for what is lost, half or double."""
    store, objects = Store(place.url), place.objects()
    try:
        said = [json.loads(line) for line in place.notes.read_text().splitlines()]
        row.acknowledged = len(said)
        photos = {photo.sha256: photo for name in ("duck", "album") for photo in store.photos("acme", name)}
        adapters = {}
        token = ""
        while True:
            page, token = store.list_adapters("acme", page_size=1000, page_token=token)
            adapters |= {adapter.name: adapter for adapter in page}
            if not token:
                break
        jobs = {job.job_id: job for job in store.list_jobs("acme", page_size=1000)[0]}
        for one in said:
            if "photo" in one and one["photo"] not in photos:
                row.problems.append(f"lost photo {one['photo'][:8]}")
            if "job" in one and one["job"] not in jobs:
                row.problems.append(f"lost job {one['job']}")
            if "adapter" in one:
                found = adapters.get(one["adapter"])
                if found is None:
                    row.problems.append(f"lost {one['adapter']}")
                elif found.object_key != one["object_key"]:
                    row.problems.append(f"two answers for {one['adapter']}")
        for key in [row_.object_key for row_ in (*photos.values(), *adapters.values())]:
            try:
                objects.get(key)
            except (KeyError, MooringError):
                row.problems.append(f"a row names {key}, which is not whole")
        made = [adapter.job_id for adapter in adapters.values() if adapter.job_id]
        if len(made) != len(set(made)):
            row.problems.append("a job with two adapters")
        if any(a.version > 1 and a.adapter_id.startswith("import") for a in adapters.values()):
            row.problems.append("an import with two versions")
        for job in jobs.values():
            if job.state is JobState.FAILED:
                row.problems.append(f"failed: {job.kind} {job.error}")
            elif job.state is JobState.SUCCEEDED and job.kind == "train":
                if job.result["digest"] != place.digest:
                    row.problems.append(f"job {job.job_id} has another digest")
                if job.job_id not in made:
                    row.problems.append(f"job {job.job_id} succeeded without its adapter")
            elif finished and not job.state.final:
                row.problems.append(f"job {job.job_id} is still {job.state}")
        row.jobs = len(jobs)
        row.takeovers = sum(max(0, job.attempts - 1) for job in jobs.values())
    finally:
        store.close()


def finish(place: Place, row: Row) -> None:
    """Undisturbed, to the end; then the collector without any grace."""
    pid = fork(place, 999, produce=False, seconds=PATIENCE)
    os.waitpid(pid, 0)
    check(place, row, finished=True)
    store = Store(place.url, clock=lambda: time.time() + 10)
    row.orphans = len(collect(store, place.objects(), Retention(0.0, 1e9, 0.0)).keys)
    store.close()
    check(place, row, finished=True)


def _settle(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def kills(place: Place, trials: int, seed: int, name: str) -> Row:
    """kill -9 at random instants."""
    row, chance = Row(name), random.Random(seed)
    for trial in range(trials):
        pid = fork(place, seed * 100 + trial, seconds=60.0)
        if trial % 4:  # the others die while they start
            _until_it_works(place)
        time.sleep(chance.uniform(0.0, 1.2))
        _settle([pid])
        check(place, row)
        row.trials += 1
    finish(place, row)
    return row


def _until_it_works(place: Place) -> None:
    before, deadline = place.notes.stat().st_size, time.monotonic() + 30.0
    while place.notes.stat().st_size == before and time.monotonic() < deadline:
        time.sleep(0.01)


def frozen(place: Place, trials: int, seed: int) -> Row:
    """Two replicas on the same jobs; each freezes longer than its lease and wakes up again."""
    row, chance = Row("two replicas, frozen in turn"), random.Random(seed)
    pids = [fork(place, seed * 100 + n, seconds=120.0) for n in range(2)]
    _until_it_works(place)
    for _ in range(trials):
        time.sleep(chance.uniform(0.1, 0.5))
        victim = chance.choice(pids)
        os.kill(victim, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(victim, signal.SIGCONT)
        row.trials += 1
    _settle(pids)
    check(place, row)
    finish(place, row)
    return row


def database_restarts(place: Place, server: Postgres, trials: int, seed: int) -> Row:
    """PostgreSQL stops as in a crash and comes back."""
    row, chance = Row("PostgreSQL stopped and started"), random.Random(seed)
    pid = fork(place, seed * 100, seconds=120.0)
    _until_it_works(place)
    for _ in range(trials):
        time.sleep(chance.uniform(0.3, 1.5))
        server.stop()
        time.sleep(chance.uniform(0.1, 0.6))
        server.start()
        row.trials += 1
    time.sleep(0.5)
    _settle([pid])
    check(place, row)
    finish(place, row)
    return row


def bucket_faults(place: Place, faults: Faults, trials: int, seed: int) -> Row:
    """S3 fails, dawdles, loses and lies."""
    row = Row("S3 failing, slow, lying")
    for trial in range(trials):
        faults.rates = {"fail": 0.1, "drop": 0.05, "slow": 0.1, "lose": 0.1, "truncate": 0.1, "corrupt": 0.05}
        pid = fork(place, seed * 100 + trial, seconds=60.0)
        time.sleep(4.0)
        _settle([pid])
        faults.rates = {}
        check(place, row)
        row.trials += 1
    finish(place, row)
    return row


def full_disk(place: Place, trials: int, seed: int) -> Row:
    """No file may grow beyond a limit: the database's journal, objects, checkpoints hit it."""
    row, chance = Row("disk full"), random.Random(seed)
    for trial in range(trials):
        pid = fork(place, seed * 100 + trial, seconds=60.0, limit=chance.choice([90, 2000, 60_000, 130_000]))
        time.sleep(2.0)
        _settle([pid])
        check(place, row)
        row.trials += 1
    finish(place, row)
    return row


@contextlib.contextmanager
def local_place() -> Iterator[Place]:
    """SQLite and a folder."""
    with tempfile.TemporaryDirectory(prefix="mooring-chaos-") as name:
        folder = Path(name)
        yield Place(folder, f"sqlite:///{folder}/mooring.db", lambda: LocalObjects(folder / "objects"))


def storm(trials: int, seed: int = 1, *, only: str = "") -> Iterator[Row]:
    """Every scenario, one row each."""
    for name, run in (("kill", kills_here), ("disk", full_disk_here), ("shared", shared)):
        if only in name:
            yield from run(trials, seed)


def kills_here(trials: int, seed: int) -> Iterator[Row]:
    with local_place() as place:
        yield kills(place, trials, seed, "kill -9, SQLite and a folder")


def full_disk_here(trials: int, seed: int) -> Iterator[Row]:
    with local_place() as place:
        yield full_disk(place, max(2, trials // 10), seed)


def shared(trials: int, seed: int) -> Iterator[Row]:
    with Postgres() as server, moto() as bucket, faulty(bucket, seed) as (behind, faults):
        for number, run in enumerate(
            (
                lambda place: kills(place, trials, seed + 1, "kill -9, PostgreSQL and S3"),
                lambda place: frozen(place, max(2, trials // 10), seed + 2),
                lambda place: database_restarts(place, server, max(2, trials // 20), seed + 3),
                lambda place: bucket_faults(place, faults, max(2, trials // 10), seed + 4),
            )
        ):
            with tempfile.TemporaryDirectory(prefix="mooring-chaos-") as folder:
                where = behind if number == 3 else bucket
                prefix = f"chaos{number}"
                yield run(Place(Path(folder), server.new_url(), lambda w=where, p=prefix: w.objects(p)))
