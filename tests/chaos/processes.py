"""Real servers as processes of their own, to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import mooring

PATIENCE = 800.0
"""Seconds after which something will not happen any more, on a machine that is busy with other work."""


class Replica:
    """`mooring serve` on a state directory of its own; a context manager that kills it at the end.

    Args:
        state: its state directory.
        base: base model's directory.
        variables: settings and credentials.
    """

    def __init__(self, state: Path, base: Path, variables: dict[str, str]) -> None:
        self.state = state
        quiet = {"MOORING_LISTEN": "127.0.0.1:0", "MOORING_METRICS_LISTEN": "", "MOORING_LOG_FORMAT": "json"}
        threads = {"OMP_NUM_THREADS": "1", "MOORING_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._variables = os.environ | quiet | threads | variables
        self._command = [sys.executable, "-m", "mooring_server", "serve"]
        self._command += ["--state-dir", str(state), "--base", str(base)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process; `target` waits until it serves."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "server.json").unlink(missing_ok=True)
        with (self.state / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._variables, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def target(self) -> str:
        """Where it serves, once it does."""
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                return json.loads((self.state / "server.json").read_text(encoding="utf-8"))["target"]
            except FileNotFoundError:
                time.sleep(0.05)
        raise AssertionError(f"no server: {self.log()[-2000:]}")

    def client(self) -> mooring.Client:
        """A client of it."""
        return mooring.Client(self.target)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Drain it; returns its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(how)
        code = self._process.wait(PATIENCE)
        self._process = None
        return code

    def log(self) -> str:
        """What it has said."""
        return (self.state / "log").read_text(encoding="utf-8", errors="replace")
