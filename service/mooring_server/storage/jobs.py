"""Jobs: the queue, the leases, the history.

At most one runner works on a job: `claim_job` gives out a lease (a random fencing token with an end), the
runner renews it with `heartbeat`, and every write a runner makes names the lease and is refused once the job
has moved on. A runner that dies lets its lease expire; the next `claim_job` takes the job over.

Legal moves, all others are refused:

    PENDING → RUNNING (claim) · PENDING → CANCELLED (cancel) · RUNNING → PENDING (release)
    RUNNING → RUNNING (claim after the lease expired) · RUNNING → SUCCEEDED | FAILED | CANCELLED (finish)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, func, null, or_, select, update

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.database import insert_row, new_id, size_of
from mooring_server.storage.models import FINAL_STATES, Document, Job, JobEvent, JobState, Lease
from mooring_server.storage.usage import Usage

log = logging.getLogger(__name__)

MAX_EVENTS = 1000


class Jobs(Usage):
    """Job rows and their events."""

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        super().__init__(url, clock=clock)
        self._listeners: list[Callable[[str, str], None]] = []

    # -- for callers ---------------------------------------------------------------------------------------

    def create_job(
        self,
        tenant: str,
        kind: str,
        spec: Document,
        *,
        request_id: str = "",
        job_id: str = "",
        traceparent: str | None = None,
        objects: Sequence[str] = (),
        asked: Any = None,
    ) -> Job:
        """Queue a job.

        Args:
            tenant: whose it is.
            kind: "train", "evaluate" or "batch".
            spec: everything the runner needs; immutable from here on.
            request_id: makes the call idempotent: the same request gives the job it made before.
            job_id: of `new_id`, where objects that the job needs were stored under it already.
            traceparent: the calling span, in W3C form.
            objects: the keys of those objects.
            asked: what the caller sent and sends again with a repeated request; None: the spec. It must not
                hold what the server made of it, such as the version that an alias meant.

        Raises:
            MooringError: REQUEST_ID_REUSED, QUOTA_EXCEEDED; STORAGE_UNAVAILABLE also when one of the objects
                was taken for garbage meanwhile.
        """
        job_id = job_id or new_id()
        payload = spec if asked is None else asked
        with self.writing() as connection:
            made_before = self.replayed(
                connection, tenant, f"CreateJob/{kind}", request_id, payload=payload, resource=job_id
            )
            if made_before:
                return job_of(self._job_row(connection, tenant, made_before))
            # how large an adapter will be is not known yet: a full store takes none
            training = int(kind == "train")
            self.require_room(connection, tenant, jobs=1, adapters=training, size_bytes=training)
            if objects:
                self.require_not_condemned(connection, objects)
            now = self.now(connection)
            values = {
                "tenant": tenant,
                "job_id": job_id,
                "kind": kind,
                "spec": spec,
                "state": JobState.PENDING,
                "cancel_requested": False,
                "last_event": 0,
                "attempts": 0,
                "crashes": 0,
                "worker": "",
                "lease": "",
                "create_time": now,
                "update_time": now,
                "traceparent": traceparent,
            }
            insert_row(connection, schema.jobs, values)
            self._append(connection, tenant, job_id, "state", {"state": JobState.PENDING})
            job = job_of(self._job_row(connection, tenant, job_id))
            self.audit(connection, tenant, f"CreateJob/{kind}", f"jobs/{job_id}")
        self._notify(tenant, job_id)
        return job

    def job_made_before(self, tenant: str, kind: str, request_id: str, asked: Any) -> Job | None:
        """The job that the same request made before.

        Asked first, because a repeated request is answered whatever became meanwhile of what it names.

        Raises:
            MooringError: REQUEST_ID_REUSED.
        """
        if not request_id:
            return None
        with self.reading() as connection:
            found = self.recalled(connection, tenant, f"CreateJob/{kind}", request_id, payload=asked)
            return None if found is None else job_of(self._job_row(connection, tenant, found))

    def get_job(self, tenant: str, job_id: str) -> Job:
        """The job. Raises JOB_NOT_FOUND."""
        with self.reading() as connection:
            return job_of(self._job_row(connection, tenant, job_id))

    def list_jobs(
        self,
        tenant: str,
        *,
        kinds: Collection[str] = (),
        states: Collection[JobState] = (),
        page_size: int = 0,
        page_token: str = "",
    ) -> tuple[list[Job], str]:
        """Jobs, newest first, and the next page's token ("" at the end).

        Args:
            tenant: whose jobs.
            kinds: only these kinds; all when empty.
            states: only these states; all when empty.
            page_size: 0 for the default.
            page_token: from the page before, with the same other arguments.

        Raises:
            MooringError: BAD_PAGE_TOKEN.
        """
        table = schema.jobs
        signature = ["jobs", tenant, sorted(kinds), sorted(states)]
        limit, cursor, close = self.page(page_size, page_token, signature)
        query = select(table).filter_by(tenant=tenant).order_by(table.c.number.desc()).limit(limit)
        if kinds:
            query = query.where(table.c.kind.in_(sorted(kinds)))
        if states:
            query = query.where(table.c.state.in_(sorted(states)))
        if cursor is not None:
            query = query.where(table.c.number < cursor[0])
        with self.reading() as connection:
            rows = connection.execute(query).all()
        page, token = close(
            rows,
            lambda row: [row.number],
            lambda row: size_of(row.spec, row.progress, row.result, row.error),
        )
        return [job_of(row) for row in page], token

    def request_cancel(self, tenant: str, job_id: str) -> Job:
        """Ask for the job to stop.

        A job that nobody runs (pending, or its lease expired) is CANCELLED at once; a running one when its
        runner notices, at the next step. Cancelling a cancelled job changes nothing.

        Raises:
            MooringError: JOB_NOT_FOUND; JOB_NOT_CANCELLABLE when it has SUCCEEDED or FAILED.
        """
        with self.writing() as connection:
            row = self._job_row(connection, tenant, job_id, lock=True)
            if row.state in {JobState.SUCCEEDED, JobState.FAILED}:
                raise MooringError(
                    Reason.JOB_NOT_CANCELLABLE,
                    f"Job {job_id!r} has already {row.state.lower()}.",
                    remedy="Delete the adapter it made if you do not want it.",
                )
            now = self.now(connection)
            abandoned = row.state == JobState.RUNNING and row.lease_expires < now
            if row.state == JobState.PENDING or abandoned:
                self._finish(connection, row, JobState.CANCELLED, result=None, error=None)
            elif row.state == JobState.RUNNING and not row.cancel_requested:
                self._set(connection, row, cancel_requested=True)
            job = job_of(self._job_row(connection, tenant, job_id))
            self.audit(connection, tenant, "CancelJob", f"jobs/{job_id}")
        self._notify(tenant, job_id)
        return job

    def events(self, tenant: str, job_id: str, *, after: int = 0, limit: int = MAX_EVENTS) -> list[JobEvent]:
        """The events with `seq` > `after`, oldest first, at most `limit`. Raises JOB_NOT_FOUND."""
        table = schema.job_events
        query = (
            select(table)
            .filter_by(tenant=tenant, job_id=job_id)
            .where(table.c.seq > after)
            .order_by(table.c.seq)
            .limit(min(limit, MAX_EVENTS))
        )
        with self.reading() as connection:
            self._job_row(connection, tenant, job_id)
            return [JobEvent(**row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def subscribe(self, listener: Callable[[str, str], None]) -> Callable[[], None]:
        """Call `listener(tenant, job_id)` after each change that *this* process commits.

        It is called on the thread that made the change and must return at once. Changes by other processes
        are not seen: watchers poll as well, at a slower pace.

        Returns:
            The function that ends the subscription.
        """
        self._listeners.append(listener)

        def end() -> None:
            with contextlib.suppress(ValueError):  # ended before
                self._listeners.remove(listener)

        return end

    def count_jobs(self) -> dict[tuple[str, JobState], int]:
        """Jobs of all tenants by kind and state, for metrics."""
        table = schema.jobs
        query = select(table.c.kind, table.c.state, func.count()).group_by(table.c.kind, table.c.state)
        with self.reading() as connection:
            return {(kind, JobState(state)): count for kind, state, count in connection.execute(query)}

    def oldest_pending(self) -> dict[str, float]:
        """Seconds since the oldest waiting job of each kind was made, of all tenants, for metrics."""
        table = schema.jobs
        query = select(table.c.kind, func.min(table.c.create_time)).filter_by(state=JobState.PENDING)
        with self.reading() as connection:
            now = self.now(connection)
            oldest = connection.execute(query.group_by(table.c.kind)).all()
            return {kind: max(0.0, now - made) for kind, made in oldest}

    def running_progress(self, kind: str) -> list[Document]:
        """The newest progress of every running job of a kind, of all tenants, for metrics."""
        query = select(schema.jobs.c.progress).filter_by(kind=kind, state=JobState.RUNNING)
        with self.reading() as connection:
            return [progress for progress in connection.scalars(query) if progress is not None]

    # -- for runners ---------------------------------------------------------------------------------------

    def claim_job(
        self, worker: str, lease_seconds: float, *, kinds: Collection[str] = (), max_crashes: int = 3
    ) -> Job | None:
        """Take the next job that nobody runs; None when there is none.

        Tenants take turns: next is the oldest job of the tenant whose last one of the kind began longest ago,
        so a tenant that queues hundreds makes another wait for one of them, not for all.

        A job whose runner was lost `max_crashes` times since its last checkpoint is failed instead of
        claimed again: it probably kills its runner.

        Args:
            worker: who claims, for people to read.
            lease_seconds: how long the claim holds without a heartbeat.
            kinds: only these kinds; all when empty.
            max_crashes: see above.
        """
        while True:
            with self.writing() as connection:
                now = self.now(connection)
                table = schema.jobs
                free = or_(
                    table.c.state == JobState.PENDING,
                    and_(table.c.state == JobState.RUNNING, table.c.lease_expires < now),
                )
                begun = table.alias()
                last_turn = select(func.max(begun.c.start_time)).where(
                    begun.c.tenant == table.c.tenant, begun.c.kind == table.c.kind
                )
                in_turn = func.coalesce(last_turn.scalar_subquery(), 0.0)
                query = select(table).where(free).order_by(in_turn, table.c.number).limit(1)
                if kinds:
                    query = query.where(table.c.kind.in_(sorted(kinds)))
                row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
                if row is None:
                    return None
                crashed = row.state == JobState.RUNNING
                crashes = row.crashes + crashed
                if row.cancel_requested:
                    job = self._finish(connection, row, JobState.CANCELLED, result=None, error=None)
                elif crashes >= max_crashes:
                    error = {
                        "reason": Reason.INTERNAL,
                        "message": f"The job's runner was lost {crashes} times without progress.",
                        "remedy": "It may need more memory than the machine has: lower batch_size or rank.",
                    }
                    job = self._finish(connection, row, JobState.FAILED, result=None, error=error)
                else:
                    job = self._set(
                        connection,
                        row,
                        state=JobState.RUNNING,
                        worker=worker,
                        lease=new_id(),
                        lease_expires=now + lease_seconds,
                        attempts=row.attempts + 1,
                        crashes=crashes,
                        start_time=now if row.start_time is None else row.start_time,
                    )
                    payload = {"state": JobState.RUNNING, "worker": worker, "attempt": row.attempts + 1}
                    job = self._append(connection, row.tenant, row.job_id, "state", payload)
            self._notify(job.tenant, job.job_id)
            if not job.state.final:
                return job

    def heartbeat(self, tenant: str, job_id: str, lease: str, lease_seconds: float) -> Lease:
        """Renew the lease for another `lease_seconds`.

        Returns:
            LOST when the job is no longer this runner's: it must stop and may write nothing more.
        """
        with self.writing() as connection:
            row = self._leased(connection, tenant, job_id, lease)
            if row is None:
                return Lease.LOST
            self._set(connection, row, lease_expires=self.now(connection) + lease_seconds)
            return Lease.CANCEL_REQUESTED if row.cancel_requested else Lease.HELD

    def append_event(self, tenant: str, job_id: str, lease: str, kind: str, payload: Document) -> int:
        """Add an event to the history; "progress" also becomes the job's `progress`, less its "previews".

        Returns:
            Its sequence number.

        Raises:
            LeaseLostError: the job is no longer this runner's.
        """
        with self.writing() as connection:
            row = self._held(connection, tenant, job_id, lease)
            if kind == "progress":
                self._set(connection, row, progress={k: v for k, v in payload.items() if k != "previews"})
            job = self._append(connection, tenant, job_id, kind, payload)
        self._notify(tenant, job_id)
        return job.last_event

    def note_checkpoint(self, tenant: str, job_id: str, lease: str, key: str) -> str | None:
        """Make a stored object the job's checkpoint: losing the runner from here on is a first loss again.

        Returns:
            The key of the checkpoint before, which nothing refers to any more.

        Raises:
            LeaseLostError: the job is no longer this runner's.
        """
        with self.writing() as connection:
            row = self._held(connection, tenant, job_id, lease)
            self._set(connection, row, crashes=0, checkpoint_key=key)
        before: str | None = row.checkpoint_key
        return before

    def release_job(self, tenant: str, job_id: str, lease: str) -> None:
        """Hand the job back for another runner to go on with (drain); no effect when the lease is lost."""
        with self.writing() as connection:
            row = self._leased(connection, tenant, job_id, lease)
            if row is None:
                return
            if row.cancel_requested:
                self._finish(connection, row, JobState.CANCELLED, result=None, error=None)
            else:
                self._set(connection, row, state=JobState.PENDING, lease="", lease_expires=None, worker="")
                self._append(connection, tenant, job_id, "state", {"state": JobState.PENDING})
        self._notify(tenant, job_id)

    def finish_job(
        self,
        tenant: str,
        job_id: str,
        lease: str,
        state: JobState,
        *,
        result: Document | None = None,
        error: Document | None = None,
    ) -> Job:
        """End the job.

        Args:
            tenant: whose job.
            job_id: which job.
            lease: this runner's claim.
            state: SUCCEEDED with a `result`, FAILED with an `error`, or CANCELLED.
            result: what was made.
            error: ``{"reason", "message", "remedy"}``.

        Raises:
            LeaseLostError: the job is no longer this runner's.
        """
        with self.writing() as connection:
            row = self._held(connection, tenant, job_id, lease)
            job = self._finish(connection, row, state, result=result, error=error)
        self._notify(tenant, job_id)
        return job

    # -- inside a transaction ------------------------------------------------------------------------------

    def _job_row(self, connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> Row[Any]:
        query = select(schema.jobs).filter_by(tenant=tenant, job_id=job_id)
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise MooringError(
                Reason.JOB_NOT_FOUND,
                f"Job {job_id!r} does not exist.",
                remedy="List the jobs to see their ids.",
            )
        return row

    def _leased(self, connection: Connection, tenant: str, job_id: str, lease: str) -> Row[Any] | None:
        """The locked row while `lease` is its current claim.

        An expired lease that nobody took over still counts: its holder has done no harm and may go on.
        """
        query = select(schema.jobs).filter_by(
            tenant=tenant, job_id=job_id, lease=lease, state=JobState.RUNNING
        )
        return connection.execute(query.with_for_update()).one_or_none()

    def _held(self, connection: Connection, tenant: str, job_id: str, lease: str) -> Row[Any]:
        row = self._leased(connection, tenant, job_id, lease)
        if row is None:
            raise LeaseLostError(job_id)
        return row

    def _finish(
        self,
        connection: Connection,
        row: Row[Any],
        state: JobState,
        *,
        result: Document | None,
        error: Document | None,
    ) -> Job:
        assert state in FINAL_STATES and row.state not in FINAL_STATES  # noqa: PT018 - one invariant
        self._set(
            connection,
            row,
            state=state,
            result=null() if result is None else result,
            error=null() if error is None else error,
            lease="",
            lease_expires=None,
            end_time=self.now(connection),
        )
        payload: Document = {"state": state}
        payload |= {"result": result} if result is not None else {}
        payload |= {"error": error} if error is not None else {}
        job = self._append(connection, row.tenant, row.job_id, "state", payload)
        name = f"jobs/{row.job_id}"
        self.audit(connection, row.tenant, f"EndJob/{row.kind}", name, decision=state.value.lower())
        return job

    def _set(self, connection: Connection, row: Row[Any], **values: Any) -> Job:
        key = {"tenant": row.tenant, "job_id": row.job_id}
        changed = update(schema.jobs).filter_by(**key).values(update_time=self.now(connection), **values)
        return job_of(connection.execute(changed.returning(schema.jobs)).one())

    def _append(self, connection: Connection, tenant: str, job_id: str, kind: str, payload: Document) -> Job:
        """Append an event; the caller holds the job's row, so numbers have no gaps and no duplicates."""
        jobs = schema.jobs
        numbered = (
            update(jobs).filter_by(tenant=tenant, job_id=job_id).values(last_event=jobs.c.last_event + 1)
        )
        job = job_of(connection.execute(numbered.returning(jobs)).one())
        values = {
            "tenant": tenant,
            "job_id": job_id,
            "seq": job.last_event,
            "kind": kind,
            "payload": payload,
            "time": self.now(connection),
        }
        insert_row(connection, schema.job_events, values)
        return job

    def _notify(self, tenant: str, job_id: str) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(tenant, job_id)
            except Exception:
                log.exception("a job listener failed")


class LeaseLostError(Exception):
    """The job was taken over, finished or deleted: this runner must stop and write nothing more."""


def job_of(row: Row[Any]) -> Job:
    """The record of a row."""
    values = dict(row._mapping)  # noqa: SLF001
    del values["number"]
    values["state"] = JobState(values["state"])
    return Job(**values)
