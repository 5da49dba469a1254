"""`python -m mooring_server` is the `mooring` command."""

from __future__ import annotations

from mooring_server.cli import app

if __name__ == "__main__":
    app(prog_name="mooring")
