"""API keys: made once, kept as a hash, looked up by their public id.

A key is `moor_<id>_<secret>`: 16 hex digits that may be shown and logged, and 64 hex digits (256 random bits)
that are shown once. Kept is SHA-256 over both: a slow password hash would protect guessable secrets, which
these are not, and would cost every call tenths of a second. For the same reason there is no pepper: whoever
reads the hashes can do nothing with them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select, update

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.audit import Audit
from mooring_server.storage.database import check_text, insert_row

PREFIX = "moor_"
"""What tells an API key from a token."""

_KEY = re.compile(r"moor_([0-9a-f]{16})_([0-9a-f]{64})")
_NO_HASH = hashlib.sha256(b"no such key").digest()


@dataclass(frozen=True)
class ApiKey:
    """One key, without its secret. Times are seconds since the epoch, None for never."""

    key_id: str
    tenant: str
    role: str
    label: str
    create_time: float
    expire_time: float | None
    revoke_time: float | None


class KeyRefusedError(Exception):
    """The key opens nothing; `cause`, for the log: malformed, unknown, secret, expired, revoked."""

    def __init__(self, cause: str, key_id: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.key_id = key_id


class Keys(Audit):
    """Key rows."""

    def create_key(
        self, tenant: str, role: str, *, label: str = "", expire_time: float | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key.

        Args:
            tenant: whose it is; already checked.
            role: what it may do; already checked.
            label: for people, at most 200 characters.
            expire_time: seconds since the epoch; None for never.

        Returns:
            The row, and the whole key, which nothing can show again.

        Raises:
            MooringError: INVALID_FIELD for a label that cannot be stored.
        """
        check_text("label", label, limit=200)
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        with self.writing() as connection:
            row = ApiKey(key_id, tenant, role, label, self.now(connection), expire_time, None)
            values = vars(row) | {"secret_hash": _hash(key_id, secret)}
            insert_row(connection, schema.api_keys, values)
            self.audit(connection, tenant, "CreateKey", f"keys/{key_id}")
        return row, f"{PREFIX}{key_id}_{secret}"

    def find_key(self, key: str) -> ApiKey:
        """The row of a whole key.

        The secret is compared in constant time, and with something also where there is no such id, so that
        time does not tell which ids exist. Whether it expired or was revoked is asked last.

        Raises:
            KeyRefusedError: it opens nothing.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise KeyRefusedError("malformed")
        key_id, secret = match.groups()
        with self.reading() as connection:
            row = connection.execute(select(schema.api_keys).filter_by(key_id=key_id)).one_or_none()
            now = self.now(connection)
        kept = _NO_HASH if row is None else bytes(row.secret_hash)
        right = hmac.compare_digest(kept, _hash(key_id, secret))
        if row is None:
            raise KeyRefusedError("unknown", key_id)
        if not right:
            raise KeyRefusedError("secret", key_id)
        if row.revoke_time is not None:
            raise KeyRefusedError("revoked", key_id)
        if row.expire_time is not None and row.expire_time <= now:
            raise KeyRefusedError("expired", key_id)
        return _key(row)

    def list_keys(self, tenant: str = "") -> list[ApiKey]:
        """Every key, or a tenant's, newest first; for the operator, so without pages."""
        query = select(schema.api_keys).order_by(schema.api_keys.c.number.desc())
        with self.reading() as connection:
            rows = connection.execute(query.filter_by(tenant=tenant) if tenant else query).all()
        return [_key(row) for row in rows]

    def revoke_key(self, key_id: str) -> ApiKey:
        """Close a key for every call that begins from now on; one that is closed stays as it is.

        Raises:
            MooringError: INVALID_FIELD when there is none.
        """
        table = schema.api_keys
        with self.writing() as connection:
            closing = update(table).filter_by(key_id=key_id, revoke_time=None)
            connection.execute(closing.values(revoke_time=self.now(connection)))
            row = connection.execute(select(table).filter_by(key_id=key_id)).one_or_none()
            if row is not None:
                self.audit(connection, row.tenant, "RevokeKey", f"keys/{key_id}")
        if row is None:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"There is no API key {key_id!r}.",
                remedy="List the keys for their ids.",
            )
        return _key(row)


def _hash(key_id: str, secret: str) -> bytes:
    return hashlib.sha256(f"{PREFIX}{key_id}_{secret}".encode()).digest()


def _key(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)  # noqa: SLF001
    del values["number"], values["secret_hash"]
    return ApiKey(**values)
