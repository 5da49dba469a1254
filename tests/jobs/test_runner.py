from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fakes import BASE_DIGEST, FakeTraining, chain, fake_certificate, real_engine, weights_of
from mooring_server.engine.adapters import HEADER_KEY
from mooring_server.engine.engine import Engine
from mooring_server.errors import MooringError, Reason, StorageUnavailableError
from mooring_server.jobs import session as session_module
from mooring_server.jobs import train_job
from mooring_server.jobs.runner import JobRunner, RunnerSettings
from mooring_server.jobs.subjects import PhotoUpload, delete_subject, load_photos
from mooring_server.storage.models import Job, JobState
from mooring_server.storage.objects import LocalObjects, content_key
from mooring_server.storage.store import Store
from pictures import jpeg, png, quarters
from PIL import Image
from safetensors import safe_open
from worker import PATIENCE

STEPS = 30
RIGHTS = {"basis": "OWNED", "statement": "ours"}
AWAY = StorageUnavailableError("The database is away.")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(train_job, "train", fake)
    monkeypatch.setattr(train_job.certificate, "build", fake_certificate)
    monkeypatch.setattr(session_module, "_RETRY_SECONDS", 0.01)
    return fake


@pytest.fixture
def photos(store: Store, objects: LocalObjects) -> list[bytes]:
    store.create_subject("acme", "duck", class_noun="bird", placeholder="<duck>", rights=RIGHTS)
    upload = PhotoUpload(store, objects, "acme", "duck")
    for data in (jpeg(), png(quarters(40, 40))):
        upload.add("x", data)
    upload.commit()
    return [image.tobytes() for image in load_photos(store, objects, "acme", "duck")]


class Replica:
    """One server's job runner with its engine."""

    def __init__(self, store: Store, objects: LocalObjects, *, lease: float = 30.0, **engine) -> None:
        self.engine = real_engine(**engine)
        self.ended: list[tuple[str, str]] = []
        settings = RunnerSettings(
            "replica", lease, poll_seconds=0.02, progress_seconds=0.0, drain_seconds=PATIENCE
        )
        self.runner = JobRunner(store, objects, self.engine, None, None, None, settings, observer=self)

    def job_claimed(self, kind: str, *, resumed: bool) -> None:
        pass

    def job_step(self, kind: str, seconds: float) -> None:
        assert seconds >= 0

    def drew(self, steps: int) -> None: ...

    def trained(self, drift: float, budget: float) -> None:
        assert budget > 0

    def job_ended(self, kind: str, outcome: str, seconds: float) -> None:
        self.ended.append((kind, outcome))


@pytest.fixture
def start(store: Store, objects: LocalObjects) -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def start_(on: Store | None = None, **options) -> Replica:
        replicas.append(Replica(on or store, objects, **options))
        replicas[-1].runner.start()
        return replicas[-1]

    yield start_
    for replica in replicas:
        replica.runner.stop(PATIENCE)
        replica.engine.close()


def new_job(store: Store, *, steps: int = STEPS, subject: str = "duck", **config) -> Job:
    config = {"steps": steps, "preview_every": 0} | config
    return store.create_job("acme", "train", {"subject": subject, "adapter_id": "duck", "config": config})


def ended(store: Store, job: Job) -> Job:
    until(lambda: store.get_job("acme", job.job_id).state.final)
    return store.get_job("acme", job.job_id)


def expected_digest(photos: list[bytes], steps: int = STEPS) -> str:
    return weights_of(chain(photos, steps, 0)).digest


def checkpoints(objects: LocalObjects, job: Job) -> list[str]:
    return list(objects.list(f"jobs/{job.job_id}/checkpoint"))


def states(store: Store, job: Job) -> list[str]:
    return [e.payload["state"] for e in store.events("acme", job.job_id) if e.kind == "state"]


def test_device_time_is_booked_to_the_jobs_tenant(store, training, photos, start, monkeypatch) -> None:
    seen = []
    plain = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda *args, **rest: seen.append(rest.get("tenant")) or plain(*args, **rest)
    )
    job = new_job(store)
    start()
    assert ended(store, job).state is JobState.SUCCEEDED
    assert seen == ["acme"]


