"""`mooring db`, `gc`, `backup`, `restore`: what is kept, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mooring_server.cli_options import JsonOption, StateDirOption
from mooring_server.cli_output import EXIT_CODE_HELP, errors_shown, fail, out, print_json
from mooring_server.cli_server import announced, resolve_state_dir

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from mooring_server.storage.objects import ObjectStore

db = typer.Typer(
    no_args_is_help=True,
    help="Look at the database and what it names, upgrade its schema, without a server.",
    epilog=EXIT_CODE_HELP,
)

DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database-url",
        envvar="MOORING_DATABASE_URL",
        metavar="URL",
        help="PostgreSQL or SQLite. Default: the SQLite file in the state directory.",
    ),
]


ObjectsOption = Annotated[
    str,
    typer.Option(
        "--objects-url",
        envvar="MOORING_OBJECTS_URL",
        metavar="URL",
        help="s3://bucket/prefix or a folder. Default: objects in the state directory.",
    ),
]


def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; delete nothing.")] = False,
    orphan_hours: Annotated[
        float,
        typer.Option(
            envvar="MOORING_GC_ORPHAN_HOURS", min=1, help="Objects that nothing refers to stay this long."
        ),
    ] = 24.0,
    result_days: Annotated[
        float,
        typer.Option(
            envvar="MOORING_GC_RESULT_DAYS", min=0, help="Artifacts of an ended job stay this long."
        ),
    ] = 90.0,
    deleted_adapter_days: Annotated[
        float,
        typer.Option(
            envvar="MOORING_GC_DELETED_ADAPTER_DAYS", min=0, help="Files of a deleted adapter stay this long."
        ),
    ] = 7.0,
    database_url: DatabaseOption = "",
    objects_url: ObjectsOption = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete objects that nothing refers to: left by crashes, of ended jobs, of deleted adapters.

    Servers do it by themselves every hour. Safe beside them: whoever begins to
    refer to an object and whoever deletes it see each other.

    \b
    mooring gc --dry-run
    mooring gc --database-url postgresql://mooring@db/mooring --objects-url s3://bucket/mooring
    """
    from mooring_server.storage.garbage import Retention, collect
    from mooring_server.storage.store import Store

    with errors_shown():
        url, objects = _objects(database_url, objects_url, state_dir)
        retention = Retention(orphan_hours * 3600, result_days * 86_400, deleted_adapter_days * 86_400)
        store = Store(url)
        found = collect(store, objects, retention, dry_run=dry_run)
        store.close()
    if as_json:
        print_json({"seen": found.seen, "keys": found.keys, "size_bytes": found.size, "deleted": not dry_run})
        return
    for key in found.keys:
        out.print(key, markup=False, soft_wrap=True)
    said = "would go" if dry_run else "deleted"
    out.print(f"{len(found.keys)} of {found.seen} objects {said}, {found.size:,} bytes")


def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    *,
    database_url: DatabaseOption = "",
    objects_url: ObjectsOption = "",
    state_dir: StateDirOption = None,
) -> None:
    """Copy a SQLite database and its objects into a new folder, while the server runs.

    For PostgreSQL and a bucket use their own tools: docs/operations.md says how.

    \b
    mooring backup /backups/mooring-$(date +%F)
    """
    from mooring_server.storage import backup as backups

    with errors_shown():
        made = backups.backup(*_objects(database_url, objects_url, state_dir), directory)
    out.print(f"{made.objects} objects and the database, {made.size:,} bytes, in {directory}")


def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The backup.", exists=True)],
    *,
    database_url: DatabaseOption = "",
    objects_url: ObjectsOption = "",
    state_dir: StateDirOption = None,
) -> None:
    """Put a backup into an empty state directory. No server may run on it.

    Jobs that ran when the backup was made are taken up again by the next server.

    \b
    mooring restore /backups/mooring-2026-01-31 --state-dir ./restored
    mooring serve --state-dir ./restored
    """
    from mooring_server.storage import backup as backups

    with errors_shown(), announced(resolve_state_dir(state_dir)):
        made = backups.restore(directory, *_objects(database_url, objects_url, state_dir))
    out.print(f"{made.objects} objects and the database, {made.size:,} bytes, restored")


