"""Chaos over the storage: work goes on while things break, and afterwards nothing is lost, half or double.

Workers are processes of their own (`work`): they are forked from a server process that has imported
everything, so that one is there in a moment. The parent breaks something at a random instant, starts the next
worker, measures how long it takes until the work goes on, and looks at everything (`checks`). At the end of a
scenario an undisturbed worker answers every request and finishes every job, the collector runs without any
grace, and all is read again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "jobs"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from faulty_s3 import Faults, faulty  # noqa: E402
from mooring_server.errors import MooringError  # noqa: E402
from mooring_server.storage.garbage import collect  # noqa: E402
from servers import S3, Postgres, moto  # noqa: E402

from . import real  # noqa: E402
from .checks import Checker  # noqa: E402
from .place import Place  # noqa: E402
from .table import Row  # noqa: E402
from .work import JOB_KINDS, NO_GRACE, Orders, run, settle  # noqa: E402

PATIENCE = 120.0
"""Seconds after which something will not happen any more, on a machine that is busy with other work."""
FOCI = {"training": 0.6, "evaluation": 0.15, "batch": 0.3, "publish": 0.02, "upload": 0.03}
"""What kills are aimed at, and within how many seconds of its begin they come."""
_DISK_BYTES = 32 * 2**20


class Scene:
    """One scenario under way: the place, its checker, its row, its workers."""

    def __init__(self, place: Place, row: Row, seed: int) -> None:
        settle(place)
        self.place, self.row, self.chance = place, row, random.Random(seed)
        self.checker = Checker(place)
        self._seed, self._workers = seed * 1000, []

    def start(self, **orders: object) -> BaseProcess:
        """One more worker."""
        self._seed += 1
        process = _context().Process(target=run, args=(self.place, Orders(self._seed, **orders)), daemon=True)
        process.start()
        self._workers.append(process)
        return process

    def kill(self, process: BaseProcess) -> None:
        """End it at once, as a power cut would."""
        process.kill()
        process.join()

    def answers(self) -> int:
        """How many requests were answered so far."""
        return sum("done" in note for note in self.place.said())

    def goes_on(self, held: dict[str, str], since: float) -> bool:
        """Wait until those jobs run again and requests are answered; note how long it took."""
        before = self.answers()
        worked = _until(lambda: self.answers() > before and self.checker.taken_over(held))
        if worked:
            self.row.seconds.append(time.monotonic() - since)
        return worked

    def is_busy(self, focus: str) -> bool:
        """Whether what a kill is aimed at is under way."""
        if focus in JOB_KINDS:
            return JOB_KINDS[focus] in self.checker.kinds_running()
        notes = self.place.said()
        return bool(notes) and notes[-1].get("begin") == focus

    def look(self, *, finished: bool = False) -> None:
        """Check everything."""
        self.checker.look(self.row, finished=finished)

    def finish(self) -> Row:
        """Undisturbed, to the end; then the collector without any grace."""
        for process in self._workers:
            self.kill(process)
        last = self.start(produce=False, seconds=PATIENCE)
        last.join(PATIENCE + 30)
        self.kill(last)
        self.look(finished=True)
        # objects have the times of the machine's clock: a moment later even the newest is old enough
        store = self.place.store(clock=lambda: time.time() + 10)
        self.row.collected = len(collect(store, self.place.objects(), NO_GRACE).keys)
        store.close()
        self.look(finished=True)
        self.checker.close()
        return self.row


def _context() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported everything and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.work", f"{__package__}.real"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _until(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(MooringError):  # the database is away
            if condition():
                return True
        time.sleep(0.01)
    return False


# -- scenarios ------------------------------------------------------------------------------------------


def kills(place: Place, times: int, seed: int, name: str, focus: str) -> Row:
    """kill -9 at a random instant while something is under way; every fifth one while the worker starts."""
    scene = Scene(place, Row(name), seed)
    row, chance = scene.row, scene.chance
    worker = scene.start(focus=focus)
    held: dict[str, str] = {}
    waited_for = 0
    started = time.monotonic()
    for time_ in range(times):
        if time_ % 5 == 4:
            time.sleep(chance.uniform(0.0, 0.6))
        else:
            if scene.goes_on(held, started):
                row.recovered += waited_for
                waited_for = 0
            _until(partial(scene.is_busy, focus), 30.0)
            time.sleep(chance.uniform(0.0, FOCI[focus]))
        row.struck += scene.is_busy(focus)
        scene.kill(worker)
        row.times += 1
        waited_for += 1
        held = scene.checker.running()
        scene.look()
        worker, started = scene.start(focus=focus), time.monotonic()
    row.seconds = row.seconds[1:]  # the first one began from nothing
    if scene.goes_on(held, started):
        row.recovered += waited_for
    return scene.finish()


def takeovers(place: Place, times: int, seed: int) -> Row:
    """Two replicas: the one that trains is killed, the other has to take the job over."""
    scene = Scene(place, Row("two replicas, the one that trains is killed"), seed)
    row = scene.row
    workers = {f"worker-{process.pid}": process for process in (scene.start(focus="training") for _ in "12")}
    for _ in range(times):
        _until(lambda: scene.checker.worker_of("train") in workers)
        time.sleep(scene.chance.uniform(0.0, 0.5))
        runner = scene.checker.worker_of("train")
        victim = runner if runner in workers else min(workers)
        row.struck += runner in workers
        scene.kill(workers.pop(victim))
        row.times += 1
        row.recovered += scene.goes_on(scene.checker.running(), time.monotonic())
        scene.look()
        process = scene.start(focus="training")
        workers[f"worker-{process.pid}"] = process
    return scene.finish()


def frozen(place: Place, times: int, seed: int) -> Row:
    """Two replicas on the same jobs; each freezes longer than its lease and wakes up again."""
    scene = Scene(place, Row("two replicas, frozen in turn past their leases"), seed)
    row = scene.row
    workers = [scene.start() for _ in range(2)]
    _until(lambda: scene.answers() > 5)
    for _ in range(times):
        time.sleep(scene.chance.uniform(0.1, 0.5))
        victim = scene.chance.choice(workers)
        os.kill(victim.pid, signal.SIGSTOP)
        since, held = time.monotonic(), scene.checker.running()
        row.times += 1
        row.struck += bool(held)
        time.sleep(1.5)
        os.kill(victim.pid, signal.SIGCONT)
        row.recovered += scene.goes_on(held, since)
        scene.look()
        workers = [process if process.is_alive() else scene.start() for process in workers]
    return scene.finish()


def database_restarts(place: Place, server: Postgres, times: int, seed: int) -> Row:
    """PostgreSQL stops as in a crash and comes back; the worker lives on."""
    scene = Scene(place, Row("PostgreSQL stopped and started"), seed)
    row = scene.row
    worker = scene.start(seconds=3600.0)
    _until(lambda: scene.answers() > 5)
    for _ in range(times):
        time.sleep(scene.chance.uniform(0.3, 1.5))
        row.struck += bool(scene.checker.running())
        server.stop()
        row.times += 1
        time.sleep(scene.chance.uniform(0.1, 2.0))
        server.start()
        row.recovered += scene.goes_on({}, time.monotonic())
        scene.look()
        if not worker.is_alive():
            row.found("lost", "the worker did not outlive the restart")
            worker = scene.start(seconds=3600.0)
    return scene.finish()


def bucket_faults(
    place: Place, faults: Faults, times: int, seed: int, name: str, rates: list[dict[str, float]]
) -> Row:
    """S3 misbehaves for a while; every second time the worker is killed in it."""
    scene = Scene(place, Row(name), seed)
    row = scene.row
    worker = scene.start(seconds=3600.0)
    _until(lambda: scene.answers() > 5)
    for time_ in range(times):
        before = sum(faults.struck.values())
        faults.rates = rates[time_ % len(rates)]
        time.sleep(scene.chance.uniform(2.0, 4.0))
        held = scene.checker.running()
        if time_ % 2:
            scene.kill(worker)
        else:
            held = {}
        row.struck += sum(faults.struck.values()) > before
        faults.rates = {}
        row.times += 1
        if not worker.is_alive():
            if not time_ % 2:
                row.found("lost", "the worker did not outlive the faults")
            worker = scene.start(seconds=3600.0)
        row.recovered += scene.goes_on(held, time.monotonic())
        scene.look()
    return scene.finish()


def full_disk(place: Place, disk: Path, times: int, seed: int) -> Row:
    """The file system fills up and is emptied again; every second time the worker is killed meanwhile."""
    scene = Scene(place, Row("disk full (a small file system)"), seed)
    row, ballast = scene.row, disk / "ballast"
    worker = scene.start(seconds=3600.0)
    _until(lambda: scene.answers() > 5)
    for time_ in range(times):
        time.sleep(scene.chance.uniform(0.2, 1.0))
        _fill(ballast, leave=scene.chance.choice([0, 4096, 65_536]))
        row.times += 1
        time.sleep(scene.chance.uniform(0.3, 2.0))
        row.struck += shutil.disk_usage(disk).free < 65_536
        held = scene.checker.running() if time_ % 2 else {}
        if time_ % 2:
            scene.kill(worker)
        ballast.unlink()
        if not worker.is_alive():
            if not time_ % 2:
                row.found("lost", "the worker did not outlive the full disk")
            worker = scene.start(seconds=3600.0)
        row.recovered += scene.goes_on(held, time.monotonic())
        scene.look()
    return scene.finish()


def _fill(ballast: Path, *, leave: int) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65_536))
    os.truncate(ballast, max(0, ballast.stat().st_size - leave))


def limited_files(place: Place, times: int, seed: int) -> Row:
    """No file may grow beyond a limit: the database's journal, objects, checkpoints hit it. Needs no root."""
    scene = Scene(place, Row("disk full (files that cannot grow)"), seed)
    row = scene.row
    for _ in range(times):
        limit = scene.chance.choice([90, 2000, 60_000, 130_000])
        worker = scene.start(file_limit=limit)
        time.sleep(scene.chance.uniform(1.0, 2.0))
        scene.kill(worker)
        time.sleep(0.3)  # its notes pass through another process
        row.times += 1
        row.struck += 1
        scene.look()
        worker = scene.start()
        row.recovered += scene.goes_on(scene.checker.running(), time.monotonic())
        scene.kill(worker)
    return scene.finish()


