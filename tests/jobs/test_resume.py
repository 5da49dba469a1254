"""The promise of the job system, on a real base, trainer and engine: pulling the plug changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mooring_server.jobs.subjects import PhotoUpload
from mooring_server.storage.models import Job, JobState
from mooring_server.training.control import early_steps
from pictures import png, quarters
from PIL import Image
from worker import PATIENCE, open_state, running

CONFIG = {
    "method": "spectral",
    "budget": 0.05,
    "steps": 90,
    "rank": 2,
    "batch_size": 2,
    "views": 2,
    "checkpoint_every": 10,
    "preview_every": 45,
    "probe_every": 10,
    "probe_points": 8,
    "control_points": 4,
}
FACTORS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def new_job(state: Path) -> Job:
    store, objects = open_state(state)
    store.create_subject(
        "acme",
        "duck",
        class_noun="duck",
        placeholder="<duck>",
        rights={"basis": "OWNED"},
        display_name="Duck",
    )
    upload = PhotoUpload(store, objects, "acme", "duck")
    for number, angle in enumerate((0, 90, 180)):
        upload.add(f"{number}.png", png(quarters(48, 40).rotate(angle, expand=True)))
    upload.commit()
    job = store.create_job("acme", "train", {"subject": "duck", "adapter_id": "duck", "config": CONFIG})
    store.close()
    return job


def finished(state: Path, base_dir: Path, job: Job) -> Job:
    """Run the job to its end in this process."""
    store, _ = open_state(state)
    with running(state, base_dir):
        deadline = time.monotonic() + PATIENCE
        while not store.get_job("acme", job.job_id).state.final:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    done = store.get_job("acme", job.job_id)
    store.close()
    assert done.state is JobState.SUCCEEDED, done.error
    return done


def interrupted(state: Path, base_dir: Path, job: Job, *, at_step: int, how: signal.Signals) -> None:
    """Run the job in a process of its own and end that when it is at a step."""
    store, objects = open_state(state)
    script = Path(__file__).with_name("worker.py")
    command = [sys.executable, str(script), str(state), str(base_dir), str(at_step)]
    with subprocess.Popen(command, env=os.environ | FACTORS) as process:
        try:
            while True:
                assert process.poll() is None
                running_ = store.get_job("acme", job.job_id)
                assert not running_.state.final, running_.error
                progress = running_.progress or {}
                saved = any(objects.list(f"jobs/{job.job_id}/checkpoint"))
                if saved and progress.get("phase") == "training" and progress["step"] >= at_step:
                    break
                time.sleep(0.01)
            process.send_signal(how)
            assert process.wait(PATIENCE) == (-9 if how is signal.SIGKILL else 0)
        finally:
            process.kill()  # a failed assertion must not leave Popen waiting for a worker without work
    after = store.get_job("acme", job.job_id)
    store.close()
    assert after.state is (JobState.RUNNING if how is signal.SIGKILL else JobState.PENDING)


def test_a_killed_and_a_drained_training_end_with_the_same_bits_as_an_undisturbed_one(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    job = new_job(disturbed)
    interrupted(disturbed, tiny_sd15, job, at_step=25, how=signal.SIGKILL)
    interrupted(disturbed, tiny_sd15, job, at_step=47, how=signal.SIGTERM)
    done = finished(disturbed, tiny_sd15, job)
    undisturbed = finished(calm, tiny_sd15, new_job(calm))
    assert done.attempts == 3
    assert undisturbed.attempts == 1
    assert done.result["digest"] == undisturbed.result["digest"]
    assert done.result["summary"]["drift"] == undisturbed.result["summary"]["drift"]

    files = []
    for state in (disturbed, calm):
        store, objects = open_state(state)
        (adapter,) = store.list_adapters("acme")[0]
        assert (adapter.name, adapter.rights) == ("duck@1", {"basis": "OWNED"})
        files.append(objects.get(adapter.object_key))
        (artifact,) = store.get_job("acme", adapter.job_id).result["artifacts"]
        history = json.loads(objects.get(artifact["object_key"]))
        assert {row["step"] for row in history} == early_steps(10) | set(range(10, 91, 10))
        store.close()
    assert files[0] == files[1]


def test_previews_of_a_real_training_are_pictures(tiny_sd15: Path, tmp_path: Path) -> None:
    job = new_job(tmp_path)
    finished(tmp_path, tiny_sd15, job)
    store, objects = open_state(tmp_path)
    previews = [p for e in store.events("acme", job.job_id) for p in e.payload.get("previews", [])]
    assert len(previews) == 4
    for preview in previews:
        (tmp_path / "p.png").write_bytes(objects.get(preview["object_key"]))
        with Image.open(tmp_path / "p.png") as image:
            assert image.size == (32, 32)
    store.close()
