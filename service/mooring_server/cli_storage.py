"""`mooring db …`: the database itself, without a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mooring_server.cli_options import JsonOption, StateDirOption
from mooring_server.cli_output import EXIT_CODE_HELP, errors_shown, fail, out, print_json
from mooring_server.cli_server import resolve_state_dir

if TYPE_CHECKING:
    from sqlalchemy import Engine

db = typer.Typer(
    no_args_is_help=True,
    help="Look at the database's schema and upgrade it, without a server.",
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

    with errors_shown():
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

    with errors_shown():
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

    url = database_url or f"sqlite:///{resolve_state_dir(state_dir) / 'mooring.db'}"
    try:
        return open_engine(url)
    except (ValueError, ArgumentError) as error:
        raise fail(str(error), "Give postgresql://user@host/name or sqlite:///path.", code=2) from None
