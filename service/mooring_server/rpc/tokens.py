"""JSON Web Tokens: checked against the issuer's public keys, which are kept and refreshed.

What a token's header says is never believed: its algorithm must be on the list below, which holds asymmetric
ones only, and must be one that the named key is for; keys that the header points to or carries (`jku`, `jwk`,
`x5u`) are not looked at. Sources: RFC 7519, RFC 8725 (best current practices), RFC 7517 for the key set.

Left out: discovery by the issuer's metadata (the address of its keys is a setting) and proxies on the way to
it (mount the key set as a file instead).
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from mooring_server.config import TENANT, Role, Settings
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc.caller import Identity
from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.identity")

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
ALGORITHMS: Final = frozenset({*_RSA, *_CURVES.values(), "EdDSA"})
"""No HMAC: with it, who can check tokens can make them. No "none"."""

MIN_RSA_BITS: Final = 2048
MAX_JWKS_BYTES: Final = 2**20
FETCH_SECONDS: Final = 10.0
MIN_REFRESH_SECONDS: Final = 10.0
"""Between two reads that unknown key ids ask for: tokens of nobody must not hammer the issuer."""

MAX_STALE_SECONDS: Final = 86_400.0
"""How long keys are trusted that could not be read again."""

JwkSet = Mapping[str, Mapping[str, jwt.PyJWK]]
"""kid → algorithm → key."""

_CAUSES: Final[Mapping[type[Exception], str]] = {
    jwt.ExpiredSignatureError: "token_expired",
    jwt.ImmatureSignatureError: "token_not_yet_valid",
    jwt.InvalidAudienceError: "token_audience",
    jwt.InvalidIssuerError: "token_issuer",
    jwt.MissingRequiredClaimError: "token_claim_missing",
    jwt.InvalidSignatureError: "token_signature",
    jwt.InvalidAlgorithmError: "token_algorithm",
}


class CredentialRefusedError(Exception):
    """A credential opens nothing.

    Attributes:
        cause: for the log, of a bounded set.
        subject: whose it claims to be, "" when unknown.
    """

    def __init__(self, cause: str, subject: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.subject = subject


def identity_unavailable() -> MooringError:
    """The keys that credentials are checked with cannot be read."""
    return MooringError(
        Reason.IDENTITY_UNAVAILABLE,
        "Credentials cannot be checked at the moment.",
        remedy="Repeat in a few seconds.",
    )


def as_role(value: Any) -> Role:
    """A role by its name. Raises CredentialRefusedError."""
    try:
        return Role(value)
    except ValueError:
        raise CredentialRefusedError("role") from None


def parse_jwks(data: bytes) -> JwkSet:
    """The usable keys of a JSON Web Key Set; those for other uses or of other kinds are left out.

    Raises:
        ValueError: it is no key set, no key of it is usable, an id stands for two keys, or it holds a private
            key, which then has leaked.
    """
    document = json.loads(data)
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        message = "it is no JSON Web Key Set: “keys” is missing"
        raise ValueError(message)  # noqa: TRY004 - the contents are wrong, not the caller's type
    found: dict[str, Mapping[str, jwt.PyJWK]] = {}
    for entry in keys:
        if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
            continue
        if "d" in entry:
            message = f"key {entry['kid']!r} is a private one; publish the public half, and make new keys"
            raise ValueError(message)
        usable = _usable(entry)
        if usable and entry["kid"] in found:
            message = f"it has two keys with the id {entry['kid']!r}"
            raise ValueError(message)
        if usable:
            found[entry["kid"]] = usable
    if not found:
        message = "it has no signature key with an id (RSA from 2048 bits, P-256, P-384, P-521, Ed25519)"
        raise ValueError(message)
    return found


def _usable(entry: dict[str, Any]) -> dict[str, jwt.PyJWK]:
    operations = entry.get("key_ops")
    if entry.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return {}
    kinds = {
        "RSA": _RSA,
        "EC": (_CURVES.get(str(entry.get("crv")), ""),),
        "OKP": ("EdDSA",) if entry.get("crv") == "Ed25519" else (),
    }
    names = [name for name in kinds.get(str(entry.get("kty")), ()) if entry.get("alg", name) == name and name]
    try:
        keys = {name: jwt.PyJWK(entry, name) for name in names}
    except jwt.PyJWTError as error:
        log.warning("a key of the issuer cannot be read", kid=entry["kid"], error=str(error))
        return {}
    public = next(iter(keys.values())).key if keys else None
    small = isinstance(public, RSAPublicKey) and public.key_size < MIN_RSA_BITS
    return {} if small else keys


class KeySet:
    """The issuer's keys: read at start, again when they are old, and when a token names an unknown one.

    Use it on one event loop.

    Args:
        fetch: reads the set; blocks; raises OSError or ValueError.
        refresh_seconds: age at which they are read again.
        clock: steady seconds.
    """

    def __init__(
        self,
        fetch: Callable[[], bytes],
        *,
        refresh_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._keys: JwkSet | None = None
        self._read_at = -float("inf")
        self._tried_at = -float("inf")
        self._reading = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and go on doing so; an issuer that is away now may be back when tokens come."""
        await self._refresh(unless=lambda: False)
        self._task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def key(self, kid: str, algorithm: str) -> jwt.PyJWK:
        """The key of an id for an algorithm.

        Raises:
            CredentialRefusedError: there is no such key.
            MooringError: IDENTITY_UNAVAILABLE, when keys were never read, or too long ago.
        """
        if self._find(kid) is None:
            await self._refresh(unless=lambda: self._find(kid) is not None)
        known = self._find(kid)
        if self._keys is None or self._clock() - self._read_at > MAX_STALE_SECONDS:
            raise identity_unavailable()
        if known is None:
            raise CredentialRefusedError("token_key_unknown")
        if algorithm not in known:
            raise CredentialRefusedError("token_algorithm")
        return known[algorithm]

    def _find(self, kid: str) -> Mapping[str, jwt.PyJWK] | None:
        return None if self._keys is None else self._keys.get(kid)

    async def _refresh(self, unless: Callable[[], bool]) -> None:
        """Read the keys unless that was tried just now; who waits for another's reading profits from it."""
        async with self._reading:
            if unless() or self._clock() - self._tried_at < MIN_REFRESH_SECONDS:
                return
            try:
                await self._read()
            except (OSError, ValueError) as error:
                log.warning("the issuer's keys cannot be read", error=str(error), kept=self._keys is not None)

    async def _read(self) -> None:
        self._tried_at = self._clock()
        self._keys = parse_jwks(await asyncio.to_thread(self._fetch))
        self._read_at = self._clock()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(min(self._refresh_seconds, MIN_REFRESH_SECONDS))
            if self._clock() - self._read_at >= self._refresh_seconds:
                await self._refresh(unless=lambda: False)


