"""A job's row names its checkpoint."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Checkpoint key."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("checkpoint_key", sa.Text(), nullable=True))
    op.execute(
        "UPDATE jobs SET checkpoint_key = 'jobs/' || job_id || '/checkpoint.safetensors' "
        "WHERE state IN ('PENDING', 'RUNNING')"
    )
