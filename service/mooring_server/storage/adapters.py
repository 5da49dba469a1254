"""Adapters: immutable versions, published row last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, select, update

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.database import insert_row, size_of
from mooring_server.storage.jobs import Jobs
from mooring_server.storage.models import Adapter, Document, JobState

_SHOWN_BYTES = 2000
"""Of names, digests, the certificate's figures and the newest gate decision, about."""


class Adapters(Jobs):
    """Adapter rows. The safetensors file is in the object store before its row is added here."""

    def publish_adapter(
        self,
        tenant: str,
        adapter_id: str,
        *,
        object_key: str,
        digest: str,
        base_digest: str,
        rank: int,
        size_bytes: int,
        class_noun: str,
        placeholder: str,
        rights: Document,
        certificate: Document,
        summary: Document,
        subject_id: str = "",
        job_id: str | None = None,
        lease: str = "",
        artifacts: Sequence[Document] = (),
        request_id: str = "",
    ) -> Adapter:
        """Add the next version of an adapter.

        With a `job_id` the lease is checked, and the job becomes SUCCEEDED with ``{"adapter": name, "digest",
        "summary", "artifacts"}`` as its result, all in one transaction: a job publishes exactly once, and
        there is no moment at which the adapter exists and its job could run again.

        Args:
            tenant: whose it is.
            adapter_id: its id; the version number is given here.
            object_key: where the safetensors file is.
            digest: of its canonical tensors.
            base_digest: of the base model it belongs to.
            rank: largest rank of its layers.
            size_bytes: of the file.
            class_noun: of the subject.
            placeholder: token of the subject.
            rights: the subject's declaration, copied.
            certificate: as built by evaluation.
            summary: training figures to show in lists.
            subject_id: what it was trained on; "" for an import.
            job_id: the job that made it; None for an import.
            lease: the runner's claim on that job.
            artifacts: files that the job leaves beside the adapter.
            request_id: makes an import idempotent.

        Raises:
            LeaseLostError: the job is no longer this runner's.
            MooringError: REQUEST_ID_REUSED; QUOTA_EXCEEDED for an import (a job's was counted when it began).
        """
        with self.writing() as connection:
            payload = [adapter_id, digest, base_digest, class_noun, placeholder, rights]
            made_before = self.replayed(
                connection, tenant, "ImportAdapter", request_id, payload=payload, resource=object_key
            )
            if made_before:
                return adapter_of(self._version_row(connection, tenant, adapter_id, object_key=made_before))
            if job_id is None:
                self.require_room(connection, tenant, adapters=1, size_bytes=size_bytes)
            job = None if job_id is None else self._held(connection, tenant, job_id, lease)
            self.require_not_condemned(connection, [object_key])
            heads = schema.adapter_heads
            bump = self.upsert(heads).values(tenant=tenant, adapter_id=adapter_id, last_version=1)
            bump = bump.on_conflict_do_update(
                index_elements=[heads.c.tenant, heads.c.adapter_id],
                set_={"last_version": heads.c.last_version + 1},
            )
            version = connection.execute(bump.returning(heads.c.last_version)).scalar_one()
            adapter = Adapter(
                tenant=tenant,
                adapter_id=adapter_id,
                version=version,
                object_key=object_key,
                digest=digest,
                base_digest=base_digest,
                rank=rank,
                size_bytes=size_bytes,
                subject_id=subject_id,
                job_id=job_id or "",
                class_noun=class_noun,
                placeholder=placeholder,
                rights=rights,
                certificate=certificate,
                summary=summary,
                create_time=self.now(connection),
                delete_time=None,
            )
            # NULL, not "", for an import: the uniqueness of (tenant, job_id) must not bind imports.
            insert_row(connection, schema.adapters, vars(adapter) | {"job_id": job_id})
            if job is not None:
                result: Document = {"adapter": adapter.name, "digest": digest, "summary": summary}
                result["artifacts"] = list(artifacts)
                self._finish(connection, job, JobState.SUCCEEDED, result=result, error=None)
            self.audit(connection, tenant, "AddAdapter", f"adapters/{adapter.name}", digests=[digest])
        if job_id is not None:
            self._notify(tenant, job_id)
        return adapter

    def get_adapter(
        self,
        tenant: str,
        adapter_id: str,
        version: int | None = None,
        *,
        alias: str = "",
        show_deleted: bool = False,
    ) -> Adapter:
        """That version, the one that an alias points to, or else the newest one that is not deleted.

        Args:
            tenant: whose adapter.
            adapter_id: its id.
            version: its number; None for the newest.
            alias: look the version up here instead.
            show_deleted: a version that was deleted is found by its number.

        Raises:
            MooringError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND.
        """
        with self.reading() as connection:
            row = self._version_row(
                connection, tenant, adapter_id, version, alias=alias, show_deleted=show_deleted
            )
        return adapter_of(row)

    def list_adapters(
        self,
        tenant: str,
        *,
        adapter_id: str = "",
        subject_id: str = "",
        show_deleted: bool = False,
        page_size: int = 0,
        page_token: str = "",
    ) -> tuple[list[Adapter], str]:
        """Versions, newest first, and the next page's token.

        Args:
            tenant: whose adapters.
            adapter_id: only this one's versions; all when "".
            subject_id: only those trained on this subject; all when "".
            show_deleted: those that were deleted too.
            page_size: 0 for the default.
            page_token: from the page before, with the same other arguments.

        Raises:
            MooringError: BAD_PAGE_TOKEN.
        """
        table = schema.adapters
        signature = ["adapters", tenant, adapter_id, subject_id, *(["deleted"] if show_deleted else [])]
        limit, cursor, close = self.page(page_size, page_token, signature)
        query = select(table).filter_by(tenant=tenant).limit(limit).order_by(table.c.number.desc())
        if not show_deleted:
            query = query.filter_by(delete_time=None)
        if adapter_id:
            query = query.filter_by(adapter_id=adapter_id)
        if subject_id:
            query = query.filter_by(subject_id=subject_id)
        if cursor is not None:
            query = query.where(table.c.number < cursor[0])
        with self.reading() as connection:
            rows = connection.execute(query).all()
        # without the certificate, of whose layers lists tell nothing
        page, token = close(
            rows, lambda row: [row.number], lambda row: _SHOWN_BYTES + size_of(row.rights, row.summary)
        )
        return [adapter_of(row) for row in page], token

    def delete_adapter(
        self, tenant: str, adapter_id: str, version: int | None = None, *, alias: str = ""
    ) -> list[Adapter]:
        """Leave a tombstone: the version (or all) is gone, and its number is never used again.

        Args:
            tenant: whose adapter.
            adapter_id: its id.
            version: which version; None for all of them.
            alias: look the version up here instead; it is then refused, because the alias points to it.

        Returns:
            The deleted versions; their `object_key`s may now be removed.

        Raises:
            MooringError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND; ADAPTER_IN_USE when an alias points to a version
                that would go: nothing is deleted then.
        """
        table = schema.adapters
        key: dict[str, Any] = {"tenant": tenant, "adapter_id": adapter_id, "delete_time": None}
        with self.writing() as connection:
            self.lock_adapter(connection, tenant, adapter_id)
            if alias:
                version = self._version_row(connection, tenant, adapter_id, alias=alias).version
            if version is not None:
                key["version"] = version
            pointing = self._aliases_of(connection, tenant, adapter_id, version)
            if pointing:
                raise _in_use(adapter_id, version, pointing)
            buried = update(table).filter_by(**key).values(delete_time=self.now(connection))
            rows = connection.execute(buried.returning(table)).all()
            for row in rows:
                name = f"adapters/{adapter_id}@{row.version}"
                self.audit(connection, tenant, "DeleteAdapter", name, digests=[row.digest])
        if not rows:
            raise _not_found(adapter_id, version)
        return [adapter_of(row) for row in rows]

    # -- inside a transaction ------------------------------------------------------------------------------

    def lock_adapter(self, connection: Connection, tenant: str, adapter_id: str) -> None:
        """Let one transaction at a time change an adapter's versions and aliases (SQLite does so anyway)."""
        connection.execute(
            select(schema.adapter_heads).filter_by(tenant=tenant, adapter_id=adapter_id).with_for_update()
        )

    def _version_row(
        self,
        connection: Connection,
        tenant: str,
        adapter_id: str,
        version: int | None = None,
        *,
        alias: str = "",
        object_key: str = "",
        show_deleted: bool = False,
    ) -> Row[Any]:
        if alias:
            pointers = schema.adapter_aliases
            pointed = select(pointers.c.version).filter_by(tenant=tenant, adapter_id=adapter_id, alias=alias)
            version = connection.scalar(pointed)
            if version is None:
                raise alias_not_found(adapter_id, alias)
        table = schema.adapters
        query = select(table).filter_by(tenant=tenant, adapter_id=adapter_id)
        if version is not None:
            query = query.filter_by(version=version)
        elif not object_key:
            query = query.filter_by(delete_time=None)
        if object_key:
            query = query.filter_by(object_key=object_key)
        row = connection.execute(query.order_by(table.c.version.desc()).limit(1)).one_or_none()
        if row is None:
            raise _not_found(adapter_id, version)
        if row.delete_time is not None and not show_deleted:
            raise _not_found(adapter_id, version, deleted=row.delete_time)
        return row

    def _aliases_of(
        self, connection: Connection, tenant: str, adapter_id: str, version: int | None
    ) -> list[tuple[str, int]]:
        table = schema.adapter_aliases
        query = select(table.c.alias, table.c.version).filter_by(tenant=tenant, adapter_id=adapter_id)
        if version is not None:
            query = query.filter_by(version=version)
        return [(row.alias, row.version) for row in connection.execute(query.order_by(table.c.alias))]


