"""Who calls: an API key, a token or a client certificate made into an `Identity`.

One answer for every credential that opens nothing, whatever is wrong with it: only the log says what. A
credential that is shown and bad is refused; no other one is tried in its place. Nothing is remembered between
calls, so that a revoked key is refused by the very next one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from mooring_server.config import TENANT, AuthMethod
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc.caller import LOCAL, Identity
from mooring_server.rpc.tokens import CredentialRefusedError, TokenVerifier, as_role, identity_unavailable
from mooring_server.storage.keys import PREFIX, ApiKey, KeyRefusedError
from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.identity")

_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]+)")
_SPIFFE = re.compile(r"spiffe://([a-z0-9._-]+)/tenants/([^/]+)/([^/]+)")


class CallContext(Protocol):
    """What is read of a `grpc.aio.ServicerContext`."""

    def invocation_metadata(self) -> Any:
        """Pairs of the call's metadata."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What TLS knows of the peer."""


class Authenticator:
    """Finds the identity behind a call by the methods that the server accepts.

    Args:
        methods: accepted methods; none means that everybody is `LOCAL`.
        find_key: looks an API key up; blocks.
        tokens: checks JWTs; needed for "jwt".
        trust_domain: of certificates, for "mtls".
    """

    def __init__(
        self,
        methods: Sequence[AuthMethod],
        *,
        find_key: Callable[[str], ApiKey],
        tokens: TokenVerifier | None = None,
        trust_domain: str = "",
    ) -> None:
        self._methods = frozenset(methods)
        self._find_key = find_key
        self._tokens = tokens
        self._trust_domain = trust_domain
        # its own threads: looking a key up must not queue behind pictures that are being compressed
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="mooring-identity")

    async def start(self) -> None:
        """Read the keys of tokens, and keep them fresh."""
        if self._tokens is not None:
            await self._tokens.keys.start()

    async def close(self) -> None:
        """Stop refreshing."""
        if self._tokens is not None:
            await self._tokens.keys.close()
        self._threads.shutdown(wait=False)

    async def identify(self, context: CallContext) -> Identity:
        """The identity behind a call.

        Raises:
            MooringError: NOT_AUTHENTICATED, the same for every cause; IDENTITY_UNAVAILABLE when the database
                or the issuer's keys cannot be read.
        """
        if not self._methods:
            return LOCAL
        try:
            return await self._identify(context)
        except CredentialRefusedError as refusal:
            structlog.contextvars.bind_contextvars(refused=refusal.cause)
            if refusal.subject:
                structlog.contextvars.bind_contextvars(credential=refusal.subject)
        raise MooringError(
            Reason.NOT_AUTHENTICATED,
            "The call carries no valid credential.",
            remedy="Send an API key or a token as “authorization: Bearer …”, or use a client certificate.",
        )

    async def _identify(self, context: CallContext) -> Identity:
        headers = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if not headers:
            if "mtls" in self._methods:
                return certificate_identity(context.auth_context(), self._trust_domain)
            raise CredentialRefusedError("missing")
        match = _BEARER.fullmatch(headers[0]) if len(headers) == 1 else None
        if match is None:
            raise CredentialRefusedError("header")
        credential = match[1]
        if credential.startswith(PREFIX) and "api_key" in self._methods:
            return await self._key_identity(credential)
        if self._tokens is not None and "jwt" in self._methods:
            return await self._tokens.verify(credential)
        raise CredentialRefusedError("method")

    async def _key_identity(self, key: str) -> Identity:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._find_key, key)
        except KeyRefusedError as refusal:
            raise CredentialRefusedError(f"key_{refusal.cause}", refusal.key_id) from None
        except SQLAlchemyError as error:
            log.warning("API keys cannot be read", error=str(error))
            raise identity_unavailable() from error
        return Identity(found.tenant, as_role(found.role), found.key_id, "api_key")


def certificate_identity(peer: Mapping[str, Iterable[bytes]], trust_domain: str) -> Identity:
    """The identity in a client certificate that TLS has verified: spiffe://DOMAIN/tenants/TENANT/ROLE.

    Args:
        peer: gRPC's authentication context. Only URI names are read: a DNS name may hold any text.
        trust_domain: what DOMAIN must be.

    Raises:
        CredentialRefusedError: there is no certificate, or not exactly one such name in it.
    """
    if list(peer.get("transport_security_type", ())) != [b"ssl"]:
        raise CredentialRefusedError("no_tls")
    names = list(peer.get("peer_uri", ()))
    if len(names) != 1:  # the SPIFFE standard: exactly one URI
        raise CredentialRefusedError("certificate_names")
    name = names[0].decode("utf-8", "replace")
    match = _SPIFFE.fullmatch(name)
    if match is None or match[1] != trust_domain or not TENANT.fullmatch(match[2]):
        raise CredentialRefusedError("certificate_name")
    return Identity(match[2], as_role(match[3]), name, "mtls")