class TokenVerifier:
    """Tokens of one issuer for one audience.

    Args:
        keys: the issuer's.
        issuer: required `iss`.
        audience: required `aud`, or one of them.
        leeway: seconds that clocks may differ.
        tenant_claim: claim that names the tenant.
        role_claim: claim that names the role.
    """

    def __init__(
        self,
        keys: KeySet,
        *,
        issuer: str,
        audience: str,
        leeway: float,
        tenant_claim: str = "tenant",
        role_claim: str = "role",
    ) -> None:
        self.keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._tenant_claim = tenant_claim
        self._role_claim = role_claim

    async def verify(self, token: str) -> Identity:
        """The identity that a token proves.

        Raises:
            CredentialRefusedError: it proves none.
            MooringError: IDENTITY_UNAVAILABLE.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise CredentialRefusedError("token_malformed") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        # the header is anybody's JSON: what is no text cannot be looked for in a set
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise CredentialRefusedError("token_algorithm")
        if not isinstance(kid, str):
            raise CredentialRefusedError("token_key_unnamed")
        key = await self.keys.key(kid, algorithm)
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway,
                options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
            )
        except jwt.PyJWTError as error:
            raise CredentialRefusedError(_CAUSES.get(type(error), "token_malformed")) from None
        subject = "".join(letter if letter.isprintable() else "?" for letter in claims["sub"][:200])
        tenant = claims.get(self._tenant_claim)
        if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
            raise CredentialRefusedError("token_tenant", subject)
        return Identity(tenant, as_role(claims.get(self._role_claim)), subject, "jwt")


def read_jwks_url(url: str, ca: Path | None = None) -> bytes:
    """A key set by https. Redirects are not followed: they could lead off the allow-list.

    Args:
        url: its address; the settings have checked its host.
        ca: PEM of the authorities to trust, None for the system's.

    Raises:
        OSError: no connection, or no trust in it.
        ValueError: another answer than 200, or too long a one.
    """
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    connection = HTTPSConnection(parts.netloc, timeout=FETCH_SECONDS, context=context)
    try:
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        connection.request("GET", target, headers={"Accept": "application/json"})
        response = connection.getresponse()
        data = response.read(MAX_JWKS_BYTES + 1)
        if response.status != 200 or len(data) > MAX_JWKS_BYTES:
            message = f"{url} answered {response.status} with {len(data)} bytes"
            raise ValueError(message)
    except HTTPException as error:
        message = f"{url} does not answer as a web server: {error!r}"
        raise OSError(message) from error
    else:
        return data
    finally:
        connection.close()


def verifier_of(settings: Settings) -> TokenVerifier | None:
    """What the settings ask for; None when tokens are not accepted."""
    if "jwt" not in settings.auth:
        return None
    file, url, ca = settings.jwt_jwks_file, settings.jwt_jwks_url, settings.jwt_jwks_ca
    keys = KeySet(
        (lambda: read_jwks_url(url, ca)) if file is None else file.read_bytes,
        refresh_seconds=settings.jwt_refresh_seconds,
    )
    return TokenVerifier(
        keys,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        leeway=settings.jwt_leeway_seconds,
        tenant_claim=settings.jwt_tenant_claim,
        role_claim=settings.jwt_role_claim,
    )