# -- where they rage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """One row of the table to be.

    Attributes:
        name: for `--only`.
        run: makes the row.
    """

    name: str
    run: Callable[[], Row]


class Backends:
    """PostgreSQL, S3 and a proxy before it, each started when it is first needed."""

    def __init__(self, stack: contextlib.ExitStack, seed: int) -> None:
        self._stack, self._seed, self._number = stack, seed, 0
        self._postgres: Postgres | None = None
        self._bucket: S3 | None = None
        self._behind: tuple[S3, Faults] | None = None

    @property
    def postgres(self) -> Postgres:
        """The server."""
        if self._postgres is None:
            self._postgres = self._stack.enter_context(Postgres())
        return self._postgres

    @property
    def behind(self) -> tuple[S3, Faults]:
        """The bucket behind the proxy, and what goes wrong there."""
        if self._behind is None:
            self._behind = self._stack.enter_context(faulty(self.bucket, self._seed))
        return self._behind

    @property
    def bucket(self) -> S3:
        """The bucket itself."""
        if self._bucket is None:
            self._bucket = self._stack.enter_context(moto())
        return self._bucket

    @contextlib.contextmanager
    def shared(self, *, proxied: bool = False) -> Iterator[Place]:
        """A place on PostgreSQL and S3."""
        self._number += 1
        with _folder() as folder:
            yield Place(
                folder,
                self.postgres.new_url(),
                bucket=self.behind[0] if proxied else self.bucket,
                prefix=f"chaos{self._number}",
            )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder that goes away, and before it, however the scenario ends, every process started meanwhile."""
    before = multiprocessing.active_children()
    with tempfile.TemporaryDirectory(prefix="mooring-chaos-") as name:
        try:
            yield Path(name)
        finally:
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
                    process.join()


