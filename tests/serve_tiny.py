"""A real server on a tiny base in a process of its own: `python tests/serve_tiny.py STATE_DIR HOST:PORT`.

For tests that kill it, and for clients in other languages. Everything else comes from `MOORING_*` variables,
as for `mooring serve`. It writes one line of JSON when it takes calls: `target`, and `key`, an API key of the
tenant "tests" that is new at every start. It stops when its standard input is closed, so that it never
outlives the test that started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path

from mooring_server.config import Settings
from mooring_server.server import serve
from mooring_server.storage.store import Store
from tiny_bases import save_tiny_sd


def main() -> None:
    """Serve until standard input is closed."""
    state, listen = Path(sys.argv[1]), sys.argv[2]
    base = state / "base"
    if not base.exists():
        save_tiny_sd(base)
    settings = Settings(
        base=str(base), state_dir=state, listen=listen, metrics_listen="", threads=1, rank=8, slots=4
    )

    def ready(target: str) -> None:
        store = Store(settings.storage_url)
        _, key = store.create_key("tests", "admin")
        store.close()
        sys.stdout.write(json.dumps({"target": target, "key": key}) + "\n")
        sys.stdout.flush()

    def stop_with_the_test() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_the_test, daemon=True).start()
    asyncio.run(serve(settings, on_ready=ready))


if __name__ == "__main__":
    main()