@db.command()
def verify(
    *,
    database_url: DatabaseOption = "",
    objects_url: ObjectsOption = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every object and compare it with its digest; look for those that photos and adapters need.

    After a restore, or after a disk or a bucket has failed. Changes nothing;
    servers may run. Ends with 1 where something is missing or damaged.

    \b
    mooring db verify
    mooring db verify --database-url postgresql://mooring@db/mooring --objects-url s3://bucket/mooring
    """
    from mooring_server.storage import verify as verifying
    from mooring_server.storage.store import Store

    with errors_shown():
        url, objects = _objects(database_url, objects_url, state_dir)
        store = Store(url)
        found = verifying.verify(store, objects)
        store.close()
    if as_json:
        print_json(
            {
                "objects": found.objects,
                "size_bytes": found.size,
                "missing": found.missing,
                "damaged": found.damaged,
            }
        )
    else:
        for what, keys in (("missing", found.missing), ("damaged", found.damaged)):
            for key in keys:
                out.print(f"{what} {key}", markup=False, soft_wrap=True)
        out.print(f"{found.objects} objects, {found.size:,} bytes")
    if found.missing or found.damaged:
        raise fail(
            f"{len(found.missing)} objects are missing, {len(found.damaged)} damaged.",
            "Restore these keys from a backup; make what they belong to again where there is none.",
        )


@db.command()
def upgrade(*, database_url: DatabaseOption = "", state_dir: StateDirOption = None) -> None:
    """Bring the database to this version's schema.

    A server does the same when it starts. Run it before, with an account that
    may alter tables, where the servers' own account may not.

    \b
    mooring db upgrade
    mooring db upgrade --database-url postgresql://mooring@db/mooring
    """
    from mooring_server.storage import migrate
    from mooring_server.storage.database import typed

    with errors_shown(), typed():
        engine = _engine(database_url, state_dir)
        done = migrate.upgrade(engine)
        engine.dispose()
    out.print(f"{len(done)} revisions run: {', '.join(done)}" if done else "nothing to do", end="")
    out.print(f"; the schema is at {migrate.head()}")


@db.command()
def current(
    *, database_url: DatabaseOption = "", state_dir: StateDirOption = None, as_json: JsonOption = False
) -> None:
    """Print the database's schema revision, and the one this version needs.

    \b
    mooring db current
    mooring db current --json
    """
    from mooring_server.storage import migrate
    from mooring_server.storage.database import typed

    with errors_shown(), typed():
        engine = _engine(database_url, state_dir)
        found = migrate.current(engine)
        engine.dispose()
    if as_json:
        print_json({"current": found, "head": migrate.head()})
    elif found == migrate.head():
        out.print(f"{found} (up to date)")
    else:
        out.print(f"{found or 'none'}; this version needs {migrate.head()}: mooring db upgrade")


def _engine(database_url: str, state_dir: StateDirOption) -> Engine:
    from sqlalchemy.exc import ArgumentError

    from mooring_server.storage.database import open_engine

    try:
        return open_engine(_url(database_url, state_dir))
    except (ValueError, ArgumentError) as error:
        raise fail(str(error), "Give postgresql://user@host/name or sqlite:///path.", code=2) from None


def _url(database_url: str, state_dir: StateDirOption) -> str:
    return database_url or f"sqlite:///{resolve_state_dir(state_dir) / 'mooring.db'}"


def _objects(database_url: str, objects_url: str, state_dir: StateDirOption) -> tuple[str, ObjectStore]:
    """The database's URL, checked by `_engine`, and the objects that go with it."""
    from mooring_server.storage.buckets import open_objects

    _engine(database_url, state_dir).dispose()
    try:
        objects = open_objects(objects_url or str(resolve_state_dir(state_dir) / "objects"))
    except ValueError as error:
        raise fail(str(error), "Set --objects-url or MOORING_OBJECTS_URL.", code=2) from None
    return _url(database_url, state_dir), objects
