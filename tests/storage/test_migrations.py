from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from mooring_server.cli import app
from mooring_server.errors import MooringError
from mooring_server.storage import migrate, schema
from mooring_server.storage.database import open_engine
from mooring_server.storage.store import Store
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import OperationalError
from store_rows import new_photo, new_subject, publish
from typer.testing import CliRunner

INITIAL = migrate.FOLDER / "versions" / "r0001_initial.py"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def run_initial(connection: Connection) -> None:
    """The form from before revisions, as `create_all` made it: no table of alembic's."""
    from alembic.operations import Operations

    spec = importlib.util.spec_from_file_location("r0001", INITIAL)
    module = importlib.util.module_from_spec(spec)
    with Operations.context(MigrationContext.configure(connection)):
        spec.loader.exec_module(module)
        module.upgrade()


def shape(connection: Connection) -> dict[str, Any]:
    """Everything that a schema can say of itself, but alembic's own table."""
    look = inspect(connection)
    found: dict[str, Any] = {}
    for table in sorted(set(look.get_table_names()) - {"alembic_version"}):
        found[table] = {
            "columns": {
                c["name"]: (str(c["type"]), c["nullable"], c["default"], c.get("autoincrement"))
                for c in look.get_columns(table)
            },
            "primary": look.get_pk_constraint(table)["constrained_columns"],
            "unique": sorted(u["column_names"] for u in look.get_unique_constraints(table)),
            "foreign": sorted(
                (f["constrained_columns"], f["referred_table"], f["referred_columns"], str(f["options"]))
                for f in look.get_foreign_keys(table)
            ),
            "indexes": sorted((i["name"], i["column_names"], i["unique"]) for i in look.get_indexes(table)),
        }
        if connection.dialect.name == "sqlite":
            made = connection.scalar(text(f"SELECT sql FROM sqlite_master WHERE name = '{table}'"))
            found[table]["autoincrement"] = "AUTOINCREMENT" in made
    return found


def test_revisions_make_what_the_schema_says(database_url: str, engine: Engine) -> None:
    assert migrate.upgrade(engine)[0] == "0001"
    with engine.connect() as connection, connection.begin():
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, schema.metadata) == [], (
            'run: python -m tools.revision "what it adds"'
        )
        migrated = shape(connection)
        schema.metadata.drop_all(connection)
        schema.metadata.create_all(connection)
        assert migrated == shape(connection)


def test_revisions_are_one_line_of_numbers() -> None:
    scripts = list(migrate._scripts().walk_revisions())[::-1]
    numbers = [f"{number:04d}" for number in range(1, len(scripts) + 1)]
    assert [script.revision for script in scripts] == numbers
    assert [script.down_revision for script in scripts] == [None, *numbers[:-1]]
    assert all(Path(script.path).name.startswith(f"r{script.revision}_") for script in scripts)


def test_a_database_from_before_revisions_is_adopted_with_all_its_rows(
    database_url: str, engine: Engine
) -> None:
    with engine.connect().execution_options(mooring_writes=True) as connection, connection.begin():
        run_initial(connection)
        connection.execute(schema.server_state.insert().values(key="schema", value=b"1"))
        connection.execute(schema.server_state.insert().values(key="page_key", value=b"k" * 32))
        connection.execute(
            text(
                "INSERT INTO subjects (tenant, subject_id, uid, display_name, class_noun, placeholder,"
                " rights, photo_count, next_position, create_time)"
                " VALUES ('acme', 'duck', 'u1', '', 'bird', '<duck>', '{\"basis\": \"OWNED\"}', 0, 0, 5.0)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO jobs (tenant, job_id, kind, spec, state, cancel_requested, last_event, attempts,"
                " crashes, worker, lease, create_time, update_time)"
                " VALUES ('acme', 'j1', 'train', '{}', 'PENDING', false, 1, 0, 0, '', '', 5.0, 5.0)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO job_events (tenant, job_id, seq, kind, payload, time)"
                " VALUES ('acme', 'j1', 1, 'state', '{\"state\": \"PENDING\"}', 5.0)"
            )
        )
    store = Store(database_url)
    try:
        assert migrate.current(engine) == migrate.head()
        assert store.get_subject("acme", "duck").uid == "u1"
        store.add_photos("acme", "duck", [new_photo(1)])
        assert store.claim_job("worker", 30.0).job_id == "j1"
        assert [event.seq for event in store.events("acme", "j1")] == [1, 2]
        publish(store)
        with store.reading() as connection:
            key = connection.scalar(text("SELECT value FROM server_state WHERE key = 'page_key'"))
        assert bytes(key) == b"k" * 32
    finally:
        store.close()


def test_replicas_that_start_together_migrate_once(database_url: str) -> None:
    start = threading.Barrier(4)

    def open_one(_: int) -> list[str]:
        engine = open_engine(database_url)
        start.wait()
        done = migrate.upgrade(engine)
        engine.dispose()
        return done

    with ThreadPoolExecutor(4) as pool:
        done = sorted(pool.map(open_one, range(4)), key=len)
    assert done[:3] == [[], [], []]
    assert done[3][0] == "0001"
    assert done[3][-1] == migrate.head()


def test_a_failing_revision_changes_nothing(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = migrate.command.upgrade

    def fail_at_the_end(*arguments: Any) -> None:
        real(*arguments)
        raise RuntimeError("power cut")

    monkeypatch.setattr(migrate.command, "upgrade", fail_at_the_end)
    with pytest.raises(RuntimeError, match="power cut"):
        migrate.upgrade(engine)
    with engine.connect() as connection, connection.begin():
        assert inspect(connection).get_table_names() == []
    monkeypatch.undo()
    assert migrate.upgrade(engine)


def test_foreign_keys_bind_again_after_a_migration(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/db")
    migrate.upgrade(engine)
    with engine.connect() as connection, connection.begin():
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()


def test_a_database_of_a_newer_server_is_left_alone(database_url: str, engine: Engine) -> None:
    Store(database_url).close()
    with engine.connect() as connection, connection.begin():
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MooringError, match="schema revision 9999; this server knows none after"):
        Store(database_url)
    assert migrate.current(engine) == "9999"


def test_an_up_to_date_database_needs_no_write(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/db")
    new_subject(store)
    with store.writing():  # the write lock is taken: another opener must not need it
        engine = open_engine(f"sqlite:///{tmp_path}/db?timeout=0.1")
        try:
            assert migrate.upgrade(engine) == []
        except OperationalError:
            pytest.fail("asked for the write lock")
        finally:
            engine.dispose()
    store.close()


def test_the_command_upgrades_and_tells(tmp_path: Path) -> None:
    def mooring(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["db", *arguments, "--state-dir", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    assert "none; this version needs" in mooring("current")
    assert f"the schema is at {migrate.head()}" in mooring("upgrade")
    assert "nothing to do" in mooring("upgrade")
    assert mooring("current") == f"{migrate.head()} (up to date)\n"
    assert mooring("current", "--json") == f'{{"current": "{migrate.head()}", "head": "{migrate.head()}"}}\n'


def test_the_command_refuses_other_databases() -> None:
    done = CliRunner().invoke(app, ["db", "current", "--database-url", "mysql://host/db"])
    assert done.exit_code == 2
    assert "storage needs" in done.output


def test_the_wheel_carries_the_revisions() -> None:
    root = Path(__file__).resolve().parents[2]
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(root))
    packed = {str(file.distribution_path) for file in builder.recurse_included_files()}
    here = "mooring_server/storage/migrations"
    assert {f"{here}/env.py", f"{here}/versions/{INITIAL.name}"} <= packed
