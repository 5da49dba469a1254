from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.database import DEFAULT_PAGE
from mooring_server.storage.models import JobState
from mooring_server.storage.pages import PageTokens
from mooring_server.storage.store import Store
from store_rows import new_subject, publish


def pages(list_, *args, **kwargs):
    token, found = "", []
    while True:
        items, token = list_(*args, page_token=token, **kwargs)
        found.append(items)
        if not token:
            return found


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 8])
def test_every_item_comes_once_newest_first(store: Store, page_size: int) -> None:
    for number in range(7):
        new_subject(store, subject_id=f"s{number}")
        new_subject(store, tenant="other", subject_id=f"s{number}")
    found = pages(store.list_subjects, "acme", page_size=page_size)
    assert [subject.subject_id for page in found for subject in page] == [f"s{n}" for n in reversed(range(7))]
    assert {subject.tenant for page in found for subject in page} == {"acme"}
    assert all(len(page) == page_size for page in found[:-1])


def test_a_page_has_a_default_size(store: Store) -> None:
    for number in range(DEFAULT_PAGE + 1):
        store.create_job("acme", "train", {"n": number})
    jobs, token = store.list_jobs("acme")
    assert len(jobs) == DEFAULT_PAGE
    rest, end = store.list_jobs("acme", page_token=token)
    assert ([job.spec["n"] for job in rest], end) == ([0], "")


def test_a_page_of_large_rows_ends_before_it_is_too_large_for_a_message(store: Store) -> None:
    large = {"prompts": ["x" * 1000] * 900}
    for number in range(5):
        store.create_job("acme", "evaluate", {"n": number, **large})
    found = pages(store.list_jobs, "acme", page_size=1000)
    assert [[job.spec["n"] for job in page] for page in found] == [[4, 3], [2, 1], [0]]
    store.create_job(
        "acme", "evaluate", {"n": 5, "prompts": ["x" * 1000] * 3000}
    )  # alone too large for a page
    found = pages(store.list_jobs, "acme", page_size=1000)
    assert [job.spec["n"] for page in found for job in page] == [5, 4, 3, 2, 1, 0]


def test_rights_in_any_script_leave_room_in_a_page_of_subjects_and_adapters(store: Store) -> None:
    rights = {"basis": "OWNED", "statement": "語" * 1000}
    for number in range(800):
        new_subject(store, subject_id=f"s{number}", rights=rights)
    first, token = store.list_subjects("acme", page_size=1000)
    assert token
    assert 400 < len(first) < 800


def test_items_added_or_deleted_between_pages_neither_repeat_nor_hide_others(store: Store) -> None:
    for number in range(6):
        new_subject(store, subject_id=f"s{number}")
    first, token = store.list_subjects("acme", page_size=3)
    store.delete_subject("acme", first[-1].subject_id)  # the very row that the token points at
    new_subject(store, subject_id="late")
    second, end = store.list_subjects("acme", page_size=3, page_token=token)
    assert [subject.subject_id for subject in second] == ["s2", "s1", "s0"]
    assert end == ""


def test_a_token_is_good_for_its_own_query_only(store: Store) -> None:
    for number in range(3):
        store.create_job("acme", "train", {"n": number})
        store.create_job("other", "train", {"n": number})
        new_subject(store, subject_id=f"s{number}")
        publish(store)
    token = store.list_jobs("acme", page_size=1)[1]
    assert store.list_jobs("acme", page_size=2, page_token=token)[0]  # another size is the same query
    strangers = [
        lambda: store.list_jobs("other", page_size=1, page_token=token),
        lambda: store.list_jobs("acme", kinds=["train"], page_size=1, page_token=token),
        lambda: store.list_jobs("acme", states=[JobState.PENDING], page_size=1, page_token=token),
        lambda: store.list_subjects("acme", page_size=1, page_token=token),
        lambda: store.list_adapters("acme", page_size=1, page_token=token),
    ]
    for stranger in strangers:
        with pytest.raises(MooringError) as caught:
            stranger()
        assert caught.value.reason is Reason.BAD_PAGE_TOKEN


def test_tokens_hold_across_servers_of_one_database(open_store) -> None:
    first, second = open_store(), open_store()
    for number in range(3):
        new_subject(first, subject_id=f"s{number}")
    token = first.list_subjects("acme", page_size=2)[1]
    assert [s.subject_id for s in second.list_subjects("acme", page_token=token)[0]] == ["s0"]


@pytest.mark.parametrize("page_size", [-1, -1000])
def test_a_negative_size_is_refused(store: Store, page_size: int) -> None:
    with pytest.raises(MooringError) as caught:
        store.list_subjects("acme", page_size=page_size)
    assert caught.value.reason is Reason.INVALID_FIELD


@given(st.data())
def test_no_altered_token_is_accepted(data: st.DataObject) -> None:
    tokens = PageTokens(b"k" * 32)
    token = tokens.make([17], ["jobs", "acme"])
    raw = bytearray(base64.urlsafe_b64decode(token))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MooringError) as caught:
        tokens.read(base64.urlsafe_b64encode(raw).decode(), ["jobs", "acme"])
    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


@given(st.text(max_size=80))
def test_no_invented_token_is_accepted(token: str) -> None:
    with pytest.raises(MooringError) as caught:
        PageTokens(b"k" * 32).read(token, ["jobs", "acme"])
    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


@given(st.lists(st.one_of(st.integers(0, 2**62), st.text(max_size=20)), max_size=3))
def test_a_token_gives_its_cursor_back(cursor: list) -> None:
    tokens = PageTokens(b"k" * 32)
    assert tokens.read(tokens.make(cursor, ["q"]), ["q"]) == cursor
