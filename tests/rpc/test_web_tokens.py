"""Tokens: what is accepted, and every way to be refused; the issuer's keys as they come and go."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from credentials import AUDIENCE, ISSUER, Issuer, certify, server_certificate
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.config import Role
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc.caller import Identity
from mooring_server.rpc.tokens import (
    MAX_STALE_SECONDS,
    MIN_REFRESH_SECONDS,
    CredentialRefusedError,
    KeySet,
    TokenVerifier,
    parse_jwks,
    read_jwks_url,
)

SIGNED = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    made = Issuer()
    for algorithm in ("ES256", "ES384", "ES512", "EdDSA"):
        made.add(algorithm, algorithm)
    made.add("RSA", "RS256")
    made.keys["one"] = made.keys["ES256"]
    return made


def verifier(fetch: Callable[[], bytes], clock: Callable[[], float] = time.monotonic) -> TokenVerifier:
    keys = KeySet(fetch, refresh_seconds=300.0, clock=clock)
    return TokenVerifier(keys, issuer=ISSUER, audience=AUDIENCE, leeway=30.0)


def refusal(issuer: Issuer, token: str) -> str:
    with pytest.raises(CredentialRefusedError) as caught:
        asyncio.run(verifier(issuer.jwks).verify(token))
    return caught.value.cause


@pytest.mark.parametrize("algorithm", SIGNED)
async def test_each_algorithm_of_the_list_is_accepted(issuer: Issuer, algorithm: str) -> None:
    kid = "RSA" if algorithm[0] in "RP" else algorithm
    token = issuer.token(kid, algorithm, role="admin", aud=["another", AUDIENCE])
    found = await verifier(issuer.jwks).verify(token)
    assert found == Identity("acme", Role.ADMIN, "somebody", "jwt")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"exp": 1_000_000}, "token_expired"),
        ({"exp": int(time.time()) - 60}, "token_expired"),
        ({"exp": None}, "token_claim_missing"),
        ({"nbf": int(time.time()) + 3600}, "token_not_yet_valid"),
        ({"iat": int(time.time()) + 3600}, "token_not_yet_valid"),
        ({"aud": "another"}, "token_audience"),
        ({"aud": [AUDIENCE + "2"]}, "token_audience"),
        ({"aud": None}, "token_claim_missing"),
        ({"iss": "https://evil.example"}, "token_issuer"),
        ({"iss": None}, "token_claim_missing"),
        ({"sub": None}, "token_claim_missing"),
        ({"sub": ""}, None),
        ({"tenant": None}, "token_tenant"),
        ({"tenant": ["acme"]}, "token_tenant"),
        ({"tenant": "Acme"}, "token_tenant"),
        ({"tenant": "acme\n"}, "token_tenant"),
        ({"tenant": "-"}, "token_tenant"),
        ({"tenant": ""}, "token_tenant"),
        ({"role": None}, "role"),
        ({"role": ["admin"]}, "role"),
        ({"role": "Admin"}, "role"),
    ],
)
def test_claims_that_do_not_fit_are_refused(
    issuer: Issuer, changes: dict[str, Any], cause: str | None
) -> None:
    token = issuer.token(**changes)
    if cause is None:
        assert asyncio.run(verifier(issuer.jwks).verify(token)).tenant == "acme"
    else:
        assert refusal(issuer, token) == cause


def test_clocks_may_differ_by_the_leeway(issuer: Issuer) -> None:
    token = issuer.token(exp=int(time.time()) - 10, nbf=int(time.time()) + 10)
    assert asyncio.run(verifier(issuer.jwks).verify(token)).tenant == "acme"


def segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_unsigned_and_symmetric_tokens_are_refused(issuer: Issuer) -> None:
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    for algorithm in ("none", "None", "NONE", "", "HS256", None, 7, [], ["ES256"], {"ES256": 1}):
        token = f"{segment({'alg': algorithm, 'kid': 'one'})}.{segment(claims)}."
        assert refusal(issuer, token) in {"token_algorithm", "token_malformed"}
    # the classic confusion: the public key as an HMAC secret
    public = (
        issuer.keys["RSA"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    secret = base64.b64encode(public)  # PyJWT refuses to sign with the PEM itself
    for algorithm in ("HS256", "HS384", "HS512"):
        assert (
            refusal(issuer, jwt.encode(claims, secret, algorithm, headers={"kid": "RSA"}))
            == "token_algorithm"
        )


def test_a_forged_or_changed_token_is_refused(issuer: Issuer) -> None:
    stranger = Issuer()
    stranger.add("one", "ES256")
    assert refusal(issuer, stranger.token()) == "token_signature"
    header, body, signature = issuer.token().split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    assert (
        refusal(issuer, f"{header}.{segment({**claims, 'tenant': 'other'})}.{signature}") == "token_signature"
    )
    assert refusal(issuer, f"{header}.{body}.") == "token_signature"


def test_keys_in_the_header_are_not_believed(issuer: Issuer) -> None:
    stranger = Issuer()
    stranger.add("evil", "ES256")
    headers = {
        "jwk": stranger.jwk("evil"),
        "jku": "https://evil.example/jwks.json",
        "x5u": "https://evil.example",
    }
    assert refusal(issuer, stranger.token("evil", headers=headers)) == "token_key_unknown"
    assert refusal(issuer, stranger.token("evil", headers={**headers, "kid": "one"})) == "token_signature"


def test_a_key_serves_its_own_algorithms_only(issuer: Issuer) -> None:
    forged = jwt.encode({"sub": "x"}, issuer.keys["ES384"], "ES384", headers={"kid": "one"})
    assert refusal(issuer, forged) == "token_algorithm"


def test_a_token_must_name_its_key(issuer: Issuer) -> None:
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    assert refusal(issuer, jwt.encode(claims, issuer.keys["one"], "ES256")) == "token_key_unnamed"


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=200))
def test_nonsense_is_refused_and_breaks_nothing(text: str) -> None:
    issuer = Issuer()
    issuer.add("one")
    assert refusal(issuer, text).startswith("token_")


# -- key sets -----------------------------------------------------------------------------------------------


def test_only_usable_keys_of_a_set_are_taken(issuer: Issuer) -> None:
    weak = Issuer()
    weak.add("weak", "RS256", bits=1024)
    good = issuer.jwk("one")
    document = {
        "keys": [
            good,
            {**good, "kid": "for encryption", "use": "enc"},
            {**good, "kid": "to sign", "key_ops": ["sign"]},
            {**good, "kid": "of another algorithm", "alg": "ES512"},
            {**good, "kid": "of no curve", "crv": "secp256k1"},
            {name: value for name, value in good.items() if name != "kid"},
            {"kty": "oct", "kid": "symmetric", "k": "c2VjcmV0"},
            {"kty": "EC", "kid": "broken", "crv": "P-256", "x": "!", "y": "?"},
            weak.jwk("weak"),
            "nonsense",
        ]
    }
    assert list(parse_jwks(json.dumps(document).encode())) == ["one"]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"keys": 1}', b'{"keys": []}', b"\xff", b'{"keys": [{"kid": "x"}]}']
)
def test_what_is_no_key_set_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_jwks(data)


def test_a_set_with_a_private_key_or_an_id_twice_is_refused(issuer: Issuer) -> None:
    private = jwt.algorithms.ECAlgorithm.to_jwk(issuer.keys["one"], as_dict=True)
    with pytest.raises(ValueError, match="private"):
        parse_jwks(json.dumps({"keys": [{**private, "kid": "one"}]}).encode())
    with pytest.raises(ValueError, match="two keys"):
        parse_jwks(json.dumps({"keys": [issuer.jwk("one")] * 2}).encode())


class Source:
    """A key set that tests change, or break, and a clock that they move."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer, self.reads, self.broken, self.now = issuer, 0, False, 1000.0

    def fetch(self) -> bytes:
        self.reads += 1
        if self.broken:
            raise OSError("the issuer is away")
        return self.issuer.jwks()

    def clock(self) -> float:
        return self.now