def test_a_job_trains_and_publishes(store, objects, training, photos, start) -> None:
    job = new_job(store, preview_every=15)
    start()
    done = ended(store, job)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    adapter = store.get_adapter("acme", "duck")
    assert done.result["adapter"] == adapter.name == "duck@1"
    assert adapter.digest == done.result["digest"] == expected_digest(photos)
    assert (adapter.rights, adapter.subject_id, adapter.job_id) == (RIGHTS, "duck", job.job_id)
    assert (adapter.class_noun, adapter.placeholder, adapter.base_digest) == ("bird", "<duck>", BASE_DIGEST)
    assert adapter.certificate["adapter_digest"] == adapter.digest
    assert adapter.summary["drift"] == {"value": 0.11, "low": 0.1, "high": 0.12}
    assert (adapter.summary["method"], adapter.summary["strength"]) == ("spectral", 2.0)
    assert training.steps_run == list(range(STEPS))


def test_the_published_file_carries_rights_and_certificate(store, objects, training, photos, start, tmp_path):
    job = new_job(store)
    start()
    ended(store, job)
    adapter = store.get_adapter("acme", "duck")
    data = objects.get(adapter.object_key)
    assert len(data) == adapter.size_bytes
    (tmp_path / "a.safetensors").write_bytes(data)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        kept = json.loads(file.metadata()[HEADER_KEY])["metadata"]
    assert json.loads(kept["rights"]) == RIGHTS
    assert json.loads(kept["certificate"])["adapter_digest"] == adapter.digest


def test_progress_and_previews_can_be_watched(store, objects, training, photos, start) -> None:
    training.loss = float("nan")  # JSON has no word for it
    job = new_job(store, preview_every=15)
    start()
    ended(store, job)
    events = store.events("acme", job.job_id)
    progress = [event.payload for event in events if event.kind == "progress"]
    assert (progress[-1]["phase"], progress[-1]["step"], progress[-1]["loss"]) == ("training", STEPS, None)
    steps = [payload["step"] for payload in progress]
    assert steps == sorted(steps)
    previews = [preview for payload in progress for preview in payload["previews"]]
    assert [preview["index"] for preview in previews] == [0, 0]
    for step, preview in zip((15, 30), previews, strict=True):
        with Image.open(io.BytesIO(objects.get(preview["object_key"]))) as image:
            assert image.size == (preview["width"], preview["height"]) == (256, 192)
            assert image.getpixel((5, 5)) == (step,) * 3
    assert "previews" not in store.get_job("acme", job.job_id).progress


def test_what_a_job_leaves_behind(store, objects, training, photos, start) -> None:
    job = new_job(store)
    start()
    done = ended(store, job)
    until(lambda: not checkpoints(objects, job))
    (artifact,) = done.result["artifacts"]
    assert (artifact["filename"], artifact["media_type"]) == ("history.json", "application/json")
    history = objects.get(artifact["object_key"])
    assert len(history) == artifact["size_bytes"]
    assert json.loads(history)[0]["strength"] == 2.0


def test_a_cancelled_job_stops_at_its_next_step(store, objects, training, photos, start) -> None:
    job = new_job(store, steps=10_000)
    training.at[25] = lambda: store.request_cancel("acme", job.job_id)
    training.step_seconds = 0.002
    replica = start()
    assert ended(store, job).state is JobState.CANCELLED
    until(lambda: replica.ended)
    assert training.closed == 1
    assert len(training.steps_run) < 5000
    assert store.list_adapters("acme") == ([], "")
    assert not checkpoints(objects, job)
    assert replica.ended == [("train", "CANCELLED")]


def test_a_drained_job_goes_on_elsewhere_without_losing_or_repeating_a_step(
    store, objects, training, photos, start
) -> None:
    job = new_job(store, steps=200)
    training.hold_at = 57
    first = start()
    assert training.held.wait(PATIENCE)
    first.runner.stop(PATIENCE)
    assert first.ended == [("train", "DRAINING")]
    waiting = store.get_job("acme", job.job_id)
    assert (waiting.state, waiting.crashes) == (JobState.PENDING, 0)
    start()
    done = ended(store, job)
    assert training.steps_run == list(range(200))
    assert done.result["digest"] == expected_digest(photos, 200)
    assert (done.attempts, states(store, job)) == (
        2,
        ["PENDING", "RUNNING", "PENDING", "RUNNING", "SUCCEEDED"],
    )


def test_a_stopped_runner_claims_nothing_more(store, training, photos, start) -> None:
    start().runner.stop()
    job = new_job(store)
    time.sleep(0.1)
    assert store.get_job("acme", job.job_id).state is JobState.PENDING


