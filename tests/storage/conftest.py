"""Every store test runs twice: on SQLite and on a PostgreSQL server that the session starts for itself.

Without PostgreSQL's binaries its half is skipped, unless MOORING_TEST_POSTGRES=require (CI): then it fails.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from mooring_server.storage.store import Store

_numbers = itertools.count()


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def _postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    if found or on_path:
        return (found[-1] if found else Path(on_path)).parent
    message = "PostgreSQL's binaries (initdb) are not on this machine: apt-get install postgresql"
    if os.environ.get("MOORING_TEST_POSTGRES", "require" if os.environ.get("CI") else "") == "require":
        pytest.fail(message)
    pytest.skip(message)


def _account() -> dict[str, int]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid}
    return {}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A throw-away server on a Unix socket; yields the socket's folder."""
    binaries, account = _postgres_bin(), _account()
    # Not below pytest's own folder: that one is closed to the account the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="mooring-pg-"))
    try:
        if account:
            os.chown(folder, account["user"], account["group"])

        def run(program: str, *arguments: str) -> None:
            command = [binaries / program, "-D", folder / "data", *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **account)

        run("initdb", "-A", "trust", "-U", "mooring", "-N")
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c autovacuum=off -c max_connections=60"
        run("pg_ctl", "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield str(folder)
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/mooring.db"
    socket_folder = request.getfixturevalue("postgres_server")
    # A schema of its own: a database would cost a tenth of a second and 7 MB for each test.
    name = f"test{next(_numbers)}"
    with psycopg.connect(host=socket_folder, user="mooring", dbname="postgres", autocommit=True) as admin:
        admin.execute(f"CREATE SCHEMA {name}")
    return f"postgresql://mooring@/postgres?host={socket_folder}&options=-csearch_path%3D{name}"


@pytest.fixture
def open_store(database_url: str, clock: Clock) -> Iterator[Callable[[], Store]]:
    """Opens stores on one database, as several processes would."""
    stores: list[Store] = []

    def open_() -> Store:
        stores.append(Store(database_url, clock=clock))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()
