"""Two servers on one PostgreSQL and one bucket: what one of them loses with its life, the other finishes."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mooring
import pytest
from mooring_server.storage.models import JobState
from mooring_server.storage.store import Store
from PIL import Image
from servers import BUCKET, S3, Postgres, moto

from chaos.processes import PATIENCE, Replica

TRAINING = {
    "steps": 120,
    "rank": 2,
    "batch_size": 2,
    "checkpoint_every": 10,
    "preview_every": 0,
    "fixed_strength": 0.001,
}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[str, S3]]:
    with Postgres() as database, moto() as bucket:
        yield database.new_url(), bucket


def photo(number: int) -> bytes:
    image = Image.new("RGB", (48, 40), (40 * number, 200 - 30 * number, 90))
    image.paste((250, 250, 10), (5, 5, 20 + number, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_replicas_training_is_finished_by_the_other_with_the_same_bits(
    shared: tuple[str, S3], tiny_sd15: Path, tmp_path: Path
) -> None:
    url, bucket = shared
    variables = bucket.environment | {
        "MOORING_DATABASE_URL": url,
        "MOORING_OBJECTS_URL": f"s3://{BUCKET}/replicas",
        "MOORING_LEASE_SECONDS": "2",
        "MOORING_RANK": "4",
        "MOORING_DISK_CACHE_BYTES": "10000000",
    }
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(Replica(tmp_path / name, tiny_sd15, variables)) for name in ("one", "two")
        ]
        store = Store(url)
        stack.callback(store.close)
        with replicas[0].client() as one, replicas[1].client() as two:
            one.create_subject("duck", class_noun="duck", rights="owned", photos=[photo(n) for n in range(3)])
            calm = two.train("duck", adapter_id="calm", **TRAINING)
            two.wait(calm)
            stormy = one.train("duck", adapter_id="stormy", **TRAINING)
            job_id = stormy.name.rpartition("/")[2]
            deadline = time.monotonic() + PATIENCE
            while True:
                job = store.get_job("local", job_id)
                assert not job.state.final, "it was done before it could be killed"
                if job.checkpoint_key is not None and (job.progress or {}).get("step", 0) >= 20:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.005)
            (runner,) = [replica for replica in replicas if job.worker.endswith(f"-{replica.pid}")]
            runner.kill()
        (survivor,) = [replica for replica in replicas if replica is not runner]
        with survivor.client() as client:
            client.wait(stormy)
            done = store.get_job("local", job_id)
            assert (done.state, done.attempts) == (JobState.SUCCEEDED, 2)
            assert done.worker.endswith(f"-{survivor.pid}")
            digests = {name: client.get_adapter(name).digest for name in ("calm", "stormy")}
            assert digests["calm"] == digests["stormy"]
            assert len(list(client.list_adapters())) == 2
            (picture,) = client.images("a photo of a <duck> duck", adapter="stormy", steps=2, seed=1)
            (same,) = client.images("a photo of a <duck> duck", adapter="calm", steps=2, seed=1)
            (base,) = client.images("a photo of a duck", steps=2, seed=1)
            assert picture.image.tobytes() == same.image.tobytes() != base.image.tobytes()
        # what is stored: the checkpoints of both jobs are gone, and every file is what its key says
        objects = bucket.objects("replicas")
        keys = list(objects.list())
        assert not [key for key in keys if "checkpoint" in key]
        for key in keys:
            objects.get(key)
        assert len([key for key in keys if key.startswith("adapters/")]) == 2
        assert len([key for key in keys if key.startswith("photos/")]) == 3
        # the survivor kept the adapters' files on its disk; a cold server finds them in the bucket
        kept = list((survivor.state / "adapter-cache").iterdir())
        assert {path.name.rpartition("-")[2] for path in kept} == {
            hashlib.sha256(path.read_bytes()).hexdigest() for path in kept
        }
        assert len(kept) == 2
        assert survivor.stop() == 0


@pytest.mark.slow
def test_a_mistyped_bucket_is_said_at_the_start(tiny_sd15: Path, tmp_path: Path) -> None:
    replica = Replica(tmp_path, tiny_sd15, {"MOORING_OBJECTS_URL": "gs://elsewhere"})
    replica.start()
    with pytest.raises(AssertionError, match="neither s3://bucket/prefix nor a folder"):
        mooring.Client(replica.target)
