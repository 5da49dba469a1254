"""Which objects nothing refers to any more, and taking them away without ever taking one that is needed.

Kept is, by where a key lies:

    photos/…        what a photo's row names
    adapters/…      what an adapter's row names, for a while also after its deletion; files of unfinished jobs
    jobs/<job>/…    everything of an unfinished job; of an ended one its artifacts, previews and rows, for a
                    while: a backup whose database is older than its objects goes on with these rows

Everything else there is garbage once it is older than a grace: what crashed uploads, imports and runners
left, checkpoints of ended jobs. Keys elsewhere are not ours to judge and stay.

Looking and deleting cannot be one atomic act, so a key is *condemned* in between, in the same kind of
transaction that would refer to it: whoever comes second sees the first. A writer of a condemned key is
refused and starts over with a new key (keys hold an id that is new, so a condemned one never comes back); a
collector that finds a reference leaves the key alone. The grace only keeps such refusals rare: correctness
does not rest on it, nor on clocks. tests/storage/test_garbage.py tries the interleavings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from sqlalchemy import Connection, delete, select

from mooring_server.storage import schema
from mooring_server.storage.database import Database
from mooring_server.storage.models import FINAL_STATES
from mooring_server.storage.objects import LocalObjects, ObjectEntry, ObjectStore

log = logging.getLogger(__name__)

_DAY = 86_400.0
_BATCH = 200  # keys judged in one transaction
_RESULTS = ("artifacts/", "previews/", "rows.")
_MEMORY_SECONDS = 30 * _DAY  # how long condemned keys and request ids are remembered


@dataclass(frozen=True)
class Retention:
    """How long things stay after their last use, in seconds.

    Attributes:
        orphans: objects that nothing refers to, from when they were written.
        results: artifacts, previews and rows of an ended job, from its end.
        deleted_adapters: files of a deleted adapter, from its deletion.
    """

    orphans: float = _DAY
    results: float = 90 * _DAY
    deleted_adapters: float = 7 * _DAY


@dataclass
class Collected:
    """What a sweep found.

    Attributes:
        seen: objects looked at.
        keys: those that nothing refers to, in the order they were found.
        size: their bytes.
    """

    seen: int = 0
    keys: list[str] = field(default_factory=list)
    size: int = 0


class Garbage(Database):
    """The database's side: which keys are needed."""

    def unneeded(self, keys: Sequence[str], retention: Retention) -> list[str]:
        """Those of the keys that nothing refers to at this moment. Changes nothing."""
        with self.reading() as connection:
            return self._unneeded(connection, keys, retention)

    def condemn(self, keys: Sequence[str], retention: Retention) -> list[str]:
        """Those of the keys that nothing refers to, and from now on nothing can: they may be deleted."""
        with self.writing() as connection:
            self.lock_objects(connection, exclusive=True)
            found = self._unneeded(connection, keys, retention)
            if found:
                now = self.now(connection)
                fresh = self.upsert(schema.condemned_objects).on_conflict_do_nothing()
                connection.execute(fresh, [{"object_key": key, "condemn_time": now} for key in found])
        return found

    def forget(self) -> None:
        """Drop condemned keys and request ids that are too old to come up again."""
        with self.writing() as connection:
            before = self.now(connection) - _MEMORY_SECONDS
            condemned, requests = schema.condemned_objects, schema.requests
            connection.execute(delete(condemned).where(condemned.c.condemn_time < before))
            connection.execute(delete(requests).where(requests.c.create_time < before))

    def take_turn(self, name: str, holder: str, seconds: float) -> bool:
        """Take the lease of a background task; False while another holder has it.

        A lease that is left to run out spaces the task's runs over all replicas.
        """
        table = schema.leases
        with self.writing() as connection:
            now = self.now(connection)
            taken = self.upsert(table).values(name=name, holder=holder, expires=now + seconds)
            taken = taken.on_conflict_do_update(
                index_elements=[table.c.name],
                set_={"holder": holder, "expires": now + seconds},
                where=table.c.expires <= now,
            )
            return connection.execute(taken.returning(table.c.name)).first() is not None

    def _unneeded(self, connection: Connection, keys: Sequence[str], retention: Retention) -> list[str]:
        now = self.now(connection)
        needed = {
            *self._needed_photos(connection, keys),
            *self._needed_adapters(connection, keys, now - retention.deleted_adapters),
            *self._needed_by_jobs(connection, keys, now - retention.results),
        }
        ours = ("photos/", "adapters/", "jobs/")
        return [key for key in keys if key.startswith(ours) and key not in needed]

    def _needed_photos(self, connection: Connection, keys: Sequence[str]) -> Iterator[str]:
        column = schema.photos.c.object_key
        yield from connection.scalars(select(column).where(column.in_(_below("photos/", keys))))

    def _needed_adapters(self, connection: Connection, keys: Sequence[str], since: float) -> Iterator[str]:
        table = schema.adapters
        query = select(table.c.object_key).where(
            table.c.object_key.in_(_below("adapters/", keys)),
            table.c.delete_time.is_(None) | (table.c.delete_time > since),
        )
        yield from connection.scalars(query)

    def _needed_by_jobs(self, connection: Connection, keys: Sequence[str], since: float) -> Iterator[str]:
        """Files that runners make: `adapters/<job>.…` and `jobs/<job>/…`."""
        owners = {
            key: key.split("/")[1].split(".")[0] for key in keys if key.startswith(("adapters/", "jobs/"))
        }
        table = schema.jobs
        query = select(table.c.job_id, table.c.state, table.c.end_time)
        rows = connection.execute(query.where(table.c.job_id.in_(sorted(set(owners.values())))))
        jobs = {row.job_id: row for row in rows}
        for key, owner in owners.items():
            job = jobs.get(owner)
            if job is None:
                continue
            if job.state not in FINAL_STATES or (
                key.startswith(tuple(f"jobs/{owner}/{kept}" for kept in _RESULTS)) and job.end_time > since
            ):
                yield key


def collect(
    store: Garbage, objects: ObjectStore, retention: Retention | None = None, *, dry_run: bool = False
) -> Collected:
    """Delete what nothing refers to. Safe at any time, beside servers and other collectors.

    Args:
        store: the database.
        objects: what is swept.
        retention: how long things stay.
        dry_run: only say what would go.

    Raises:
        MooringError: STORAGE_UNAVAILABLE; what was not reached goes the next time.
    """
    retention, collected = retention or Retention(), Collected()
    for prefix in ("photos/", "adapters/", "jobs/"):
        old = _old(store, objects, prefix, retention, collected)
        while entries := list(islice(old, _BATCH)):
            sizes = {entry.key: entry.size for entry in entries}
            found = (store.unneeded if dry_run else store.condemn)(list(sizes), retention)
            for key in found:
                if not dry_run:
                    objects.delete(key)
                collected.keys.append(key)
                collected.size += sizes[key]
    if not dry_run:
        store.forget()
        if isinstance(objects, LocalObjects):
            objects.remove_leftovers(retention.orphans)
    return collected


def _old(
    store: Garbage, objects: ObjectStore, prefix: str, retention: Retention, collected: Collected
) -> Iterator[ObjectEntry]:
    with store.reading() as connection:
        before = store.now(connection) - retention.orphans
    for entry in objects.entries(prefix):
        collected.seen += 1
        if entry.modified <= before:
            yield entry


def _below(prefix: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(prefix)]
