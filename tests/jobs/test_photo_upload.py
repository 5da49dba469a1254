from __future__ import annotations

import numpy as np
import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.jobs.subjects import PhotoUpload, delete_subject, load_photos
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store
from mooring_server.storage.subjects import MAX_PHOTOS
from pictures import corners, encode, jpeg, png, quarters
from PIL import Image


@pytest.fixture
def subject(store: Store):
    return store.create_subject(
        "acme", "duck", class_noun="bird", placeholder="<duck>", rights={"basis": "OWNED"}
    )


def upload(store: Store, objects: LocalObjects, *files: bytes):
    batch = PhotoUpload(store, objects, "acme", "duck")
    for number, data in enumerate(files):
        batch.add(f"{number}.jpg", data)
    return batch.commit()


def test_uploaded_photos_come_back_in_order(store: Store, objects: LocalObjects, subject) -> None:
    rows, added = upload(store, objects, jpeg(), png(quarters(80, 80)), encode(quarters(40, 40), "WEBP"))
    assert ([row.filename for row in rows], added) == (["0.jpg", "1.jpg", "2.jpg"], 3)
    images = load_photos(store, objects, "acme", "duck")
    assert [image.size for image in images] == [(64, 48), (80, 80), (40, 40)]
    assert corners(images[0]) == ["red", "green", "blue", "white"]
    assert [(row.width, row.height) for row in rows] == [image.size for image in images]
    assert rows[0].size_bytes == len(jpeg())
    only = load_photos(store, objects, "acme", "duck", only=[rows[2].sha256])
    assert [image.size for image in only] == [(40, 40)]


def test_one_bad_file_stores_nothing_and_every_bad_file_is_named(store, objects, subject) -> None:
    with pytest.raises(MooringError) as caught:
        upload(store, objects, jpeg(), b"text", png(Image.new("RGB", (4, 4))), jpeg()[:-300])
    error = caught.value
    assert error.reason is Reason.BAD_IMAGE
    assert [violation.field for violation in error.fields] == ["files[1]", "files[2]", "files[3]"]
    assert "is not a picture" in error.fields[0].description
    assert "too small" in error.fields[1].description
    assert "cut off" in error.fields[2].description
    assert list(objects.list()) == []
    assert store.photos("acme", "duck") == []


def test_a_single_reason_is_kept(store, objects, subject, monkeypatch) -> None:
    monkeypatch.setattr("mooring_server.jobs.photos.MAX_PIXELS", 1000)
    with pytest.raises(MooringError) as caught:
        upload(store, objects, jpeg(), png())
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE
    with pytest.raises(MooringError) as caught:
        upload(store, objects, jpeg(), b"text")
    assert caught.value.reason is Reason.BAD_IMAGE


def test_a_repeated_upload_adds_nothing(store, objects, subject) -> None:
    first, _ = upload(store, objects, jpeg(), png())
    again, added = upload(store, objects, png(), jpeg(), png())
    assert ([row.sha256 for row in again], added) == (
        [first[1].sha256, first[0].sha256, first[1].sha256],
        0,
    )
    assert len(list(objects.list("photos/"))) == 2


def test_an_empty_upload_is_refused(store, objects, subject) -> None:
    with pytest.raises(MooringError) as caught:
        upload(store, objects)
    assert caught.value.reason is Reason.INVALID_FIELD


def numbered(number: int) -> bytes:
    return png(Image.fromarray(np.full((16, 16, 3), number, np.uint8)))


def test_too_many_photos_store_nothing(store, objects, subject) -> None:
    batch = PhotoUpload(store, objects, "acme", "duck")
    for number in range(MAX_PHOTOS):
        batch.add("x.png", numbered(number))
    with pytest.raises(MooringError) as caught:
        batch.add("x.png", numbered(MAX_PHOTOS))
    assert caught.value.reason is Reason.TOO_MANY_PHOTOS
    upload(store, objects, jpeg())
    with pytest.raises(MooringError) as caught:
        batch.commit()
    assert caught.value.reason is Reason.TOO_MANY_PHOTOS
    assert len(list(objects.list("photos/"))) == 1


def test_files_that_did_not_arrive_as_announced_count_too(store, objects, subject) -> None:
    """Else a stream of them would fill the memory with what is wrong with each."""
    batch = PhotoUpload(store, objects, "acme", "duck")
    for _ in range(MAX_PHOTOS):
        batch.reject(MooringError(Reason.DIGEST_MISMATCH, "It is another file."))
    with pytest.raises(MooringError) as caught:
        batch.reject(MooringError(Reason.DIGEST_MISMATCH, "It is another file."))
    assert caught.value.reason is Reason.TOO_MANY_PHOTOS


def test_an_upload_tells_what_it_holds(store, objects, subject) -> None:
    batch = PhotoUpload(store, objects, "acme", "duck")
    for data in (png(), jpeg(), png()):  # the first one is known when it comes again
        batch.add("x", data)
    batch.commit()
    assert batch.held_bytes == sum(entry.size for entry in objects.entries("photos/"))


def test_a_missing_subject_is_noticed_before_any_file_is_read(store, objects) -> None:
    with pytest.raises(MooringError) as caught:
        PhotoUpload(store, objects, "acme", "duck")
    assert caught.value.reason is Reason.SUBJECT_NOT_FOUND


def test_a_subject_without_photos_cannot_be_loaded(store, objects, subject) -> None:
    with pytest.raises(MooringError) as caught:
        load_photos(store, objects, "acme", "duck")
    assert caught.value.reason is Reason.SUBJECT_HAS_NO_PHOTOS


def test_a_photo_that_the_store_has_lost_is_told_by_name(store, objects, subject) -> None:
    rows, _ = upload(store, objects, jpeg())
    objects.delete(rows[0].object_key)
    with pytest.raises(MooringError) as caught:
        load_photos(store, objects, "acme", "duck")
    assert caught.value.reason is Reason.OBJECT_DAMAGED
    assert rows[0].object_key in caught.value.message


def test_deleting_removes_row_and_bytes_of_this_subject_only(store, objects, subject) -> None:
    store.create_subject("other", "duck", class_noun="bird", placeholder="<d>", rights={"basis": "OWNED"})
    upload(store, objects, jpeg())
    batch = PhotoUpload(store, objects, "other", "duck")
    batch.add("x.jpg", jpeg())
    batch.commit()
    delete_subject(store, objects, "acme", "duck")
    assert len(list(objects.list("photos/"))) == 1
    assert len(load_photos(store, objects, "other", "duck")) == 1


def test_a_subject_that_is_made_anew_meanwhile_gets_no_photo_without_its_bytes(
    store, objects, subject, monkeypatch
) -> None:
    """The bytes of known photos are not written again: they must still be known when the rows are."""
    upload(store, objects, png())
    ask = store.photos

    def asked_then_recreated(tenant, subject_id):
        known = ask(tenant, subject_id)
        delete_subject(store, objects, tenant, subject_id)
        store.create_subject(
            tenant, subject_id, class_noun="bird", placeholder="<duck>", rights={"basis": "OWNED"}
        )
        return known

    with monkeypatch.context() as patched:
        patched.setattr(store, "photos", asked_then_recreated)
        with pytest.raises(MooringError) as caught:
            upload(store, objects, png(), jpeg())
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert store.photos("acme", "duck") == []
    rows, added = upload(store, objects, png(), jpeg())  # the repeat that the reason asks for
    assert added == 2
    assert all(objects.get(row.object_key) for row in rows)
    assert len(load_photos(store, objects, "acme", "duck")) == 2