def alias_not_found(adapter_id: str, alias: str) -> MooringError:
    """The same words whether or not the adapter exists."""
    return MooringError(
        Reason.ALIAS_NOT_FOUND,
        f"Adapter {adapter_id!r} has no alias {alias!r}.",
        remedy="List the aliases, or publish a version of it first.",
    )


def _in_use(adapter_id: str, version: int | None, pointing: list[tuple[str, int]]) -> MooringError:
    what = adapter_id if version is None else f"{adapter_id}@{version}"
    names = ", ".join(alias if version is not None else f"{alias} → {found}" for alias, found in pointing)
    return MooringError(
        Reason.ADAPTER_IN_USE,
        f"Adapter {what!r} is not deleted: an alias points to it ({names}).",
        remedy="Publish another version, roll back, or delete the alias first.",
        metadata={"aliases": ", ".join(alias for alias, _ in pointing)},
    )


def _not_found(adapter_id: str, version: int | None, *, deleted: float | None = None) -> MooringError:
    name = adapter_id if version is None else f"{adapter_id}@{version}"
    if deleted is not None:
        when = datetime.fromtimestamp(deleted, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return MooringError(
            Reason.ADAPTER_NOT_FOUND,
            f"Adapter {name!r} was deleted on {when}.",
            remedy="Its number is not given again; list the adapters to see which there are.",
            metadata={"delete_time": when},
        )
    return MooringError(
        Reason.ADAPTER_NOT_FOUND,
        f"Adapter {name!r} does not exist.",
        remedy="List the adapters, or train it first.",
    )


def adapter_of(row: Row[Any]) -> Adapter:
    """The record of a row."""
    values = dict(row._mapping)  # noqa: SLF001
    values["job_id"] = values["job_id"] or ""
    del values["number"]
    return Adapter(**values)