def test_a_runner_that_lost_its_lease_writes_nothing_more(
    store, objects, training, photos, start, tmp_path
) -> None:
    """The first replica freezes in mid-step, as a stopped virtual machine does; the second takes over."""
    frozen, thaw = threading.Event(), threading.Event()

    def freeze() -> None:
        frozen.set()
        assert thaw.wait(PATIENCE)

    training.at[20] = freeze
    job = new_job(store, steps=60)
    other = Store(f"sqlite:///{tmp_path}/mooring.db")
    first = start(on=other, lease=0.6)
    assert frozen.wait(PATIENCE)
    until(lambda: checkpoints(objects, job))

    def away(*_args, **_kwargs):
        raise AWAY

    other.heartbeat = other.get_job = away  # its lease thread hears nothing and says nothing
    training.at = {}
    start(lease=30.0)
    done = ended(store, job)
    thaw.set()
    until(lambda: first.ended)
    assert first.ended == [("train", "LEASE_LOST")]
    assert done.result["digest"] == expected_digest(photos, 60)
    assert [adapter.name for adapter in store.list_adapters("acme")[0]] == ["duck@1"]
    assert store.events("acme", job.job_id)[-1].payload["state"] == "SUCCEEDED"
    other.close()


def test_a_resumed_job_keeps_to_the_photos_it_began_with(store, objects, training, photos, start) -> None:
    job = new_job(store, steps=100)
    training.hold_at = 30
    first = start()
    assert training.held.wait(PATIENCE)
    first.runner.stop(PATIENCE)
    training.hold_at = None
    for key in checkpoints(objects, job):
        objects.delete(key)
    upload = PhotoUpload(store, objects, "acme", "duck")
    upload.add("new.png", png(quarters(50, 50)))
    upload.commit()
    start()
    assert ended(store, job).result["digest"] == expected_digest(photos, 100)


def test_a_damaged_list_of_photos_is_made_anew(store, objects, training, photos, start) -> None:
    """Half of it reached the store, and then its server died: nothing has used it yet."""
    job = new_job(store)
    key = content_key(f"jobs/{job.job_id}/photos", b"[]", "json")
    objects.put(key, b"[]")
    (objects.root / key).write_bytes(b"[")
    start()
    assert ended(store, job).result["digest"] == expected_digest(photos)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (
            MooringError(Reason.TRAINING_DIVERGED, "It diverged.", remedy="Lower it."),
            "TRAINING_DIVERGED",
            "It",
        ),
        (RuntimeError("secret path /srv/x"), "INTERNAL", "RuntimeError"),
        (MemoryError(), "OUT_OF_MEMORY", "memory"),
        (KeyError("photos/…"), "INTERNAL", "KeyError"),
    ],
)
def test_a_failure_says_why_and_what_to_do(store, training, photos, start, error, reason, words) -> None:
    job = new_job(store)
    training.at[5] = raising(error)
    replica = start()
    failed = ended(store, job)
    assert (failed.state, failed.error["reason"]) == (JobState.FAILED, reason)
    assert words in failed.error["message"]
    assert "secret" not in json.dumps(failed.error)
    assert failed.error["remedy"]
    assert store.list_adapters("acme") == ([], "")
    again = new_job(store)  # the runner goes on
    assert ended(store, again).state is JobState.SUCCEEDED
    assert replica.ended[0] == ("train", "FAILED")


def test_a_job_on_a_missing_subject_or_a_faulty_configuration_fails_by_name(
    store, objects, training, photos, start
) -> None:
    start()
    assert ended(store, new_job(store, subject="cat")).error["reason"] == "SUBJECT_NOT_FOUND"
    assert ended(store, new_job(store, rank=0)).error["reason"] == "INVALID_FIELD"
    delete_subject(store, objects, "acme", "duck")
    assert ended(store, new_job(store)).error["reason"] == "SUBJECT_NOT_FOUND"
    store.create_subject("acme", "empty", class_noun="bird", placeholder="<e>", rights=RIGHTS)
    assert ended(store, new_job(store, subject="empty")).error["reason"] == "SUBJECT_HAS_NO_PHOTOS"


def test_a_busy_engine_puts_a_job_off(store, training, photos, start) -> None:
    replica = start(max_queue=0)
    job = new_job(store)
    until(lambda: store.get_job("acme", job.job_id).attempts > 2)
    replica.engine.max_queue = 8
    done = ended(store, job)
    assert (done.state, done.crashes) == (JobState.SUCCEEDED, 0)


