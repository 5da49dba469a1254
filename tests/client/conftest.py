"""The scripted server as a fixture."""

from __future__ import annotations

from scripted_server import server

__all__ = ["server"]
