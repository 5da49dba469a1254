"""add batch rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add batch rows."""
    op.create_table(
        "batch_rows",
        sa.Column("tenant", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("job_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("record", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["tenant", "job_id"], ["jobs.tenant", "jobs.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant", "job_id", "row"),
        sa.UniqueConstraint("tenant", "job_id", "position"),
        comment="Rows of a batch that are done; position counts them in the order in which they were.",
    )
