"""Real servers that tests start for themselves: PostgreSQL, and two of S3.

moto honours `If-None-Match` and takes any credentials; rclone verifies signatures and ignores the header:
what works with both relies on neither. Where PostgreSQL's binaries are missing its tests are skipped, unless
MOORING_TEST_POSTGRES=require (CI): then they fail.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg
import pytest
from mooring_server.storage.buckets import BucketObjects

BUCKET = "mooring-test"
KEY, SECRET = "test-key", "test-secret"


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


class Postgres:
    """A throw-away server on a Unix socket; a context manager that starts and removes it."""

    def __init__(self) -> None:
        self.binaries, self._account = _postgres_bin(), _account()
        # Not below pytest's own folder: that one is closed to the account the server runs as.
        self.folder = Path(tempfile.mkdtemp(prefix="mooring-pg-"))
        self._schemas = 0

    def __enter__(self) -> Self:
        try:
            if self._account:
                os.chown(self.folder, self._account["user"], self._account["group"])
            self._run("initdb", "-A", "trust", "-U", "mooring", "-N", "--locale=C.UTF-8")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server, again perhaps."""
        options = (
            f"-k {self.folder} -c listen_addresses= -c fsync=off -c autovacuum=off -c max_connections=60"
        )
        self._run("pg_ctl", "-o", options, "-l", str(self.folder / "log"), "-w", "start")

    def stop(self) -> None:
        """Stop it as a crash would: connections break, nothing is flushed."""
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def new_url(self) -> str:
        """The URL of an empty schema: a database would cost a tenth of a second and 7 MB for each test."""
        self._schemas += 1
        name = f"test{self._schemas}"
        with psycopg.connect(
            host=str(self.folder), user="mooring", dbname="postgres", autocommit=True
        ) as admin:
            admin.execute(f"CREATE SCHEMA {name}")
        return f"postgresql://mooring@/postgres?host={self.folder}&options=-csearch_path%3D{name}"

    def new_database(self) -> str:
        """The URL of an empty database, for what works on a whole one."""
        self._schemas += 1
        name = f"database{self._schemas}"
        with psycopg.connect(
            host=str(self.folder), user="mooring", dbname="postgres", autocommit=True
        ) as admin:
            admin.execute(f"CREATE DATABASE {name}")
        return f"postgresql://mooring@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [self.binaries / program, "-D", self.folder / "data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self._account)


@dataclass(frozen=True)
class S3:
    """Where an S3 server is, and who may use it."""

    endpoint: str
    key: str = KEY
    secret: str = SECRET

    def objects(self, prefix: str = "", **changes: object) -> BucketObjects:
        """The bucket, as a server would open it; little patience."""
        options = {
            "endpoint": self.endpoint,
            "access_key_id": self.key,
            "secret_access_key": self.secret,
            "region": "us-east-1",
            "retry_seconds": 2.0,
        } | changes
        return BucketObjects(BUCKET, prefix, allow_http=True, **options)

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables, for a process that opens s3:// by URL."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }


@contextmanager
def moto() -> Iterator[S3]:
    """moto's server in a process of its own."""
    program = (
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start()\n"
        "print(*server.get_host_and_port(), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            host, port = server.stdout.readline().split()
            made = S3(f"http://{host}:{port}")
            request = urllib.request.Request(f"{made.endpoint}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request).close()
            yield made
        finally:
            server.kill()


@contextmanager
def rclone(folder: Path) -> Iterator[S3]:
    """`rclone serve s3` on a folder."""
    (folder / BUCKET).mkdir(parents=True)
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", str(folder)]
    options = [
        "--addr",
        "127.0.0.1:0",
        "--auth-key",
        f"{KEY},{SECRET}",
        "--config",
        "",
        "--vfs-cache-mode",
        "off",
    ]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield S3(found.group())
                    break
            else:
                pytest.fail("rclone did not start")
        finally:
            server.kill()
