"""Verifies the audit log while the server runs, and writes its head to the log.

Every minute what was added since, every day everything. The head in the server's own log lines is the record
outside of the database that a cut or rewritten chain can be held against.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from mooring_server.telemetry.logs import get_logger
from mooring_server.telemetry.metrics import Metrics

log = get_logger("mooring.audit")

EVERY_SECONDS = 60.0
ALL_EVERY_SECONDS = 24 * 3600.0


class Verdict(Protocol):
    """As the store's."""

    @property
    def head(self) -> Any:
        """The last entry that holds; its `number` and text."""

    @property
    def problem(self) -> str:
        """What is wrong after it."""


class AuditWatch:
    """A thread that verifies.

    Args:
        verify: the store's: from a head, or None for everything.
        metrics: where the outcome is told.
        every: seconds between two looks.
    """

    def __init__(
        self, verify: Callable[[Any], Verdict], metrics: Metrics, *, every: float = EVERY_SECONDS
    ) -> None:
        self._verify, self._metrics, self._every = verify, metrics, every
        self._head: Any = None
        self._all_done = 0.0
        self._broken = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-verify", daemon=True)

    def start(self) -> None:
        """Verify everything, then watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Verify once; a break is told at every look until the process ends, whatever is repaired."""
        whole = self._head is None or time.monotonic() - self._all_done >= ALL_EVERY_SECONDS
        verdict = self._verify(None if whole else self._head)
        if whole and not verdict.problem and self._head is not None:
            # it holds by itself; that it is the same chain as before is another question
            verdict = self._verify(self._head)
        if verdict.problem:
            self._broken = True
            log.error("audit_chain_broken", problem=verdict.problem, last_intact=str(verdict.head))
        else:
            if whole:
                self._all_done = time.monotonic()
            if verdict.head != self._head:
                log.info("audit_head", head=str(verdict.head))
            self._head = verdict.head
            self._metrics.audit_entries.set(verdict.head.number)
        self._metrics.audit_intact.set(0 if self._broken else 1)
        self._metrics.audit_verified.set(time.time())

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except Exception:
                log.warning("audit log not verified", exc_info=True)
            self._stopping.wait(self._every)
