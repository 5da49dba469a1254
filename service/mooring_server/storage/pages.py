"""Page tokens: opaque, signed, and valid for one query only.

A token is base64url(mac ‖ cursor). The mac covers the cursor and the query (call, tenant, filters), so a
token of another tenant, of another filter, or one that was tampered with is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

from mooring_server.errors import FieldViolation, MooringError, Reason

_MAC_BYTES = 16


class PageTokens:
    """Makes and reads tokens with one secret key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(self, cursor: list[Any], query: Sequence[Any]) -> str:
        """The token for the page after `cursor` of `query`."""
        data = json.dumps(cursor, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._mac(data, query) + data).decode()

    def read(self, token: str, query: Sequence[Any]) -> list[Any]:
        """The cursor inside `token`.

        Raises:
            MooringError: BAD_PAGE_TOKEN unless `make` made it for this very query.
        """
        try:
            raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raw = b""
        mac, data = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(data, query)):
            raise MooringError(
                Reason.BAD_PAGE_TOKEN,
                "The page token does not belong to this request.",
                remedy="Repeat the request that gave it with all other fields unchanged, or start over.",
                fields=[FieldViolation("page_token", "not a token of this query")],
            )
        cursor: list[Any] = json.loads(data)
        return cursor

    def _mac(self, data: bytes, query: Sequence[Any]) -> bytes:
        bound = json.dumps([list(query), data.decode("latin-1")]).encode()
        return hmac.new(self._key, bound, hashlib.sha256).digest()[:_MAC_BYTES]
