"""The audit log: who did what, when, to what, with what outcome; entries chained by hashes.

Every entry's hash covers its fields and the hash before it, so that editing, deleting or reordering entries
breaks the chain at that place. The newest number and hash are kept in a row of their own, which each append
locks: one chain per database, without gaps, whichever replica writes. An entry about a change is part of the
change's transaction: neither exists without the other.

What the chain cannot see by itself: somebody who may write to the database could cut the log's end and set
the head back, or compute the whole chain anew. Against that a head that was recorded elsewhere helps: servers
write theirs to their log (`event: audit_head`), and `verify` takes one to hold the chain against.

Audited: changes, ends of jobs, generations (prompts as hashes) that the engine took or a content check
refused, refusals of the gate, exports, downloads of files that a job made, and calls that a role was denied.
Not audited: other reads, and callers without a valid credential, who could fill the log at will; those are
log lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection, select, update

from mooring_server.storage import schema
from mooring_server.storage.database import Database, insert_row

GENESIS = "sha256:" + "0" * 64
_PAGE = 1000
_AT_ONCE = 100


@dataclass(frozen=True)
class Actor:
    """Who acts in this context.

    Attributes:
        subject: who it is: a credential's id.
        role: what its credential allows.
        method: the call.
        request_id: of the call.
    """

    subject: str
    role: str
    method: str = ""
    request_id: str = ""


_SYSTEM = Actor("system", "system")
ACTOR: ContextVar[Actor] = ContextVar("mooring_actor")
"""Set by the edge for each call; what is outside of one, such as a job's runner, acts as the system."""


@dataclass(frozen=True)
class AuditEntry:
    """One entry; `number` counts 1, 2, 3, … and `time` is seconds since the epoch."""

    number: int
    time: float
    tenant: str
    subject: str
    role: str
    method: str
    resource: str
    decision: str
    prompt_hash: str
    digests: str
    request_id: str
    previous_hash: str
    hash: str

    def computed_hash(self) -> str:
        """`sha256:…` over every other field, as canonical JSON."""
        document = {name: value for name, value in asdict(self).items() if name != "hash"}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Head:
    """A place in the chain: an entry's number and hash. Number 0 is the beginning."""

    number: int = 0
    hash: str = GENESIS

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``<number>:sha256:<64 hex>``. Raises ValueError."""
        number, _, digest = text.partition(":")
        if not number.isdigit() or not digest.startswith("sha256:"):
            raise ValueError(f"{text!r} is not <number>:sha256:<hash>")
        return cls(int(number), digest)


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        head: the last entry that holds.
        problem: what is wrong after it; "" when all holds.
    """

    head: Head
    problem: str = ""

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


