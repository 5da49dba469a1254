"""Subjects and their photos."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import Connection, Row, delete, select, update
from sqlalchemy.exc import IntegrityError

from mooring_server.errors import FieldViolation, MooringError, Reason, StorageUnavailableError
from mooring_server.storage import schema
from mooring_server.storage.database import check_text, insert_row, new_id, size_of
from mooring_server.storage.models import Document, NewPhoto, Photo, Subject
from mooring_server.storage.usage import Usage

MAX_PHOTOS = 100
_MAX_NAME = 200


class Subjects(Usage):
    """Subject rows. Photo bytes are in the object store before their rows are added here."""

    def create_subject(
        self,
        tenant: str,
        subject_id: str,
        *,
        display_name: str = "",
        class_noun: str,
        placeholder: str,
        rights: Document,
        request_id: str = "",
    ) -> Subject:
        """Create a subject without photos.

        Args:
            tenant: whose it is.
            subject_id: its id, already checked against the resource-name grammar.
            display_name: shown to people; may be empty.
            class_noun: what it is an instance of ("dog").
            placeholder: the token that will stand for it in prompts.
            rights: the rights declaration; kept with every adapter trained on the subject.
            request_id: makes the call idempotent.

        Raises:
            MooringError: RIGHTS_REQUIRED, INVALID_FIELD, ALREADY_EXISTS or REQUEST_ID_REUSED.
        """
        if not rights:
            raise MooringError(
                Reason.RIGHTS_REQUIRED,
                "A subject needs a rights declaration.",
                remedy="State who holds the rights to the photos and that training on them is allowed.",
                fields=[FieldViolation("rights", "is required")],
            )
        for field, value in (("class_noun", class_noun), ("placeholder", placeholder)):
            if not value.strip():
                raise MooringError(
                    Reason.INVALID_FIELD, f"{field} is empty.", fields=[FieldViolation(field, "is required")]
                )
            check_text(field, value, limit=_MAX_NAME)
        check_text("display_name", display_name, limit=_MAX_NAME)
        payload = [subject_id, display_name, class_noun, placeholder, rights]
        with self.writing() as connection:
            if self.replayed(
                connection, tenant, "CreateSubject", request_id, payload=payload, resource=subject_id
            ):
                return _subject(self._subject_row(connection, tenant, subject_id))
            values = {
                "tenant": tenant,
                "subject_id": subject_id,
                "uid": new_id(),
                "display_name": display_name,
                "class_noun": class_noun,
                "placeholder": placeholder,
                "rights": rights,
                "photo_count": 0,
                "next_position": 0,
                "create_time": self.now(connection),
            }
            try:
                insert_row(connection, schema.subjects, values)
            except IntegrityError:
                raise MooringError(
                    Reason.ALREADY_EXISTS,
                    f"Subject {subject_id!r} already exists.",
                    remedy="Choose another id, or delete that subject first.",
                ) from None
            self.audit(connection, tenant, "CreateSubject", f"subjects/{subject_id}")
            return _subject(self._subject_row(connection, tenant, subject_id))

    def get_subject(self, tenant: str, subject_id: str) -> Subject:
        """The subject. Raises SUBJECT_NOT_FOUND."""
        with self.reading() as connection:
            return _subject(self._subject_row(connection, tenant, subject_id))

    def list_subjects(
        self, tenant: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[Subject], str]:
        """Subjects, newest first, and the next page's token ("" at the end). Raises BAD_PAGE_TOKEN."""
        table = schema.subjects
        limit, cursor, close = self.page(page_size, page_token, ["subjects", tenant])
        query = select(table).filter_by(tenant=tenant).order_by(table.c.number.desc()).limit(limit)
        if cursor is not None:
            query = query.where(table.c.number < cursor[0])
        with self.reading() as connection:
            rows = connection.execute(query).all()
        page, token = close(
            rows, lambda row: [row.number], lambda row: size_of(row.rights, row.display_name, row.class_noun)
        )
        return [_subject(row) for row in page], token

    def delete_subject(self, tenant: str, subject_id: str) -> list[str]:
        """Delete the subject with its photos' rows; returns the object keys that nothing refers to any more.

        Adapters trained on it stay: they carry their own copy of the rights declaration.
        Raises SUBJECT_NOT_FOUND.
        """
        with self.writing() as connection:
            self._subject_row(connection, tenant, subject_id, lock=True)
            keys = connection.scalars(
                select(schema.photos.c.object_key).filter_by(tenant=tenant, subject_id=subject_id)
            ).all()
            connection.execute(delete(schema.subjects).filter_by(tenant=tenant, subject_id=subject_id))
            self.audit(connection, tenant, "DeleteSubject", f"subjects/{subject_id}")
        return list(keys)

    def add_photos(
        self,
        tenant: str,
        subject_id: str,
        photos: Sequence[NewPhoto],
        *,
        request_id: str = "",
        stored: AbstractSet[str] | None = None,
    ) -> tuple[list[Photo], int]:
        """Add photos, all or none; one that the subject already has (same SHA-256) is not added twice.

        Args:
            tenant: whose subject it is.
            subject_id: which subject.
            photos: checked photos.
            request_id: makes the call idempotent beyond the content addressing.
            stored: object keys whose bytes are there; None says that all are. Bytes of a photo that the
                subject had may be left out, but the subject can be deleted and made anew meanwhile.

        Returns:
            One row per given photo, in the given order, and how many of them are new.

        Raises:
            MooringError: SUBJECT_NOT_FOUND, TOO_MANY_PHOTOS, QUOTA_EXCEEDED or REQUEST_ID_REUSED;
                STORAGE_UNAVAILABLE when a photo turns out to be new whose bytes are not stored.
        """
        payload = [subject_id, [photo.sha256 for photo in photos]]
        with self.writing() as connection:
            subject = self._subject_row(connection, tenant, subject_id, lock=True)
            self.replayed(
                connection, tenant, "UploadPhotos", request_id, payload=payload, resource=subject_id
            )
            known = {photo.sha256: photo for photo in self._photos(connection, tenant, subject_id)}
            fresh = [photo.object_key for photo in photos if photo.sha256 not in known]
            self.require_not_condemned(connection, fresh)
            now, position, before = self.now(connection), subject.next_position, len(known)
            sizes = {photo.sha256: photo.size_bytes for photo in photos if photo.sha256 not in known}
            self.require_room(connection, tenant, size_bytes=sum(sizes.values()))
            for photo in photos:
                if photo.sha256 in known:
                    continue
                added = Photo(
                    tenant=tenant, subject_id=subject_id, position=position, create_time=now, **vars(photo)
                )
                insert_row(connection, schema.photos, vars(added))
                known[photo.sha256] = added
                position += 1
            if len(known) > MAX_PHOTOS:
                raise MooringError(
                    Reason.TOO_MANY_PHOTOS,
                    f"Subject {subject_id!r} would have {len(known)} photos; at most {MAX_PHOTOS} are taken.",
                    remedy="Keep the sharpest and most varied ones.",
                    metadata={"limit": str(MAX_PHOTOS)},
                )
            if stored is not None and not stored >= set(fresh):
                raise StorageUnavailableError("The subject lost photos while they were uploaded again.")
            connection.execute(
                update(schema.subjects)
                .filter_by(tenant=tenant, subject_id=subject_id)
                .values(photo_count=len(known), next_position=position)
            )
            added_digests = [f"sha256:{sha256}" for sha256 in sizes]
            self.audit(connection, tenant, "UploadPhotos", f"subjects/{subject_id}", digests=added_digests)
        return [known[photo.sha256] for photo in photos], len(known) - before

    def photos(self, tenant: str, subject_id: str) -> list[Photo]:
        """The subject's photos in upload order. Raises SUBJECT_NOT_FOUND."""
        with self.reading() as connection:
            self._subject_row(connection, tenant, subject_id)
            return self._photos(connection, tenant, subject_id)

    def _photos(self, connection: Connection, tenant: str, subject_id: str) -> list[Photo]:
        table = schema.photos
        query = select(table).filter_by(tenant=tenant, subject_id=subject_id).order_by(table.c.position)
        return [Photo(**row._mapping) for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name

    def _subject_row(
        self, connection: Connection, tenant: str, subject_id: str, *, lock: bool = False
    ) -> Row[Any]:
        query = select(schema.subjects).filter_by(tenant=tenant, subject_id=subject_id)
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise MooringError(
                Reason.SUBJECT_NOT_FOUND,
                f"Subject {subject_id!r} does not exist.",
                remedy="List the subjects, or create it first.",
            )
        return row


def _subject(row: Row[Any]) -> Subject:
    values = dict(row._mapping)  # noqa: SLF001
    del values["number"], values["next_position"]
    return Subject(**values)
