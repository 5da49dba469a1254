"""Schema revisions: bring a database to the form this version of the server knows.

All pending revisions run in one transaction, under a lock: of several replicas that start together one
migrates and the others wait, and a crash leaves the form from before. There are no downgrades: a revision
that dropped something could not bring it back, so the way back is the backup (docs/operations.md).
"""

from __future__ import annotations

import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, func, inspect, select

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema

FOLDER = Path(__file__).parent / "migrations"
_BEFORE_REVISIONS = "0001"  # the form that databases had before they were numbered
_LOCK = 0x4D6F6F72  # PostgreSQL advisory lock


@functools.cache
def head() -> str:
    """The newest revision that this server knows."""
    newest = _scripts().get_current_head()
    assert newest is not None
    return newest


def current(engine: Engine) -> str | None:
    """The database's revision; None for one that is empty or older than revisions."""
    with engine.connect() as connection, connection.begin():
        return _current(connection)


def upgrade(engine: Engine) -> list[str]:
    """Run what is pending. A database that is up to date is only looked at, and needs no right to alter it.

    Returns:
        The revisions that were run, oldest first.

    Raises:
        MooringError: INTERNAL when a newer server has migrated it.
    """
    if current(engine) == head():
        return []
    sqlite = engine.dialect.name == "sqlite"
    with engine.connect().execution_options(mooring_writes=True) as connection:
        driver = connection.connection.driver_connection
        if sqlite and driver is not None:
            # Copying a table (SQLite's way to alter one) drops the old one, which would cascade. The switch
            # has no effect inside a transaction, so it is set around it; the result is checked before commit.
            driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                if not sqlite:
                    connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
                done = _run(connection)
                if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                    raise RuntimeError(f"the migration left rows that refer to nothing: {broken[:3]}")
        finally:
            if sqlite and driver is not None:
                driver.execute("PRAGMA foreign_keys=ON")
    return done


def _run(connection: Connection) -> list[str]:
    scripts, before = _scripts(), _current(connection)
    known = {script.revision for script in scripts.walk_revisions()}
    if before is not None and before not in known:
        raise MooringError(
            Reason.INTERNAL,
            f"The database has schema revision {before}; this server knows none after {head()}.",
            remedy="Start the version that migrated it or a newer one, or restore the backup from before.",
        )
    config = alembic_config()
    config.attributes["connection"] = connection
    if before is None and inspect(connection).has_table(schema.server_state.name):
        command.stamp(config, _BEFORE_REVISIONS)
        before = _BEFORE_REVISIONS
    done = (
        [script.revision for script in scripts.iterate_revisions("head", before)] if before != head() else []
    )
    command.upgrade(config, "head")
    return done[::-1]


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def alembic_config() -> Config:
    """Where alembic finds our revisions, and how new ones are named."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "r%%(rev)s_%%(slug)s")
    return config


@functools.cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(alembic_config())