@pytest.fixture
def source() -> Source:
    issuer = Issuer()
    issuer.add("one")
    return Source(issuer)


async def test_a_new_key_is_found_by_its_first_token_and_a_removed_one_is_forgotten(source: Source) -> None:
    tokens = verifier(source.fetch, source.clock)
    await tokens.verify(source.issuer.token())
    old = source.issuer.token()
    source.issuer.keys.clear()
    source.issuer.add("two")
    assert (await tokens.verify(old)).tenant == "acme"  # until the keys are read again
    source.now += MIN_REFRESH_SECONDS
    assert (await tokens.verify(source.issuer.token("two"))).tenant == "acme"
    assert source.reads == 2
    with pytest.raises(CredentialRefusedError, match="token_key_unknown"):
        await tokens.verify(old)


async def test_unknown_ids_do_not_hammer_the_issuer(source: Source) -> None:
    tokens = verifier(source.fetch, source.clock)
    stranger = Issuer()
    stranger.add("evil")
    refused = await asyncio.gather(
        *(tokens.verify(stranger.token("evil")) for _ in range(50)), return_exceptions=True
    )
    assert {type(error) for error in refused} == {CredentialRefusedError}
    assert source.reads == 1
    source.now += MIN_REFRESH_SECONDS
    for _ in range(5):
        with pytest.raises(CredentialRefusedError):
            await tokens.verify(stranger.token("evil"))
    assert source.reads == 2


