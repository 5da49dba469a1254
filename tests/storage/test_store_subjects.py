from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.store import Store
from mooring_server.storage.subjects import MAX_PHOTOS
from store_rows import RIGHTS, new_photo, new_subject


def reason_of(call, *args, **kwargs) -> Reason:
    with pytest.raises(MooringError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def test_a_subject_comes_back_as_it_was_created(store: Store, clock) -> None:
    made = new_subject(store, display_name="Rubber Duck 🦆", rights={"basis": "LICENSED", "statement": "№ 7"})
    assert store.get_subject("acme", "duck") == made
    assert made.display_name == "Rubber Duck 🦆"
    assert made.rights == {"basis": "LICENSED", "statement": "№ 7"}
    assert (made.photo_count, made.create_time) == (0, clock.now)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rights": {}}, Reason.RIGHTS_REQUIRED),
        ({"class_noun": " "}, Reason.INVALID_FIELD),
        ({"placeholder": ""}, Reason.INVALID_FIELD),
        ({"class_noun": "bi\0rd"}, Reason.INVALID_FIELD),
        ({"display_name": "two\nlines"}, Reason.INVALID_FIELD),
        ({"display_name": "x" * 201}, Reason.INVALID_FIELD),
    ],
)
def test_a_faulty_subject_is_refused_and_leaves_nothing(store: Store, changes, reason) -> None:
    assert reason_of(new_subject, store, **changes) is reason
    assert store.list_subjects("acme") == ([], "")


def test_an_id_is_taken_once_per_tenant(store: Store) -> None:
    new_subject(store)
    assert reason_of(new_subject, store) is Reason.ALREADY_EXISTS
    assert new_subject(store, tenant="other").tenant == "other"


def test_what_belongs_to_another_tenant_looks_like_what_does_not_exist(store: Store) -> None:
    new_subject(store, tenant="other")
    absent, foreign = [], []
    for found, subject_id in ((absent, "nothing"), (foreign, "duck")):
        for call in (store.get_subject, store.photos, store.delete_subject):
            with pytest.raises(MooringError) as caught:
                call("acme", subject_id)
            found.append((caught.value.reason, str(caught.value).replace(subject_id, "ID")))
    assert absent == foreign
    assert store.list_subjects("acme") == ([], "")
    assert store.get_subject("other", "duck").subject_id == "duck"


def test_the_same_request_gives_the_same_subject(store: Store) -> None:
    first = new_subject(store, request_id="r1")
    assert new_subject(store, request_id="r1") == first
    assert reason_of(new_subject, store, request_id="r1", class_noun="fish") is Reason.REQUEST_ID_REUSED
    assert new_subject(store, tenant="other", request_id="r1", class_noun="fish").class_noun == "fish"


@pytest.mark.parametrize("request_id", ["a\0b", "x" * 70_000, "\n"])
def test_a_request_id_that_no_database_could_keep_is_refused_by_all(store: Store, request_id: str) -> None:
    assert reason_of(new_subject, store, request_id=request_id) is Reason.INVALID_FIELD
    assert store.list_subjects("acme")[0] == []


def test_a_request_that_failed_may_be_repeated_with_its_id(store: Store) -> None:
    new_subject(store)
    assert reason_of(new_subject, store, request_id="r1") is Reason.ALREADY_EXISTS
    store.delete_subject("acme", "duck")
    assert new_subject(store, request_id="r1").subject_id == "duck"


def test_photos_keep_their_order_and_come_once(store: Store) -> None:
    new_subject(store)
    first, added = store.add_photos("acme", "duck", [new_photo(3), new_photo(1), new_photo(3)])
    assert ([photo.filename for photo in first], added) == (["3.jpg", "1.jpg", "3.jpg"], 2)
    again, added = store.add_photos("acme", "duck", [new_photo(1), new_photo(2)])
    assert ([photo.position for photo in again], added) == ([1, 2], 1)
    assert [photo.filename for photo in store.photos("acme", "duck")] == ["3.jpg", "1.jpg", "2.jpg"]
    assert store.get_subject("acme", "duck").photo_count == 3


def test_too_many_photos_add_none(store: Store) -> None:
    new_subject(store)
    store.add_photos("acme", "duck", [new_photo(n) for n in range(MAX_PHOTOS - 1)])
    two = [new_photo(1000), new_photo(1001)]
    assert reason_of(store.add_photos, "acme", "duck", two) is Reason.TOO_MANY_PHOTOS
    assert len(store.photos("acme", "duck")) == MAX_PHOTOS - 1
    assert store.add_photos("acme", "duck", two[:1])[1] == 1


def test_photos_added_at_the_same_time_all_stay(store: Store) -> None:
    new_subject(store)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.add_photos("acme", "duck", [new_photo(n), new_photo(7)]), range(8)))
    photos = store.photos("acme", "duck")
    assert sorted(photo.filename for photo in photos) == [f"{n}.jpg" for n in range(8)]
    assert [photo.position for photo in photos] == list(range(8))


def test_deleting_a_subject_returns_the_keys_of_its_pictures(store: Store) -> None:
    uid = new_subject(store).uid
    store.add_photos("acme", "duck", [new_photo(1), new_photo(2)])
    assert sorted(store.delete_subject("acme", "duck")) == ["photos/u/1.png", "photos/u/2.png"]
    assert reason_of(store.photos, "acme", "duck") is Reason.SUBJECT_NOT_FOUND
    assert new_subject(store).uid != uid
    assert store.photos("acme", "duck") == []


def test_rights_are_kept_as_declared(store: Store) -> None:
    assert new_subject(store).rights == RIGHTS
