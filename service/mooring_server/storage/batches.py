"""Rows of batch jobs: each is recorded once, by the runner that holds the job's lease.

The row's object is stored before its record: a record never names a picture that is not there. Records are
numbered in the order in which they are added, so that a reader who knows the last number it saw misses
nothing and gets nothing twice.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, func, select

from mooring_server.storage import schema
from mooring_server.storage.database import insert_row
from mooring_server.storage.jobs import Jobs
from mooring_server.storage.models import Document, DoneRow

MAX_ROWS_AT_A_TIME = 1000


class Batches(Jobs):
    """Records of done rows."""

    def add_batch_row(self, tenant: str, job_id: str, lease: str, row: int, record: Document) -> DoneRow:
        """Record a row as done; one that is recorded already stays as it is.

        Raises:
            LeaseLostError: the job is no longer this runner's.
        """
        table = schema.batch_rows
        mine = {"tenant": tenant, "job_id": job_id}
        with self.writing() as connection:
            job = self._held(connection, tenant, job_id, lease)
            known = connection.execute(select(table).filter_by(**mine, row=row)).one_or_none()
            if known is not None:
                return _done(known)
            last = connection.scalar(select(func.max(table.c.position)).filter_by(**mine))
            done = DoneRow(row, (last or 0) + 1, record)
            insert_row(connection, table, {**mine, **vars(done)})
            # as after a checkpoint: losing the runner from here on is a first loss again
            self._set(connection, job, crashes=0)
        self._notify(tenant, job_id)
        return done

    def batch_rows(
        self, tenant: str, job_id: str, *, after: int = 0, limit: int = MAX_ROWS_AT_A_TIME
    ) -> list[DoneRow]:
        """The rows with `position` > `after`, in that order, at most `limit`. Raises JOB_NOT_FOUND."""
        table = schema.batch_rows
        query = (
            select(table)
            .filter_by(tenant=tenant, job_id=job_id)
            .where(table.c.position > after)
            .order_by(table.c.position)
            .limit(min(limit, MAX_ROWS_AT_A_TIME))
        )
        with self.reading() as connection:
            self._job_row(connection, tenant, job_id)
            return [_done(row) for row in connection.execute(query)]

    def batch_row(self, tenant: str, job_id: str, row: int) -> DoneRow | None:
        """One row; None while it is not done."""
        query = select(schema.batch_rows).filter_by(tenant=tenant, job_id=job_id, row=row)
        with self.reading() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else _done(found)


def _done(row: Row[Any]) -> DoneRow:
    return DoneRow(row.row, row.position, row.record)
