"""index jobs by turn."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Index jobs by turn."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("jobs_by_turn", ["tenant", "kind", "start_time"], unique=False)