def test_a_database_that_goes_away_for_a_while_costs_nothing(store, training, photos, start, monkeypatch):
    failures = {"publish_adapter": 3, "append_event": 4, "heartbeat": 2, "claim_job": 2}
    for name, count in failures.items():
        real, left = getattr(store, name), [count]

        def flaky(*args, real=real, left=left, **kwargs):
            left[0] -= 1
            if left[0] >= 0:
                raise AWAY
            return real(*args, **kwargs)

        monkeypatch.setattr(store, name, flaky)
    job = new_job(store)
    start()
    done = ended(store, job)
    assert done.result["digest"] == expected_digest(photos)
    assert [adapter.version for adapter in store.list_adapters("acme")[0]] == [1]


def test_a_full_disk_while_checkpointing_does_not_stop_training(
    store, objects, training, photos, start, monkeypatch
) -> None:
    real = LocalObjects.put

    def full(self, key: str, data: bytes) -> None:
        if "checkpoint" in key:
            raise OSError(28, "No space left on device")
        real(self, key, data)

    monkeypatch.setattr(LocalObjects, "put", full)
    job = new_job(store)
    start()
    assert ended(store, job).result["digest"] == expected_digest(photos)


def test_previews_that_cannot_be_stored_do_not_stop_training(
    store, objects, training, photos, start, monkeypatch
) -> None:
    real = LocalObjects.put

    def full(self, key: str, data: bytes) -> None:
        if "/previews/" in key:
            raise StorageUnavailableError("The object folder fails: No space left on device.")
        real(self, key, data)

    monkeypatch.setattr(LocalObjects, "put", full)
    job = new_job(store, preview_every=5)
    start()
    done = ended(store, job)
    assert (done.attempts, done.result["digest"]) == (1, expected_digest(photos))


def test_a_job_that_fails_beside_its_steps_leaves_none_running(
    store, training, photos, start, monkeypatch
) -> None:
    def faulty(*_args, **_kwargs):
        raise RuntimeError("a fault of the server")

    monkeypatch.setattr(store, "append_event", faulty)
    training.step_seconds = 0.001
    start()
    assert ended(store, new_job(store, steps=20_000)).error["reason"] == "INTERNAL"
    until(lambda: training.closed == 1)


def test_a_fault_while_looking_for_jobs_does_not_end_the_looking(
    store, training, photos, start, monkeypatch
) -> None:
    real, faults = store.claim_job, [RuntimeError("first"), RuntimeError("second")]

    def faulty(*args, **kwargs):
        if faults:
            raise faults.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(store, "claim_job", faulty)
    job = new_job(store)
    start()
    assert ended(store, job).state is JobState.SUCCEEDED
    assert not faults


def test_a_fault_while_looking_at_the_lease_does_not_end_the_looking(
    store, training, photos, start, monkeypatch
) -> None:
    real, faults = store.get_job, [RuntimeError("first")]

    def faulty(*args, **kwargs):
        if faults and threading.current_thread().name.startswith("lease-"):
            raise faults.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(store, "get_job", faulty)
    training.step_seconds = 0.002
    job = new_job(store, steps=20_000)
    start()
    until(lambda: not faults)
    store.request_cancel("acme", job.job_id)
    assert ended(store, job).state is JobState.CANCELLED


def test_two_replicas_share_the_work(store, training, photos, start) -> None:
    jobs = [new_job(store, steps=5) for _ in range(6)]
    start()
    start()
    assert {ended(store, job).state for job in jobs} == {JobState.SUCCEEDED}
    assert sorted(adapter.version for adapter in store.list_adapters("acme")[0]) == [1, 2, 3, 4, 5, 6]
    assert {store.get_job("acme", job.job_id).attempts for job in jobs} == {1}


def test_an_evaluation_does_not_wait_behind_a_training(store, training, photos, start) -> None:
    start()
    training.hold_at = 1
    long = new_job(store)
    assert training.held.wait(PATIENCE)
    quick = store.create_job("acme", "evaluate", {"adapter": "", "subject": "duck", "config": {}})
    assert ended(store, quick).error["reason"] == "JUDGES_NOT_AVAILABLE"
    assert not store.get_job("acme", long.job_id).state.final