@contextlib.contextmanager
def local(state: Path | None = None) -> Iterator[Place]:
    """A place on SQLite and a folder."""
    with _folder() as folder:
        state = state or folder
        yield Place(folder, f"sqlite:///{state}/mooring.db", root=str(state / "objects"))


def scenarios(times: int, seed: int, backends: Backends) -> list[Scenario]:
    """Every scenario, in the order of the table.

    Args:
        times: kills on SQLite and a folder, over all five; the others follow from it.
        seed: of everything random.
        backends: where the shared ones run.
    """
    each, fewer, tenth = max(1, times // len(FOCI)), max(1, times * 3 // 10 // len(FOCI)), max(2, times // 10)
    made = []
    for number, focus in enumerate(FOCI):
        name = f"kill -9 in {focus}, SQLite and a folder"
        made.append(Scenario(f"kill-local-{focus}", partial(_kills_here, each, seed + number, name, focus)))
    for number, focus in enumerate(FOCI, start=10):
        name = f"kill -9 in {focus}, PostgreSQL and S3"
        work = partial(kills, times=fewer, seed=seed + number, name=name, focus=focus)
        made.append(Scenario(f"kill-shared-{focus}", partial(_shared, backends, work)))
    failing = [{"fail": 0.2, "drop": 0.1, "slow": 0.3}, {"fail": 1.0}, {"slow": 1.0}]
    lying = [{"lose": 0.2, "truncate": 0.2, "stale": 0.2, "corrupt": 0.05}]
    made += [
        Scenario(
            "replicas-killed", partial(_shared, backends, partial(takeovers, times=tenth, seed=seed + 20))
        ),
        Scenario("replicas-frozen", partial(_shared, backends, partial(frozen, times=tenth, seed=seed + 21))),
        Scenario("postgresql", partial(_restarts, backends, tenth, seed + 22)),
        Scenario(
            "s3-failing", partial(_faults, backends, tenth, seed + 23, "S3 failing, slow, away", failing)
        ),
        Scenario(
            "s3-lying", partial(_faults, backends, tenth, seed + 24, "S3 lying about writes and reads", lying)
        ),
        Scenario("disk-full", partial(_full_disk_here, tenth, seed + 25)),
        Scenario("disk-limit", partial(_limited_here, tenth, seed + 26)),
        Scenario("real-server", partial(_kills_of_servers, tenth, seed + 27)),
    ]
    return made


def _kills_of_servers(times: int, seed: int) -> Row:
    def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
        server = _context().Process(target=function, args=arguments)
        server.start()
        return server

    with _folder() as folder:
        return real.kills(folder, times, seed, start)


def _kills_here(times: int, seed: int, name: str, focus: str) -> Row:
    with local() as place:
        return kills(place, times, seed, name, focus)


def _limited_here(times: int, seed: int) -> Row:
    with local() as place:
        return limited_files(place, times, seed)


def _full_disk_here(times: int, seed: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="mooring-disk-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", name]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return Row("disk full (a small file system)", not_run="mounting a small file system needs root")
        try:
            with local(Path(name)) as place:
                return full_disk(place, Path(name), times, seed)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def _shared(backends: Backends, work: Callable[[Place], Row]) -> Row:
    with backends.shared() as place:
        return work(place)


def _restarts(backends: Backends, times: int, seed: int) -> Row:
    with backends.shared() as place:
        return database_restarts(place, backends.postgres, times, seed)


def _faults(backends: Backends, times: int, seed: int, name: str, rates: list[dict[str, float]]) -> Row:
    with backends.shared(proxied=True) as place:
        return bucket_faults(place, backends.behind[1], times, seed, name, rates)


def storm(
    times: int, seed: int = 1, *, only: str = "", skip: set[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Scenario by scenario: its name and its row.

    Args:
        times: see `scenarios`.
        seed: of everything random.
        only: a part of the names to run; "" for all.
        skip: names that are not run.
    """
    with contextlib.ExitStack() as stack:
        for scenario in scenarios(times, seed, Backends(stack, seed)):
            if only in scenario.name and scenario.name not in (skip or set()):
                yield scenario.name, scenario.run()
