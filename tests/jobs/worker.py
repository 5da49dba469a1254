"""A server's job runner as a process of its own, for tests that end it: worker.py STATE BASE HOLD_AT_STEP.

A training waits after the given step until the process is drained or killed: what ends it comes to a running
job however the machine's time is shared out.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import load_base
from mooring_server.engine.engine import Engine
from mooring_server.engine.tiers.host import AdapterTiers
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.prompts import PromptSets
from mooring_server.jobs import train_job
from mooring_server.jobs.runner import JobRunner, RunnerSettings
from mooring_server.jobs.session import JobSession
from mooring_server.provenance import identity
from mooring_server.provenance.marks import Marker
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store
from mooring_server.training.trainer import TrainProgress

PATIENCE = 240.0
"""Seconds after which something will not happen any more, on a machine that is busy with other work."""
GENERIC = ("a photo of a car", "a red robot", "a toy on a table", "a dog in the snow")


def open_state(state: Path) -> tuple[Store, LocalObjects]:
    return Store(f"sqlite:///{state}/mooring.db"), LocalObjects(state / "objects")


@contextmanager
def running(state: Path, base_dir: Path, judges: Judges | None = None) -> Iterator[None]:
    """Claims and runs jobs of `state` inside the block; drains at its end."""
    store, objects = open_state(state)
    base = load_base(str(base_dir), threads=1)
    bank = AdapterBank(base, slots=4, rank=4)
    engine = Engine(base, bank, threads=1)
    settings = RunnerSettings(
        lease_seconds=1.5,
        poll_seconds=0.05,
        progress_seconds=0.05,
        drain_seconds=PATIENCE,
        prompts=PromptSets.of(("a photo of a {} in the snow", "a photo of a {} on the beach"), GENERIC),
    )
    adapters = AdapterTiers(objects.get, bank, host_bytes=2**26)
    marker = Marker(*identity.self_issued(state / identity.FOLDER).names, "1.2.3")
    runner = JobRunner(
        store, objects, engine, base, bank, judges, settings, drawer=engine, adapters=adapters, marker=marker
    )
    runner.start()
    try:
        yield
    finally:
        runner.stop(PATIENCE)
        engine.close()
        adapters.close()
        store.close()


def hold_at(step: int) -> None:
    """Let a training go no further than the end of a step until it is drained."""
    report = train_job._report

    def held(session: JobSession, progress: TrainProgress) -> None:
        report(session, progress)
        while progress.phase == "training" and progress.step >= step and not session.wanted():
            time.sleep(0.01)

    train_job._report = held


if __name__ == "__main__":
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    hold_at(int(sys.argv[3]))
    with running(Path(sys.argv[1]), Path(sys.argv[2])):
        while not stopped.wait(0.5) and os.getppid() != 1:  # nobody waits for an orphan
            pass
