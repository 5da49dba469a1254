"""What a tenant keeps and uses, counted where it is added to.

A limit on what is kept is only a limit when counting and adding are one step: the count is made inside the
transaction that adds, which SQLite serialises; on PostgreSQL a lock per tenant does, taken only where there
is a limit. A trained adapter is counted when its job is queued, so that no training is thrown away at its
end; its bytes count once it is there, and no training is queued while they are used up. Bytes are those of
photos as uploaded and of adapter files; previews, checkpoints, evaluations and pictures of batches are not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sqlalchemy import ColumnElement, Connection, Table, func, select

from mooring_server.config import Quota
from mooring_server.errors import quota_exceeded
from mooring_server.storage import schema
from mooring_server.storage.audit import Audit
from mooring_server.storage.models import FINAL_STATES

DAY_SECONDS = 86_400.0
JOBS_RETRY_SECONDS = 30.0
_TENANT_LOCK = 0x4D6F6F71  # PostgreSQL advisory locks: the space of tenants
_UNLIMITED = Quota()


class Usage(Audit):
    """Counts by tenant.

    Attributes:
        quota_of: a tenant's limits; none unless the server sets it.
    """

    quota_of: Callable[[str], Quota] = staticmethod(lambda _tenant: _UNLIMITED)

    def require_room(
        self,
        connection: Connection,
        tenant: str,
        *,
        jobs: int = 0,
        adapters: int = 0,
        size_bytes: int = 0,
    ) -> None:
        """Refuse what would take a tenant over its limits; call it before adding, in the same transaction.

        Args:
            connection: the write transaction.
            tenant: who adds.
            jobs: jobs to be queued.
            adapters: adapter versions to be added, now or by such a job.
            size_bytes: bytes to be kept.

        Raises:
            MooringError: QUOTA_EXCEEDED.
        """
        quota = self.quota_of(tenant)
        for cause, limit, more, used_now, retry in (
            ("concurrent_jobs", quota.concurrent_jobs, jobs, self._jobs, JOBS_RETRY_SECONDS),
            ("adapters", quota.adapters, adapters, self._adapters, math.inf),
            ("stored_bytes", quota.stored_bytes, size_bytes, self._bytes, math.inf),
        ):
            if limit is None or not more:
                continue
            if connection.dialect.name == "postgresql":
                key = func.hashtext(tenant)
                connection.execute(select(func.pg_advisory_xact_lock(_TENANT_LOCK, key)))
            used = used_now(connection, tenant)
            if used + more > limit:
                raise quota_exceeded(cause, limit=limit, used=used, retry_after=retry)

    def check_room(self, tenant: str, *, size_bytes: int) -> None:
        """Refuse early what `require_room` would, before anything is written. Raises QUOTA_EXCEEDED."""
        with self.reading() as connection:
            self.require_room(connection, tenant, size_bytes=size_bytes)

    def add_device_seconds(self, seconds: dict[str, float]) -> None:
        """Add engine time to today's account of each tenant."""
        table = schema.device_use
        with self.writing() as connection:
            day = int(self.now(connection) // DAY_SECONDS)
            for tenant, spent in sorted(seconds.items()):  # in one order: two replicas must not deadlock
                adding = self.upsert(table).values(tenant=tenant, day=day, seconds=spent)
                connection.execute(
                    adding.on_conflict_do_update(
                        index_elements=[table.c.tenant, table.c.day],
                        set_={"seconds": table.c.seconds + adding.excluded.seconds},
                    )
                )

    def device_seconds(self, tenant: str) -> tuple[float, float]:
        """Engine time of a tenant in this UTC day, of all replicas, and the present time."""
        with self.reading() as connection:
            now = self.now(connection)
            query = select(schema.device_use.c.seconds).filter_by(tenant=tenant, day=int(now // DAY_SECONDS))
            return float(connection.scalar(query) or 0.0), now

    def _jobs(self, connection: Connection, tenant: str) -> int:
        return _count(connection, schema.jobs, tenant, schema.jobs.c.state.not_in(sorted(FINAL_STATES)))

    def _adapters(self, connection: Connection, tenant: str) -> int:
        jobs = schema.jobs.c
        kept = _count(connection, schema.adapters, tenant, schema.adapters.c.delete_time.is_(None))
        coming = (jobs.kind == "train") & jobs.state.not_in(sorted(FINAL_STATES))
        return kept + _count(connection, schema.jobs, tenant, coming)

    def _bytes(self, connection: Connection, tenant: str) -> int:
        photos, adapters = schema.photos.c, schema.adapters.c
        of_photos = select(func.sum(photos.size_bytes)).where(photos.tenant == tenant)
        of_adapters = select(func.sum(adapters.size_bytes)).where(
            adapters.tenant == tenant, adapters.delete_time.is_(None)
        )
        return int(connection.scalar(of_photos) or 0) + int(connection.scalar(of_adapters) or 0)


def _count(connection: Connection, table: Table, tenant: str, condition: ColumnElement[bool]) -> int:
    query = select(func.count()).select_from(table).where(table.c.tenant == tenant, condition)
    return int(connection.scalar(query) or 0)
