"""How much memory the files of calls may take, on their way in or out.

A file is held whole before it is used, and an upload's pictures until all of them are there. Each is bounded,
but a caller can open many streams and leave them half sent; so what all of them hold is bounded too, and what
those of one tenant hold at half of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mooring_server.config import MIB, Settings
from mooring_server.errors import MooringError, Reason

_LEAST_SHARE = 512 * MIB
"""More than the pictures of the largest upload of photos, and that file itself."""
_RETRY_SECONDS = 2.0


class HeldFiles:
    """Counts bytes; use it on one event loop.

    Args:
        share: what one tenant's calls may hold; all tenants' together twice as much.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._held: Counter[str] = Counter()

    @staticmethod
    def of(settings: Settings) -> HeldFiles:
        """With room for the largest file of each kind."""
        return HeldFiles(max(settings.max_adapter_bytes, settings.max_batch_bytes, _LEAST_SHARE))

    @contextmanager
    def call(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """A call that holds files: gives the function to say how many bytes it holds now.

        That function raises QUEUE_FULL when there is no room for them.
        """
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            more = size - mine
            if more > 0:
                self._require_room(tenant, more)
            self._held[tenant] += more
            mine = size

        try:
            yield hold
        finally:
            self._held[tenant] -= mine
            if not self._held[tenant]:
                del self._held[tenant]

    def _require_room(self, tenant: str, more: int) -> None:
        for scope, used, limit in (
            ("tenant", self._held[tenant], self._share),
            ("server", self._held.total(), 2 * self._share),
        ):
            if used + more > limit:
                raise MooringError(
                    Reason.QUEUE_FULL,
                    f"Too many files are under way: the {scope}'s {limit} bytes of memory for them are used.",
                    remedy="Send fewer at a time, and end streams that are not needed.",
                    metadata={"cause": "file_bytes", "scope": scope, "limit": str(limit)},
                    retry_after=_RETRY_SECONDS,
                )
