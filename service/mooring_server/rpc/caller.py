"""Who calls, for the time of one call."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from mooring_server.config import Role
from mooring_server.rpc.permissions import Rule

LOCAL_TENANT = "local"
"""Everybody's tenant while the server is insecure and reachable from its own machine only."""


@dataclass(frozen=True)
class Identity:
    """What a credential proves.

    Attributes:
        tenant: whose work and things are meant.
        role: what may be done with them.
        subject: who it is, for logs: a key's id, a token's `sub`, a certificate's SPIFFE id.
        method: "api_key", "jwt", "mtls", or "none" on an insecure server.
    """

    tenant: str
    role: Role
    subject: str
    method: str


LOCAL = Identity(LOCAL_TENANT, Role.ADMIN, "local", "none")
"""Everybody on an insecure server."""


@dataclass(frozen=True)
class Caller:
    """The identity behind this call, its id, and its rule, as the outermost interceptor found them."""

    identity: Identity
    request_id: str
    rule: Rule

    @property
    def tenant(self) -> str:
        """The calling tenant."""
        return self.identity.tenant


CALLER: ContextVar[Caller] = ContextVar("mooring_caller")


def tenant() -> str:
    """The calling tenant."""
    return CALLER.get().tenant


def actor() -> str:
    """Who calls, for the record of what was decided: a key's id, a token's subject, a certificate's name."""
    return CALLER.get().identity.subject


def anywhere() -> bool:
    """Whether this call may name other tenants' resources: an operator in a call that allows it."""
    caller = CALLER.get()
    return caller.identity.role is Role.OPERATOR and caller.rule.operators_anywhere
