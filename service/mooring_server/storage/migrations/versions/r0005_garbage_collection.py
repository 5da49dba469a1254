"""Condemned objects, and leases of background tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Condemned objects, and leases of background tasks."""
    op.create_table(
        "condemned_objects",
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("condemn_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("object_key"),
        comment="Objects that are or were being deleted: no row may begin to refer to one.",
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        comment="Which replica does a background task, and until when no other one does.",
    )