async def test_known_keys_outlive_an_issuer_that_is_away_for_a_day(source: Source) -> None:
    tokens = verifier(source.fetch, source.clock)
    await tokens.verify(source.issuer.token())
    source.broken = True
    source.now += MAX_STALE_SECONDS
    assert (await tokens.verify(source.issuer.token())).tenant == "acme"
    source.now += 1
    with pytest.raises(MooringError) as caught:
        await tokens.verify(source.issuer.token())
    assert caught.value.reason is Reason.IDENTITY_UNAVAILABLE


async def test_before_the_first_reading_nobody_is_judged(source: Source) -> None:
    source.broken = True
    tokens = verifier(source.fetch, source.clock)
    await tokens.keys.start()
    try:
        with pytest.raises(MooringError) as caught:
            await tokens.verify(source.issuer.token())
        assert caught.value.reason is Reason.IDENTITY_UNAVAILABLE
        source.broken = False
        source.now += MIN_REFRESH_SECONDS
        assert (await tokens.verify(source.issuer.token())).tenant == "acme"
    finally:
        await tokens.keys.close()


# -- by https -----------------------------------------------------------------------------------------------


@pytest.fixture
def https(tmp_path: Path, source: Source) -> Iterator[tuple[str, Path, list[str]]]:
    """A key set behind TLS: its address, its authority, and the paths that were asked for."""
    authority = certify("authority")
    ca, _ = authority.write(tmp_path, "ca")
    cert, key = server_certificate(authority).write(tmp_path, "server")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = b"x" * (2**20 + 1) if self.path == "/large" else source.issuer.jwks()
            self.send_response({"/moved": 302, "/gone": 404}.get(self.path, 200))
            self.send_header("Location", "/jwks.json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_port}", ca, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_keys_come_by_https(https: tuple[str, Path, list[str]]) -> None:
    address, ca, asked = https
    assert list(parse_jwks(read_jwks_url(f"{address}/jwks.json?v=1", ca))) == ["one"]
    assert asked == ["/jwks.json?v=1"]


def test_redirects_errors_and_long_answers_are_not_taken(https: tuple[str, Path, list[str]]) -> None:
    address, ca, asked = https
    for path, why in (("/moved", "302"), ("/gone", "404"), ("/large", "bytes")):
        with pytest.raises(ValueError, match=why):
            read_jwks_url(f"{address}{path}", ca)
    assert asked == ["/moved", "/gone", "/large"]


def test_a_certificate_that_nobody_vouches_for_is_not_trusted(https: tuple[str, Path, list[str]]) -> None:
    address, _, asked = https
    with pytest.raises(ssl.SSLCertVerificationError):
        read_jwks_url(f"{address}/jwks.json")
    assert asked == []
