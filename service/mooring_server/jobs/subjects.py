"""Subjects and adapters with their bytes: the order of rows and objects that survives a crash.

Creating: objects first, the row that refers to them last. Deleting: the row first, its objects last. A crash
in between leaves an object that nobody refers to, never a row that refers to nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection

from PIL import Image

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.photos import CheckedPhoto, decode_photo, encode_png
from mooring_server.storage.database import new_id
from mooring_server.storage.models import NewPhoto, Photo
from mooring_server.storage.objects import ObjectStore, content_key, needed
from mooring_server.storage.store import Store
from mooring_server.storage.subjects import MAX_PHOTOS


class PhotoUpload:
    """One upload of several files: everything is checked before anything is stored.

    Each file is decoded and re-encoded as it comes, so that memory holds small PNGs rather than the files.

    Args:
        store: where the rows go.
        objects: where the pictures go.
        tenant: whose subject it is.
        subject_id: which subject.
        decode: how a file becomes a picture; the server's is `decoding.pool.DecoderPool.decode`.

    Raises:
        MooringError: SUBJECT_NOT_FOUND.
    """

    def __init__(
        self,
        store: Store,
        objects: ObjectStore,
        tenant: str,
        subject_id: str,
        *,
        decode: Callable[[bytes, str], CheckedPhoto] = decode_photo,
    ) -> None:
        self._store, self._objects, self._decode = store, objects, decode
        self._subject = store.get_subject(tenant, subject_id)
        self._checked: dict[str, tuple[NewPhoto, bytes]] = {}
        self._order: list[str] = []
        self._errors: dict[int, MooringError] = {}
        self._files = 0
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What the pictures take of memory."""
        return self._held_bytes

    def add(self, filename: str, data: bytes) -> None:
        """Check the next file. What is wrong with it is raised by `commit`, together with all the others'.

        Raises:
            MooringError: TOO_MANY_PHOTOS at once, when one upload alone has more than a subject takes.
        """
        index = self._next()
        try:
            photo = self._decode(data, filename)
        except MooringError as error:
            self._errors[index] = error
            return
        width, height = photo.image.size
        data = encode_png(photo.image)
        key = content_key(f"photos/{self._subject.uid}/{new_id()}", data, "png")
        row = NewPhoto(photo.filename, photo.sha256, key, width, height, photo.size_bytes)
        if photo.sha256 not in self._checked:
            self._checked[photo.sha256] = row, data
            self._held_bytes += len(data)
        self._order.append(photo.sha256)

    def reject(self, error: MooringError) -> None:
        """Count the next file as one that did not arrive as announced; `commit` raises what is wrong.

        Raises:
            MooringError: TOO_MANY_PHOTOS as `add` does.
        """
        self._errors[self._next()] = error

    def _next(self) -> int:
        """Number of the next file, from 0. Raises TOO_MANY_PHOTOS."""
        if self._files == MAX_PHOTOS:
            raise MooringError(
                Reason.TOO_MANY_PHOTOS,
                f"The upload has more than {MAX_PHOTOS} files.",
                remedy=f"A subject takes {MAX_PHOTOS} photos: keep the sharpest and most varied ones.",
            )
        self._files += 1
        return self._files - 1

    def commit(self) -> tuple[list[Photo], int]:
        """Store all photos, or none.

        Returns:
            One row per uploaded file in upload order, and how many were new to the subject.

        Raises:
            MooringError: the files' common reason (BAD_IMAGE when they differ), with a violation
                ``files[i]`` per bad file; INVALID_FIELD without any file; SUBJECT_NOT_FOUND;
                TOO_MANY_PHOTOS; QUOTA_EXCEEDED; STORAGE_UNAVAILABLE when known photos vanish meanwhile: a
                repeat stores them. The subject has nothing of the upload.
        """
        if self._errors:
            raise self._combined()
        if not self._order:
            raise MooringError(
                Reason.INVALID_FIELD,
                "The upload holds no file.",
                remedy="Send at least one photo.",
                fields=[FieldViolation("files", "at least one is required")],
            )
        tenant, subject_id = self._subject.tenant, self._subject.subject_id
        known = {photo.sha256 for photo in self._store.photos(tenant, subject_id)}
        added_bytes = sum(row.size_bytes for row, _ in self._checked.values() if row.sha256 not in known)
        # what add_photos will refuse must not fill the store before it does
        self._store.check_room(tenant, size_bytes=added_bytes)
        stored = set()
        if len(known | self._checked.keys()) <= MAX_PHOTOS:
            for row, png in self._checked.values():
                if row.sha256 not in known:
                    self._objects.put(row.object_key, png)
                    stored.add(row.object_key)
        rows = [row for row, _ in self._checked.values()]
        photos, added = self._store.add_photos(tenant, subject_id, rows, stored=stored)
        by_digest = {photo.sha256: photo for photo in photos}
        return [by_digest[digest] for digest in self._order], added

    def _combined(self) -> MooringError:
        errors = list(self._errors.values())
        if len(errors) == 1:
            message, remedy = errors[0].message, errors[0].remedy
        else:
            message = f"{len(errors)} of {self._files} files cannot be used: "
            message += " ".join(error.message for error in errors)
            remedy = "Nothing was stored. Replace or leave out these files and upload again."
        reasons = {error.reason for error in errors}
        return MooringError(
            reasons.pop() if len(reasons) == 1 else Reason.BAD_IMAGE,
            message,
            remedy=remedy,
            fields=[
                FieldViolation(f"files[{index}]", f"{error.message} {error.remedy}".strip())
                for index, error in self._errors.items()
            ],
        )


def load_photos(
    store: Store,
    objects: ObjectStore,
    tenant: str,
    subject_id: str,
    *,
    only: Collection[str] | None = None,
) -> list[Image.Image]:
    """The subject's pictures, RGB, in upload order.

    Args:
        store: where the rows are.
        objects: where the pictures are.
        tenant: whose subject it is.
        subject_id: which subject.
        only: just the photos with these SHA-256; None for all.

    Raises:
        MooringError: SUBJECT_NOT_FOUND, SUBJECT_HAS_NO_PHOTOS, OBJECT_DAMAGED.
    """
    rows = [row for row in store.photos(tenant, subject_id) if only is None or row.sha256 in only]
    if not rows:
        raise MooringError(
            Reason.SUBJECT_HAS_NO_PHOTOS,
            f"Subject {subject_id!r} has no photos.",
            remedy="Upload 1 to 100 photos of it first.",
        )
    images = []
    for row in rows:
        with Image.open(io.BytesIO(needed(objects, row.object_key)), formats=["PNG"]) as image:
            images.append(image.convert("RGB"))
    return images


def delete_subject(store: Store, objects: ObjectStore, tenant: str, subject_id: str) -> None:
    """Delete a subject and its pictures. Raises SUBJECT_NOT_FOUND."""
    for key in store.delete_subject(tenant, subject_id):
        objects.delete(key)
