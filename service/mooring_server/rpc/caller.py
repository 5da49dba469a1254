"""Who calls, for the time of one call."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

LOCAL_TENANT = "local"
"""Everybody's tenant while the server is insecure and reachable from its own machine only."""


@dataclass(frozen=True)
class Caller:
    """The calling tenant and the id of this call, as the outermost interceptor found them."""

    tenant: str
    request_id: str


CALLER: ContextVar[Caller] = ContextVar("mooring_caller")


def tenant() -> str:
    """The calling tenant."""
    return CALLER.get().tenant
