"""How much a tenant may ask for: a rate, calls and a queue depth, counted in memory, and device time.

Plain objects with clocks and stores that are handed in; no gRPC, no SQL. What is *kept* (adapters, bytes,
unfinished jobs) is counted by the store in the transaction that adds to it (`storage/usage.py`), because only
there can two calls at once not both be the last one allowed. Rates and depths are counted per process: with N
replicas a tenant has up to N times as many.

The bucket is the token bucket of RFC 2697's committed rate, filled continuously.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mooring_server.config import Quota
from mooring_server.errors import MooringError, Reason, quota_exceeded
from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.quotas")

MAX_TENANTS = 10_000
"""Buckets kept; the one unused for longest is forgotten, which gives its tenant a full one again."""

DAY_SECONDS = 86_400.0
MAX_CALLS = 512
"""That run in one process, of all tenants."""

QUEUE_RETRY_SECONDS = 1.0
FLUSH_SECONDS = 5.0


@dataclass
class TokenBucket:
    """At most `burst` calls at once and `rate` a second in the long run.

    Args:
        rate: tokens a second, > 0.
        burst: tokens it holds when full, ≥ 1.
        now: seconds on any steady clock; it begins full.
    """

    rate: float
    burst: float
    now: float

    def __post_init__(self) -> None:
        self._tokens = self.burst
        self._filled = self.now

    def take(self, now: float) -> float:
        """Take one token; 0 when there was one, else the seconds until there is.

        A refusal takes nothing, so a caller that keeps knocking is not shut out for longer. A clock that goes
        backwards adds nothing.
        """
        self._tokens = min(self.burst, self._tokens + self.rate * max(0.0, now - self._filled))
        self._filled = max(self._filled, now)
        # one part in 10⁹ of slack: the wait that was told must be enough in floating point, too
        if self._tokens >= 1.0 - 1e-9:
            self._tokens = max(0.0, self._tokens - 1.0)
            return 0.0
        return (1.0 - self._tokens) / self.rate


class Quotas:
    """Rates and depths of all tenants. Thread-safe.

    Args:
        quota_of: a tenant's limits.
        clock: steady seconds.
    """

    def __init__(self, quota_of: Callable[[str], Quota], clock: Callable[[], float]) -> None:
        self._quota_of = quota_of
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._depths: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def take_call(self, tenant: str) -> None:
        """Count a call. Raises QUOTA_EXCEEDED, with the time until the next one is allowed."""
        quota = self._quota_of(tenant)
        rate = quota.requests_per_second
        if rate is None:
            return
        burst = quota.burst if quota.burst is not None else max(1.0, 2.0 * rate)
        with self._lock:
            now = self._clock()
            bucket = self._buckets.get(tenant)
            if bucket is None or (bucket.rate, bucket.burst) != (rate, burst):
                bucket = self._buckets[tenant] = TokenBucket(rate, burst, now)
            self._buckets.move_to_end(tenant)
            if len(self._buckets) > MAX_TENANTS:
                self._buckets.popitem(last=False)
            wait = bucket.take(now)
        if wait:
            raise quota_exceeded("requests_per_second", limit=rate, used=rate, retry_after=wait)

    @contextmanager
    def calling(self, tenant: str) -> Iterator[None]:
        """Hold a place for a call until it ends.

        Raises:
            MooringError: QUOTA_EXCEEDED when all of the tenant's are taken; QUEUE_FULL when all are.
        """
        limit = self._quota_of(tenant).concurrent_calls
        with self._place(self._calls, tenant, "concurrent_calls", limit, MAX_CALLS):
            yield

    @contextmanager
    def queued(self, tenant: str) -> Iterator[None]:
        """Hold a place for one generation that waits or runs. Raises QUOTA_EXCEEDED when all are taken."""
        with self._place(self._depths, tenant, "queue_depth", self._quota_of(tenant).queue_depth, None):
            yield

    @contextmanager
    def _place(
        self, taken: Counter[str], tenant: str, cause: str, limit: int | None, of_all: int | None
    ) -> Iterator[None]:
        with self._lock:
            if limit is not None and taken[tenant] >= limit:
                raise quota_exceeded(cause, limit=limit, used=taken[tenant], retry_after=QUEUE_RETRY_SECONDS)
            if of_all is not None and taken.total() >= of_all:
                raise MooringError(
                    Reason.QUEUE_FULL,
                    f"The server runs {of_all} calls already.",
                    remedy="Repeat later.",
                    metadata={"cause": cause, "scope": "server", "limit": str(of_all)},
                    retry_after=QUEUE_RETRY_SECONDS,
                )
            taken[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                taken[tenant] -= 1
                if not taken[tenant]:
                    del taken[tenant]

    def depth(self, tenant: str) -> int:
        """Generations of a tenant that wait or run."""
        with self._lock:
            return self._depths[tenant]


class DeviceTime:
    """Engine time of every tenant: counted as it passes, written down every few seconds.

    Replicas share the account through the store, so that a day's limit holds for all of them together; what
    another replica has not written down yet is not seen, which is at most `FLUSH_SECONDS` of its work. What
    was counted and not yet written when a process is killed is lost.

    Args:
        add: adds seconds by tenant to today's account; blocks.
        read: seconds of a tenant since the UTC day began, and the time since the epoch; blocks.
    """

    def __init__(
        self,
        add: Callable[[dict[str, float]], None],
        read: Callable[[str], tuple[float, float]],
    ) -> None:
        self._add = add
        self._read = read
        self._lock = threading.Lock()
        self._unwritten: dict[str, float] = {}
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="mooring-device-time", daemon=True)

    def used(self, tenant: str, seconds: float) -> None:
        """Count; on the engine's thread."""
        if tenant:
            with self._lock:
                self._unwritten[tenant] = self._unwritten.get(tenant, 0.0) + seconds

    def require(self, tenant: str, limit: float | None) -> None:
        """Refuse new device work of a tenant whose day is used up; work that has begun goes on. Blocks.

        Args:
            tenant: who asks.
            limit: seconds a UTC day; None is no limit.

        Raises:
            MooringError: QUOTA_EXCEEDED, with the time until the next UTC day.
        """
        if limit is None:
            return
        with self._writing:  # what is being written is in neither of the two sums
            written, now = self._read(tenant)
            with self._lock:
                used = written + self._unwritten.get(tenant, 0.0)
        if used >= limit:
            wait = max(DAY_SECONDS - now % DAY_SECONDS, 0.001)
            raise quota_exceeded("device_seconds_per_day", limit=limit, used=round(used, 3), retry_after=wait)

    def write(self) -> None:
        """Write down what was counted; it is kept for the next time when that fails."""
        with self._writing:
            with self._lock:
                taken, self._unwritten = self._unwritten, {}
            if not taken:
                return
            try:
                self._add(taken)
            except BaseException:
                for tenant, seconds in taken.items():
                    self.used(tenant, seconds)
                raise

    def start(self) -> None:
        """Write from now on."""
        self._thread.start()

    def close(self) -> None:
        """Write a last time, and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._try_to_write()

    def _keep_writing(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self.write()
        except Exception as error:  # noqa: BLE001 - whatever the database has, accounting must not end for it
            log.warning("device time could not be written; it is kept", error=str(error))


def is_queue_full(error: MooringError) -> bool:
    """Whether a refusal means that other work is ahead, so that a batch waits rather than fails."""
    return error.reason is Reason.QUEUE_FULL or error.metadata.get("cause") == "queue_depth"
