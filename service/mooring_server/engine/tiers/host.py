"""The host tier: adapters decoded, checked and packed once, ready to be copied into a slot.

A load is one flight however many wait for it, and different adapters load side by side on a few threads.
Who asks gets a `Lease` at once: the row is kept while anybody holds one, and loading begins before the
request has its turn. A failed load is told to all who wait for it and is not remembered.

Entries go by object key, which belongs to one tenant: no look-up of one tenant meets another's entry, so its
errors and its place in the cache tell nothing about others. Equal adapters of two tenants meet in the slot of
their digest only. Left out: sharing their host rows, which would have to keep their files' metadata apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from mooring_server.engine.adapters import MAX_ADAPTER_BYTES, from_safetensors
from mooring_server.engine.bank import AdapterBank, PackedAdapter, row_bytes
from mooring_server.engine.tiers.disk import DiskCache
from mooring_server.engine.tiers.lru import ByteLru
from mooring_server.engine.tiers.observer import Tier, TierObserver, Unobserved
from mooring_server.errors import MooringError, Reason

LOADING_THREADS = 4


class StoredAdapter(Protocol):
    """What the tiers need to know of an adapter; storage's record is one."""

    @property
    def object_key(self) -> str:
        """Where its file is; a key never gets other contents."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def base_digest(self) -> str:
        """The base it belongs to."""


class _Entry:
    """One adapter of the host tier, loading or loaded.

    Attributes:
        started: its load has begun, or ended.
        abandoned: nobody waits for it, so its load need not begin.
        dropped: it is in the cache no more; who holds a lease still has it.
        forgotten: it was deleted, so its file must not reach the disk cache.
        source: the tier that its file was read from, known once it is loaded.
    """

    def __init__(self, record: StoredAdapter) -> None:
        self.key = record.object_key
        self.name = record.name
        self.load: Future[PackedAdapter] = Future()
        self.started = self.abandoned = self.dropped = self.forgotten = False
        self.source: Tier = "object"


class Lease:
    """A claim on an adapter's host row. All methods are thread-safe; a context manager that releases.

    The engine polls `ready` before it starts a request, and `add_done_callback` wakes it.
    """

    def __init__(self, tiers: AdapterTiers, entry: _Entry, *, hit: bool) -> None:
        self._tiers = tiers
        self._entry: _Entry | None = entry
        self._hit = hit

    def ready(self) -> bool:
        """Whether the row is there.

        Raises:
            MooringError: the load failed: ADAPTER_NOT_FOUND when the file is gone, or what `from_safetensors`
                or `AdapterBank.pack` raises. Other exceptions are the object store's own.
        """
        load = self._held().load
        if not load.done():
            return False
        load.result()
        return True

    def wait(self, timeout: float | None = None) -> PackedAdapter:
        """Wait for the adapter. Raises TimeoutError after `timeout` seconds, and as `ready`."""
        return self._held().load.result(timeout)

    @property
    def tier(self) -> Tier:
        """Where the adapter came from for this lease, once `ready`: host memory, disk or object store."""
        return "host" if self._hit else self._held().source

    @property
    def weights(self) -> PackedAdapter:
        """The adapter, once `ready`; it stays valid after `release`. Raises as `ready`."""
        load = self._held().load
        if not load.done():
            raise ValueError("the adapter is still loading")
        return load.result()

    @property
    def row(self) -> Tensor:
        """`[size]` float32 in host memory: what a swap copies into a slot. As `weights`."""
        return self.weights.row

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call back when the load ends, well or not: on a loading thread, or at once when it has ended."""
        self._held().load.add_done_callback(lambda _load: callback())

    def release(self) -> None:
        """Give the claim back; nothing when that was done before."""
        self._tiers._release(self)  # noqa: SLF001 - one class in two parts

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release."""
        self.release()

    def _held(self) -> _Entry:
        entry = self._entry
        if entry is None:
            raise ValueError("the lease was released")
        return entry


class AdapterTiers:
    """Host memory, local disk and object store behind a bank's slots. Thread-safe.

    Rows that leases claim are never evicted: while those alone exceed the budget, the tier holds as much as
    they need. Beside the budget each loading thread holds the file it reads and its tensors.

    Args:
        fetch: the object store: key → bytes; KeyError when there are none. Blocking.
        bank: which the rows are for.
        host_bytes: budget of the host tier.
        disk: cache of files; None for none.
        max_bytes: larger files are refused.
        threads: loads at a time.
        observer: receives the numbers of the tiers "host" and "object". A look-up that joins a running load
            is no hit.
    """

    def __init__(
        self,
        fetch: Callable[[str], bytes],
        bank: AdapterBank,
        *,
        host_bytes: int,
        disk: DiskCache | None = None,
        max_bytes: int = MAX_ADAPTER_BYTES,
        threads: int = LOADING_THREADS,
        observer: TierObserver | None = None,
    ) -> None:
        self._fetch = fetch
        self._bank = bank
        self._disk = disk
        self._max_bytes = max_bytes
        self._observer = observer or Unobserved()
        self._lock = threading.Lock()
        self._entries: ByteLru[_Entry] = ByteLru(host_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="adapter-load")
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Of the host tier now."""
        return self._entries.bytes

    def lease(self, adapter: StoredAdapter) -> Lease:
        """Claim an adapter; loading starts at once where it is not in host memory. Does not block.

        Permission is the caller's business, before: what is cached is not asked who may see it.

        Raises:
            MooringError: BASE_DIGEST_MISMATCH for another base's adapter; DRAINING after `close`.
        """
        require_base(adapter, self._bank.base.digest)
        key = adapter.object_key
        with self._lock:
            if self._closed:
                raise _draining()
            entry = self._entries.find(key)
            hit = entry is not None and entry.load.done()
            if entry is None:
                entry = _Entry(adapter)
                self._entries.add(key, entry, 0, pinned=True)
                self._pool.submit(self._load, entry)
            else:
                self._entries.pin(key)
        self._observer.tier_lookup("host", hit=hit)
        return Lease(self, entry, hit=hit)

    def get(self, adapter: StoredAdapter) -> PackedAdapter:
        """The adapter, loaded if need be; blocking. Raises as `lease` and `Lease.ready`."""
        with self.lease(adapter) as lease:
            return lease.wait()

    def forget(self, object_key: str) -> None:
        """Drop a deleted adapter from memory and disk; leases that are held keep theirs."""
        with self._lock:
            entry = self._entries.remove(object_key)
            if entry is not None:
                entry.dropped = entry.forgotten = True
        if self._disk is not None:
            self._disk.remove(object_key)
        self._tell([])

    def close(self) -> None:
        """Refuse new leases, fail loads that have not begun, wait for those that have."""
        with self._lock:
            self._closed = True
            waiting = [entry for entry in self._entries.values() if not entry.started]
            for entry in waiting:
                entry.abandoned = True
                self._drop(entry)
        for entry in waiting:
            entry.load.set_exception(_draining())
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------ inside

    def _release(self, lease: Lease) -> None:
        with self._lock:
            entry, lease._entry = lease._entry, None  # noqa: SLF001 - one class in two parts
            if entry is None or entry.dropped:
                return
            evicted = self._unpin(entry)
            if not entry.started and not self._entries.pins(entry.key):
                entry.abandoned = True
                self._drop(entry)
        self._tell(evicted)

    def _load(self, entry: _Entry) -> None:
        evicted = []
        with self._lock:
            if entry.abandoned:
                return
            entry.started = True
            if not entry.dropped:
                # The load has a pin of its own, and the row is charged before it is allocated.
                self._entries.pin(entry.key)
                expected = row_bytes(self._bank.layout, page_locked=self._bank.page_locked)
                evicted = self._resize(entry, expected)
        self._tell(evicted)
        try:
            packed, file = self._read(entry)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            with self._lock:
                self._drop(entry)
            self._tell([])
            self._observer.tier_failed(str(error.reason) if isinstance(error, MooringError) else "UNEXPECTED")
            entry.load.set_exception(error)
            return
        with self._lock:
            evicted = [] if entry.dropped else self._resize(entry, packed.nbytes)
        self._tell(evicted)
        entry.load.set_result(packed)
        if self._disk is not None and file is not None and not entry.forgotten:
            self._disk.put(entry.key, file)
            if entry.forgotten:
                self._disk.remove(entry.key)
        with self._lock:
            evicted = [] if entry.dropped else self._unpin(entry)
        self._tell(evicted)

    def _read(self, entry: _Entry) -> tuple[PackedAdapter, bytes | None]:
        """The adapter, and its file where that came from the object store."""
        data = None if self._disk is None else self._disk.get(entry.key)
        fetched = data is None
        entry.source = "object" if fetched else "disk"
        if data is None:
            data = self._fetched(entry)
        began = time.perf_counter()
        bank = self._bank
        weights = from_safetensors(data, bank.base, max_bytes=self._max_bytes, max_rank=bank.rank)
        packed = bank.pack(weights)
        self._observer.tier_loaded("host", time.perf_counter() - began)
        return packed, data if fetched else None

    def _fetched(self, entry: _Entry) -> bytes:
        began = time.perf_counter()
        try:
            data = self._fetch(entry.key)
        except KeyError:
            self._observer.tier_lookup("object", hit=False)
            raise MooringError(
                Reason.ADAPTER_NOT_FOUND,
                f"The file of adapter {entry.name!r} is gone.",
                remedy="It was deleted just now; list the adapters.",
            ) from None
        self._observer.tier_lookup("object", hit=True)
        self._observer.tier_loaded("object", time.perf_counter() - began)
        return data

    def _drop(self, entry: _Entry) -> None:
        """Take an entry out of the cache, with the lock held."""
        if not entry.dropped:
            entry.dropped = True
            self._entries.remove(entry.key)

    def _unpin(self, entry: _Entry) -> list[_Entry]:
        return self._mark(self._entries.unpin(entry.key))

    def _resize(self, entry: _Entry, size: int) -> list[_Entry]:
        return self._mark(self._entries.resize(entry.key, size))

    @staticmethod
    def _mark(evicted: list[_Entry]) -> list[_Entry]:
        for entry in evicted:
            entry.dropped = True
        return evicted

    def _tell(self, evicted: list[_Entry]) -> None:
        if evicted:
            self._observer.tier_evicted("host", len(evicted))
        self._observer.tier_bytes("host", self._entries.bytes)


def require_base(adapter: StoredAdapter, base_digest: str) -> None:
    """Refuse an adapter that belongs to another base. Raises BASE_DIGEST_MISMATCH."""
    if adapter.base_digest != base_digest:
        raise MooringError(
            Reason.BASE_DIGEST_MISMATCH,
            f"{adapter.name!r} belongs to base {adapter.base_digest}, this server runs {base_digest}.",
            remedy="Train it again on this base, or serve the base it belongs to.",
            metadata={"expected": base_digest, "found": adapter.base_digest},
        )


def _draining() -> MooringError:
    return MooringError(
        Reason.DRAINING, "The server is shutting down.", remedy="Repeat the call in a moment."
    )
