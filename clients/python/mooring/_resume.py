"""When a broken watch is taken up again, and when it is given up; shared by both clients."""

from __future__ import annotations

import time

from mooring import errors


class Resume:
    """Counts the tries of one watch.

    A watch that never received anything fails at once (the channel has retried already); one that was running
    goes on for `patience` seconds, long enough for a server to restart and load its base model.

    Args:
        after_sequence: last sequence number seen.
        patience: seconds without any event after which the watch is given up.
    """

    def __init__(self, after_sequence: int, patience: float) -> None:
        self.sequence = after_sequence
        self._patience = patience
        self._started = False
        self._failures = 0
        self._last_heard = time.monotonic()

    def received(self, sequence: int) -> None:
        """Note an event."""
        self.sequence = max(self.sequence, sequence)
        self._started = True
        self._failures = 0
        self._last_heard = time.monotonic()

    def cut_short(self) -> None:
        """Note a stream that ended in good order before the job did.

        Raises:
            UnavailableError: always; `pause_after` decides about it.
        """
        raise errors.UnavailableError("The stream ended before the job did.", remedy="Watch the job again.")

    def pause_after(self, error: errors.MooringError) -> float:
        """Seconds to wait before the next try: growing, and at least what the server asks for.

        Raises:
            MooringError: the error itself, when another try is not worth it.
        """
        silent = time.monotonic() - self._last_heard
        if not isinstance(error, errors.UnavailableError) or not self._started or silent > self._patience:
            raise error
        self._failures += 1
        return max(min(0.1 * 2.0 ** min(self._failures, 10), 3.0), error.retry_after or 0.0)
