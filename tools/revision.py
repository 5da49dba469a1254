"""A new schema revision: the difference between storage/schema.py and the revisions so far.

    python -m tools.revision "add api keys"

writes storage/migrations/versions/r<next number>_add_api_keys.py. Read it before it is committed: a renamed
column looks like one that was dropped and another that was added, and a column that must not be NULL needs a
server_default for the rows that exist.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from mooring_server.storage import migrate
from mooring_server.storage.database import open_engine


def create(message: str) -> Path:
    """Write the next revision; returns its file.

    Raises:
        ValueError: the schema has not changed.
    """
    number = f"{int(migrate.head()) + 1:04d}"
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(f"sqlite:///{folder}/db")
        migrate.upgrade(engine)
        config = migrate.alembic_config()
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            script = command.revision(config, message, autogenerate=True, rev_id=number)
        engine.dispose()
    assert script is not None
    assert not isinstance(script, list)
    path = Path(script.path)
    lines = path.read_text(encoding="utf-8").splitlines()
    if "    pass" in lines:
        path.unlink()
        raise ValueError("the schema is what the revisions make already")
    path.write_text("\n".join(line for line in lines if "# ###" not in line) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(create(sys.argv[1]))  # noqa: T201 - a command
    except ValueError as error:
        sys.exit(str(error))