class Audit(Database):
    """The chain in SQL."""

    def audit(
        self,
        connection: Connection,
        tenant: str,
        what: str,
        resource: str,
        *,
        decision: str = "done",
        prompt_hash: str = "",
        digests: Sequence[str] = (),
    ) -> None:
        """Append an entry in the transaction of what it tells of; the last thing there, as it locks the head.

        Args:
            connection: a write transaction.
            tenant: whose thing it is.
            what: the act, where no call stands behind it; a call's own name counts otherwise.
            resource: its name.
            decision: "done"; "allowed"; "denied" by the caller's role; "refused" by a gate or a content
                check; of a job's end "succeeded", "failed" or "cancelled".
            prompt_hash: of a generation's prompt.
            digests: of the adapters concerned.
        """
        actor, heads = ACTOR.get(_SYSTEM), schema.audit_head
        query = select(heads.c.number, heads.c.hash).filter_by(id=1).with_for_update()
        head = connection.execute(query).one_or_none()
        if head is None:
            # the first entry ever: two replicas may come here at once, and one row comes of it
            first = self.upsert(heads).values(id=1, number=0, hash=GENESIS).on_conflict_do_nothing()
            connection.execute(first)
            head = connection.execute(query).one()
        entry = AuditEntry(
            number=head.number + 1,
            time=self.now(connection),
            tenant=tenant,
            subject=actor.subject,
            role=actor.role,
            method=actor.method or what,
            resource=resource,
            decision=decision,
            prompt_hash=prompt_hash,
            digests=",".join(digests),
            request_id=actor.request_id,
            previous_hash=head.hash,
            hash="",
        )
        digest = entry.computed_hash()
        insert_row(connection, schema.audit_log, asdict(entry) | {"hash": digest})
        connection.execute(update(heads).filter_by(id=1).values(number=entry.number, hash=digest))

    def record(self, tenant: str, what: str, resource: str, **values: Any) -> None:
        """Append an entry about something that changes nothing: a download, an export, a denied call."""
        self.record_all(tenant, what, [{"resource": resource, **values}])

    def record_all(self, tenant: str, what: str, entries: Sequence[dict[str, Any]]) -> None:
        """Append entries, given as arguments of `audit`; a hundred a transaction, not to stop others."""
        for start in range(0, len(entries), _AT_ONCE):
            with self.writing() as connection:
                for values in entries[start : start + _AT_ONCE]:
                    self.audit(connection, tenant, what, **values)

    def audit_head(self) -> Head:
        """The newest entry's place, as the database tells it."""
        with self.reading() as connection:
            return self._head(connection)

    def audit_entries(self, *, tenant: str = "", after: int = 0, last: int = 0) -> Iterator[AuditEntry]:
        """Entries in order.

        Args:
            tenant: only this one's; all when "".
            after: only those with a larger number.
            last: only so many of the newest; all when 0.
        """
        table = schema.audit_log
        query = select(table).where(table.c.number > after).order_by(table.c.number)
        if tenant:
            query = query.filter_by(tenant=tenant)
        if last:
            query = query.order_by(None).order_by(table.c.number.desc()).limit(last)
        with self.reading() as connection:
            rows = connection.execute(query.execution_options(yield_per=_PAGE))
            for row in reversed(rows.all()) if last else rows:
                yield _entry(row)

    def verify_audit(self, since: Head | None = None, *, expected: Sequence[Head] = ()) -> Verdict:
        """Check the chain.

        Args:
            since: a place that was verified before: it must still be as it was, and what follows is checked.
                None checks everything.
            expected: heads that were recorded elsewhere; each must be in the chain as it was recorded.
        """
        table = schema.audit_log
        place = since or Head()
        with self.reading() as connection:
            for head in (*([since] if since and since.number else []), *expected):
                found = connection.scalar(select(table.c.hash).filter_by(number=head.number))
                if head.number and found != head.hash:
                    state = "is gone" if found is None else f"has hash {found}"
                    return Verdict(Head(), f"entry {head.number} was recorded as {head.hash} and {state}")
            query = select(table).where(table.c.number > place.number).order_by(table.c.number)
            for row in connection.execute(query.execution_options(yield_per=_PAGE)):
                entry = _entry(row)
                problem = _problem(entry, place)
                if problem:
                    return Verdict(place, problem)
                place = Head(entry.number, entry.hash)
            head = self._head(connection)
        if head != place:
            problem = f"the log ends at entry {place.number}, its head says {head.number} ({head.hash})"
            return Verdict(place, f"{problem}: entries were cut off or added past the head")
        return Verdict(place)

    def _head(self, connection: Connection) -> Head:
        table = schema.audit_head
        row = connection.execute(select(table.c.number, table.c.hash).filter_by(id=1)).one_or_none()
        return Head() if row is None else Head(row.number, row.hash)


def _problem(entry: AuditEntry, before: Head) -> str:
    if entry.number != before.number + 1:
        return f"entry {before.number + 1} is missing: {entry.number} follows {before.number}"
    if entry.previous_hash != before.hash:
        return f"entry {entry.number} does not follow entry {before.number}: another one was there"
    if entry.hash != entry.computed_hash():
        return f"entry {entry.number} was changed: its hash is not that of its content"
    return ""


def _entry(row: Any) -> AuditEntry:
    return AuditEntry(**{field.name: getattr(row, field.name) for field in fields(AuditEntry)})
