"""API keys: what opens, what does not, and what is kept of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.keys import KeyRefusedError
from mooring_server.storage.store import Store
from sqlalchemy import select


def cause(store: Store, key: str) -> str:
    with pytest.raises(KeyRefusedError) as caught:
        store.find_key(key)
    return caught.value.cause


def test_a_key_opens_its_tenant_until_it_is_revoked(store: Store) -> None:
    made, key = store.create_key("acme", "user", label="ci")
    assert re.fullmatch(r"moor_[0-9a-f]{16}_[0-9a-f]{64}", key)
    assert store.find_key(key) == made
    closed = store.revoke_key(made.key_id)
    assert closed.revoke_time is not None
    assert cause(store, key) == "revoked"
    assert store.revoke_key(made.key_id) == closed, "revoking twice changes nothing"


def test_a_key_ends_at_its_time(store: Store, clock: Any) -> None:
    _, key = store.create_key("acme", "user", expire_time=clock.now + 10)
    clock.now += 9.5
    store.find_key(key)
    clock.now += 0.5
    assert cause(store, key) == "expired"


def test_nothing_but_the_whole_key_opens(store: Store) -> None:
    made, key = store.create_key("acme", "user")
    _, another = store.create_key("acme", "user")
    secret = key.rsplit("_", 1)[1]
    assert cause(store, f"moor_{made.key_id}_{another.rsplit('_', 1)[1]}") == "secret"
    assert cause(store, f"moor_{'0' * 16}_{secret}") == "unknown"
    for wrong in ("", key.upper(), key + "0", key + "\n", secret, made.key_id, f"{key} "):
        assert cause(store, wrong) == "malformed"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_nonsense_opens_nothing(store: Store, text: str) -> None:
    assert cause(store, text) == "malformed"


def test_no_secret_is_kept(store: Store) -> None:
    _, key = store.create_key("acme", "user")
    secret = key.rsplit("_", 1)[1]
    with store.reading() as connection:
        row: Any = connection.execute(select(schema.api_keys)).one()
    kept = repr(tuple(row)) + bytes(row.secret_hash).hex()
    assert secret not in kept
    assert len(bytes(row.secret_hash)) == 32


def test_a_key_that_does_not_exist_cannot_be_revoked(store: Store) -> None:
    with pytest.raises(MooringError) as caught:
        store.revoke_key("0" * 16)
    assert caught.value.reason is Reason.INVALID_FIELD
