"""add aliases and gate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add aliases and gate."""
    op.create_table(
        "alias_moves",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("tenant", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("adapter_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("alias", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("previous_version", sa.Integer(), nullable=True),
        sa.Column("came_from", sa.BigInteger(), nullable=True),
        sa.Column("move_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("decision_id", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("tenant", "move_id"),
        comment="Append-only history of aliases; `came_from` is the entry that a rollback goes back to.",
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("alias_moves", schema=None) as batch_op:
        batch_op.create_index("alias_moves_by_adapter", ["tenant", "adapter_id", "number"], unique=False)

    op.create_table(
        "gate_policies",
        sa.Column("tenant", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("policy", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("update_time", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("tenant"),
        comment="What a version must show to be published; NULL: the default. Publishing locks it.",
    )
    op.create_table(
        "adapter_aliases",
        sa.Column("tenant", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("adapter_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("alias", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("move", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter_id", "version"],
            ["adapters.tenant", "adapters.adapter_id", "adapters.version"],
            name="adapter_aliases_adapter",
        ),
        sa.PrimaryKeyConstraint("tenant", "adapter_id", "alias"),
        comment="Where aliases point; `move` is the number of the history's entry that put it there.",
    )
    op.create_table(
        "gate_decisions",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("tenant", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "decision_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("adapter_id", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("base_digest", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text().with_variant(sa.TEXT(collation="C"), "postgresql"), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("checks", sa.JSON(), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("policy_revision", sa.Integer(), nullable=False),
        sa.Column("evaluation_job_id", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter_id", "version"],
            ["adapters.tenant", "adapters.adapter_id", "adapters.version"],
            name="gate_decisions_adapter",
        ),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("tenant", "decision_id"),
        comment="Append-only: what the gate found, by which policy, and who asked.",
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("gate_decisions", schema=None) as batch_op:
        batch_op.create_index(
            "gate_decisions_by_adapter", ["tenant", "adapter_id", "version", "number"], unique=False
        )
