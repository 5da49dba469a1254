from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mooring_server.cli import app
from mooring_server.errors import StorageUnavailableError
from mooring_server.storage import schema
from mooring_server.storage.database import open_engine, use_wal
from mooring_server.storage.store import Store
from sqlalchemy import update
from store_rows import new_subject
from typer.testing import CliRunner


def test_sqlite_is_set_up_to_survive_a_power_cut(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/db")
    with store.reading() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_a_reader_is_not_held_up_by_a_writer(store: Store) -> None:
    new_subject(store)
    with store.writing() as connection:
        connection.execute(update(schema.subjects).values(display_name="changed"))
        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(store.get_subject, "acme", "duck").result(timeout=240)
    assert seen.display_name == ""
    assert store.get_subject("acme", "duck").display_name == "changed"


def test_a_failed_transaction_changes_nothing(store: Store) -> None:
    new_subject(store)

    def fail() -> None:
        with store.writing() as connection:
            connection.execute(update(schema.subjects).values(display_name="changed"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.get_subject("acme", "duck").display_name == ""


def test_many_threads_of_two_processes_share_the_database(open_store) -> None:
    first, second = open_store(), open_store()

    def work(number: int) -> None:
        store = (first, second)[number % 2]
        for step in range(3):
            store.create_job("acme", "train", {"worker": number, "step": step})
            store.list_jobs("acme")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(first.list_jobs("acme")[0]) == 24


def test_replicas_may_start_together(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(database_url), range(4)))
    new_subject(stores[0])
    assert all(store.get_subject("acme", "duck").subject_id == "duck" for store in stores)
    for store in stores:
        store.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/db"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="storage needs"):
        Store(url)


def test_the_shared_clock_is_about_now(database_url: str) -> None:
    store = Store(database_url)
    with store.reading() as connection:
        assert abs(store.now(connection) - time.time()) < 60
    store.close()


def test_a_replica_that_freezes_in_a_transaction_stops_the_others_for_a_moment_only(postgres, monkeypatch):
    """It holds the end of the audit log, which every change adds to, and its machine may never come back."""
    monkeypatch.setattr("mooring_server.storage.database._IDLE_SECONDS", 1)
    url = postgres.new_url()
    frozen, other = Store(url), Store(url)

    def thaws() -> None:
        with frozen.writing() as connection:
            frozen.audit(connection, "acme", "Freeze", "here")
            assert other.create_job("acme", "train", {}).tenant == "acme"  # waits for the lock
            frozen.audit(connection, "acme", "Freeze", "there")

    with pytest.raises(StorageUnavailableError):
        thaws()
    assert [entry.method for entry in other.audit_entries()] == ["CreateJob/train"]
    assert other.verify_audit().intact
    assert frozen.get_job("acme", other.list_jobs("acme")[0][0].job_id)  # and goes on
    frozen.close()
    other.close()


def test_what_the_url_says_of_the_network_counts(monkeypatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr("psycopg.connect", lambda *_, **options: given.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_engine("postgresql://somebody@somewhere/else?connect_timeout=3").connect()
    assert int(given["connect_timeout"]) == 3
    assert given["keepalives_idle"] == 30


@pytest.mark.parametrize("command", [["gc"], ["db", "verify"], ["db", "upgrade"], ["db", "current"]])
def test_a_database_that_is_away_is_said_to_be_that(tmp_path: Path, command: list[str]) -> None:
    nowhere = f"postgresql://mooring@/mooring?host={tmp_path}"
    with pytest.raises(StorageUnavailableError, match="The database is away"):
        Store(nowhere)
    done = CliRunner().invoke(app, [*command, "--database-url", nowhere, *_objects_of(command, tmp_path)])
    assert done.exit_code == 5
    assert "The database is away." in done.output
    assert "Traceback" not in done.output


def _objects_of(command: list[str], folder: Path) -> list[str]:
    reads_objects = command[-1] in {"gc", "verify"}
    return ["--objects-url", str(folder / "objects")] if reads_objects else []


class Locked:
    """A connection whose file others hold for its first statements."""

    def __init__(self, times: int, code: int = sqlite3.SQLITE_BUSY) -> None:
        self.left, self.code = times, code

    def execute(self, statement: str) -> None:
        assert statement == "PRAGMA journal_mode=WAL"
        self.left -= 1
        if self.left >= 0:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = self.code
            raise error


def test_a_fresh_file_that_another_process_sets_up_is_waited_for() -> None:
    use_wal(Locked(3))
    with pytest.raises(sqlite3.OperationalError):
        use_wal(Locked(10**9), seconds=0.05)
    with pytest.raises(sqlite3.OperationalError):
        use_wal(Locked(1, sqlite3.SQLITE_READONLY))


def test_many_may_open_a_fresh_file_at_once(tmp_path: Path) -> None:
    """Raced for real: SQLite does not wait by itself where the journal mode changes."""
    together = threading.Barrier(8)

    def start(path: Path) -> str:
        together.wait()
        engine = open_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
        engine.dispose()
        return mode

    with ThreadPoolExecutor(8) as threads:
        for number in range(10):
            assert set(threads.map(start, [tmp_path / f"{number}.db"] * 8)) == {"wal"}
