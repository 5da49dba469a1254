"""The background sweep: one thread that collects garbage, on one replica at a time.

The replicas' turn is a lease that nobody hands back: it runs out when the next sweep is due, so there is one
sweep per interval however many replicas there are, and another replica does it when this one has died.
"""

from __future__ import annotations

import logging
import threading

from mooring_server.errors import MooringError
from mooring_server.storage.garbage import Retention, collect
from mooring_server.storage.objects import ObjectStore
from mooring_server.storage.store import Store

log = logging.getLogger(__name__)

_TASK = "gc"


class Sweeper:
    """Sweeps every `interval` seconds while it runs.

    Args:
        store: the database.
        objects: what is swept.
        retention: how long things stay.
        interval: seconds between two sweeps of all replicas together.
        worker: this replica, for people to read.
    """

    def __init__(
        self, store: Store, objects: ObjectStore, retention: Retention, *, interval: float, worker: str
    ) -> None:
        self._store, self._objects, self._retention = store, objects, retention
        self._interval, self._worker = interval, worker
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End; a sweep that is under way may be cut off anywhere. Nothing when it was not started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._store.take_turn(_TASK, self._worker, self._interval):
                    found = collect(self._store, self._objects, self._retention)
                    log.info("removed %d of %d objects, %d bytes", len(found.keys), found.seen, found.size)
            except MooringError as error:
                log.warning("the sweep is put off: %s", error.message)
            except Exception:
                log.exception("the sweep failed")
            # Looked at more often than it is due, so that a dead replica's turn is not missed for long.
            self._stopping.wait(self._interval / 4)
