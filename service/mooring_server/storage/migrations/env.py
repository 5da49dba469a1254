"""What alembic runs: the revisions, inside the transaction that `storage.migrate` has begun."""

from __future__ import annotations

from alembic import context
from mooring_server.storage import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    render_as_batch=True,  # SQLite cannot alter a column: its table is copied
    compare_type=True,
    compare_server_default=True,
)
context.run_migrations()
