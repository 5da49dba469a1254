"""Which entries of a cache go when there is no room: the least recently used of those that nobody uses.

A plain value without locks, clocks or I/O, so that host and disk tier share it and tests can drive it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    value: V
    size: int
    pins: int


class ByteLru(Generic[V]):
    """Entries by key, up to a number of bytes.

    Pinned entries are never evicted, so `bytes` exceeds the budget only while all that is kept is pinned. An
    entry counts as used when it is added, found and unpinned.

    Args:
        budget: bytes that unpinned entries may fill, pinned ones included.

    Attributes:
        bytes: of all entries now.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"a budget of {budget} bytes is none")
        self.budget = budget
        self.bytes = 0
        self._entries: dict[str, _Entry[V]] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # unpinned, least recently used first

    def __len__(self) -> int:
        """Entries now."""
        return len(self._entries)

    def find(self, key: str) -> V | None:
        """The value, which now counts as used; None when there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if key in self._idle:
            self._idle.move_to_end(key)
        return entry.value

    def add(self, key: str, value: V, size: int, *, pinned: bool = False) -> list[V]:
        """Keep a value under a new key.

        Args:
            key: not kept yet.
            value: what to keep.
            size: its bytes.
            pinned: pin it at once.

        Returns:
            What was evicted for it: the value itself when it is unpinned and larger than the budget.
        """
        assert key not in self._entries, f"{key} is kept already"
        self._entries[key] = _Entry(value, size, int(pinned))
        if not pinned:
            self._idle[key] = None
        self.bytes += size
        return self._evict()

    def resize(self, key: str, size: int) -> list[V]:
        """Correct an entry's bytes; gives what was evicted."""
        entry = self._entries[key]
        self.bytes += size - entry.size
        entry.size = size
        return self._evict()

    def pin(self, key: str) -> None:
        """Keep an entry from eviction until as many `unpin`."""
        self._entries[key].pins += 1
        self._idle.pop(key, None)

    def unpin(self, key: str) -> list[V]:
        """Take a pin off; gives what was evicted, where the pins had held more than the budget."""
        entry = self._entries[key]
        assert entry.pins > 0, f"{key} is unpinned more often than it was pinned"
        entry.pins -= 1
        if not entry.pins:
            self._idle[key] = None
        return self._evict()

    def pins(self, key: str) -> int:
        """How often an entry is pinned; 0 for one that is not kept."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.pins

    def remove(self, key: str) -> V | None:
        """Drop an entry, pinned or not; None when there is none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._idle.pop(key, None)
        self.bytes -= entry.size
        return entry.value

    def values(self) -> list[V]:
        """All values, in no order."""
        return [entry.value for entry in self._entries.values()]

    def _evict(self) -> list[V]:
        evicted = []
        while self.bytes > self.budget and self._idle:
            key, _ = self._idle.popitem(last=False)
            entry = self._entries.pop(key)
            self.bytes -= entry.size
            evicted.append(entry.value)
        return evicted
