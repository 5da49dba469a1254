"""Tables. Every row belongs to a tenant, and the tenant leads every key and index.

Plain columns for what queries filter or order by; JSON documents for what they only carry. SQLite and
PostgreSQL get the same schema. Times are doubles (seconds since the epoch).

A change here needs a revision: `python -m tools.revision "what it adds"` (docs/storage.md); a test compares.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql

metadata = MetaData()

# Byte order in both databases, whatever PostgreSQL's locale: pages are ordered by ids.
_ID = Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")


def _number() -> Column[int]:
    """The order of creation, which lists follow; never given twice, so that page tokens stay valid."""
    integer = BigInteger().with_variant(Integer, "sqlite")
    return Column("number", integer, primary_key=True, autoincrement=True)


server_state = Table(
    "server_state",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    comment="Schema version and the key that signs page tokens.",
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("expires", Double, nullable=False),
    comment="Which replica does a background task, and until when no other one does.",
)

condemned_objects = Table(
    "condemned_objects",
    metadata,
    Column("object_key", Text, primary_key=True),
    Column("condemn_time", Double, nullable=False),
    comment="Objects that are or were being deleted: no row may begin to refer to one.",
)

requests = Table(
    "requests",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("rpc", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("payload_hash", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    comment="Idempotency: what a request_id made, and from which payload.",
)

api_keys = Table(
    "api_keys",
    metadata,
    _number(),
    Column("key_id", _ID, nullable=False, unique=True),
    Column("tenant", _ID, nullable=False),
    Column("role", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("create_time", Double, nullable=False),
    Column("expire_time", Double),
    Column("revoke_time", Double),
    Index("api_keys_by_tenant", "tenant", "number"),
    sqlite_autoincrement=True,
    comment="API keys by their public id; of the secret only its hash.",
)

device_use = Table(
    "device_use",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("day", Integer, primary_key=True),
    Column("seconds", Double, nullable=False),
    comment="Engine time by tenant and UTC day (days since the epoch), of all replicas.",
)

subjects = Table(
    "subjects",
    metadata,
    _number(),
    Column("tenant", _ID, nullable=False),
    Column("subject_id", _ID, nullable=False),
    Column("uid", Text, nullable=False, unique=True),
    Column("display_name", Text, nullable=False),
    Column("class_noun", Text, nullable=False),
    Column("placeholder", Text, nullable=False),
    Column("rights", JSON, nullable=False),
    Column("photo_count", Integer, nullable=False),
    Column("next_position", Integer, nullable=False),
    Column("create_time", Double, nullable=False),
    UniqueConstraint("tenant", "subject_id"),
    Index("subjects_by_tenant", "tenant", "number"),
    sqlite_autoincrement=True,
)

photos = Table(
    "photos",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("subject_id", _ID, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("filename", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("object_key", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("create_time", Double, nullable=False),
    ForeignKeyConstraint(
        ["tenant", "subject_id"], ["subjects.tenant", "subjects.subject_id"], ondelete="CASCADE"
    ),
    UniqueConstraint("tenant", "subject_id", "sha256"),
)

jobs = Table(
    "jobs",
    metadata,
    _number(),
    Column("tenant", _ID, nullable=False),
    Column("job_id", _ID, nullable=False),
    Column("kind", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress", JSON),
    Column("result", JSON),
    Column("error", JSON),
    Column("last_event", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("lease", Text, nullable=False),
    Column("lease_expires", Double),
    Column("create_time", Double, nullable=False),
    Column("update_time", Double, nullable=False),
    Column("start_time", Double),
    Column("end_time", Double),
    Column("checkpoint_key", Text),
    Column("traceparent", Text),
    UniqueConstraint("tenant", "job_id"),
    Index("jobs_by_tenant", "tenant", "number"),
    Index("jobs_to_claim", "state", "lease_expires", "number"),
    Index("jobs_by_turn", "tenant", "kind", "start_time"),
    sqlite_autoincrement=True,
)

job_events = Table(
    "job_events",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("job_id", _ID, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("time", Double, nullable=False),
    ForeignKeyConstraint(["tenant", "job_id"], ["jobs.tenant", "jobs.job_id"], ondelete="CASCADE"),
)

batch_rows = Table(
    "batch_rows",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("job_id", _ID, primary_key=True),
    Column("row", Integer, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("record", JSON, nullable=False),
    ForeignKeyConstraint(["tenant", "job_id"], ["jobs.tenant", "jobs.job_id"], ondelete="CASCADE"),
    UniqueConstraint("tenant", "job_id", "position"),
    comment="Rows of a batch that are done; position counts them in the order in which they were.",
)

adapter_heads = Table(
    "adapter_heads",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("adapter_id", _ID, primary_key=True),
    Column("last_version", Integer, nullable=False),
    comment="The version counter: a version number is never used twice, even after deletion.",
)

adapters = Table(
    "adapters",
    metadata,
    _number(),
    Column("tenant", _ID, nullable=False),
    Column("adapter_id", _ID, nullable=False),
    Column("version", Integer, nullable=False),
    Column("object_key", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("base_digest", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("subject_id", _ID, nullable=False),
    Column("job_id", _ID),
    Column("class_noun", Text, nullable=False),
    Column("placeholder", Text, nullable=False),
    Column("rights", JSON, nullable=False),
    Column("certificate", JSON, nullable=False),
    Column("summary", JSON, nullable=False),
    Column("create_time", Double, nullable=False),
    Column("delete_time", Double),
    ForeignKeyConstraint(
        ["tenant", "adapter_id"], ["adapter_heads.tenant", "adapter_heads.adapter_id"], name="adapters_head"
    ),
    UniqueConstraint("tenant", "adapter_id", "version"),
    Index("adapters_by_tenant", "tenant", "number"),
    UniqueConstraint("tenant", "job_id"),  # a job publishes once, however often it is resumed
    sqlite_autoincrement=True,
)

gate_policies = Table(
    "gate_policies",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("policy", JSON(none_as_null=True)),
    Column("actor", Text, nullable=False),
    Column("update_time", Double),
    comment="What a version must show to be published; NULL: the default. Publishing locks it.",
)

gate_decisions = Table(
    "gate_decisions",
    metadata,
    _number(),
    Column("tenant", _ID, nullable=False),
    Column("decision_id", _ID, nullable=False),
    Column("adapter_id", _ID, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("base_digest", Text, nullable=False),
    Column("alias", _ID, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("checks", JSON, nullable=False),
    Column("policy", JSON, nullable=False),
    Column("policy_revision", Integer, nullable=False),
    Column("evaluation_job_id", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    ForeignKeyConstraint(
        ["tenant", "adapter_id", "version"],
        ["adapters.tenant", "adapters.adapter_id", "adapters.version"],
        name="gate_decisions_adapter",
    ),
    UniqueConstraint("tenant", "decision_id"),
    Index("gate_decisions_by_adapter", "tenant", "adapter_id", "version", "number"),
    comment="Append-only: what the gate found, by which policy, and who asked.",
    sqlite_autoincrement=True,
)

adapter_aliases = Table(
    "adapter_aliases",
    metadata,
    Column("tenant", _ID, primary_key=True),
    Column("adapter_id", _ID, primary_key=True),
    Column("alias", _ID, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("move", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["tenant", "adapter_id", "version"],
        ["adapters.tenant", "adapters.adapter_id", "adapters.version"],
        name="adapter_aliases_adapter",
    ),
    comment="Where aliases point; `move` is the number of the history's entry that put it there.",
)

alias_moves = Table(
    "alias_moves",
    metadata,
    _number(),
    Column("tenant", _ID, nullable=False),
    Column("adapter_id", _ID, nullable=False),
    Column("alias", _ID, nullable=False),
    Column("kind", Text, nullable=False),
    Column("version", Integer),
    Column("previous_version", Integer),
    Column("came_from", BigInteger),
    Column("move_id", _ID, nullable=False),
    Column("decision_id", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    UniqueConstraint("tenant", "move_id"),
    Index("alias_moves_by_adapter", "tenant", "adapter_id", "number"),
    comment="Append-only history of aliases; `came_from` is the entry that a rollback goes back to.",
    sqlite_autoincrement=True,
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("tenant", _ID, nullable=False),
    Column("subject", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("prompt_hash", Text, nullable=False),
    Column("digests", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("previous_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Index("audit_log_by_tenant", "tenant", "number"),
    comment="Append-only; every entry's hash covers its fields and the hash before it.",
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    comment="One row: the newest entry of the audit log. Appending locks it.",
)
