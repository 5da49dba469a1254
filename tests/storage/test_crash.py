"""kill -9 of a process that claims, trains and publishes as fast as it can: nothing half-done remains."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from mooring_server.storage.models import JobState
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from store_rows import publish
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store
store, objects = Store(f"sqlite:///{sys.argv[1]}/db"), LocalObjects(f"{sys.argv[1]}/objects")
while True:
    job = store.claim_job("w", 0.001, max_crashes=1000) or store.create_job("acme", "train", {})
    if not job.lease:
        continue
    for step in range(3):
        store.append_event(job.tenant, job.job_id, job.lease, "progress", {"step": step})
    key = f"adapters/{job.job_id}"
    objects.put(key, b"weights")
    publish(store, object_key=key, job_id=job.job_id, lease=job.lease)
"""


def test_a_killed_worker_leaves_no_job_half_published(tmp_path: Path) -> None:
    store, objects = Store(f"sqlite:///{tmp_path}/db"), LocalObjects(tmp_path / "objects")
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(Path(__file__).parent)]
    for _ in range(3):
        before = len(store.list_adapters("acme", page_size=1000)[0])
        with subprocess.Popen(command) as worker:
            while len(store.list_adapters("acme", page_size=1000)[0]) < before + 2:
                time.sleep(0.01)
            worker.send_signal(signal.SIGKILL)
    adapters, _ = store.list_adapters("acme", page_size=1000)
    jobs, _ = store.list_jobs("acme", page_size=1000)
    succeeded = [job for job in jobs if job.state is JobState.SUCCEEDED]
    assert len(adapters) >= 6
    assert {a.name: a.job_id for a in adapters} == {j.result["adapter"]: j.job_id for j in succeeded}
    assert all(objects.get(adapter.object_key) == b"weights" for adapter in adapters)
    assert sum(not job.state.final for job in jobs) <= 1
    for job in jobs:
        events = store.events("acme", job.job_id)
        assert [event.seq for event in events] == list(range(1, job.last_event + 1))
    store.close()
    with sqlite3.connect(tmp_path / "db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
