"""TLS of the listening port, its rotation, and client certificates, over real handshakes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from credentials import Certified, certify, server_certificate
from mooring_server.config import Quota, Role, Settings
from mooring_server.errors import MooringError
from mooring_server.rpc.caller import CALLER, Identity
from mooring_server.rpc.edge import Access, EdgeInterceptor, Gate
from mooring_server.rpc.identity import Authenticator
from mooring_server.rpc.permissions import Permission, Rule
from mooring_server.rpc.quotas import Quotas
from mooring_server.rpc.tls import CertificateFiles, connection_options, server_credentials
from mooring_server.telemetry.metrics import Metrics
from rpc_calls import DEADLINE

Listen = Callable[..., Awaitable[str]]


@pytest.fixture(scope="module")
def authority() -> Certified:
    return certify("authority")


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Starts servers whose one method tells who calls."""
    servers: list[Any] = []

    async def start(settings: Settings) -> str:
        authenticator = Authenticator(
            settings.auth,
            find_key=lambda _key: pytest.fail("nobody shows a key"),
            trust_domain=settings.mtls_trust_domain,
        )
        quotas = Quotas(lambda _tenant: Quota(), time.monotonic)
        access = Access(authenticator, quotas, lambda _name: Rule(Permission.READ))
        server = grpc.aio.server(
            interceptors=[EdgeInterceptor(Metrics("0"), Gate(ready=True), access)],
            options=connection_options(settings),
        )

        async def who(_request: bytes, _context: Any) -> bytes:
            return repr(CALLER.get().identity).encode()

        handlers = {"Who": grpc.unary_unary_rpc_method_handler(who)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Tls", handlers)])
        credentials = server_credentials(settings)
        assert credentials is not None
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        servers.append(server)
        return f"localhost:{port}"

    yield start
    for server in servers:
        await server.stop(None)


async def who(target: str, credentials: grpc.ChannelCredentials) -> bytes:
    # a pool of its own, so that no connection is shared between two looks at the server's certificate
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(target, credentials, options) as channel:
        answer: bytes = await channel.unary_unary("/test.Tls/Who")(b"", timeout=DEADLINE)
        return answer


def settings_of(folder: Path, authority: Certified, **changes: Any) -> Settings:
    cert, key = server_certificate(authority).write(folder, "server")
    return Settings(tls_cert=cert, tls_key=key, state_dir=folder, **changes)


async def test_the_certificate_rotates_without_a_restart(
    tmp_path: Path, authority: Certified, listen: Listen
) -> None:
    settings = settings_of(tmp_path, authority)
    target = await listen(settings)
    trusts_old = grpc.ssl_channel_credentials(authority.cert_pem)
    assert b"local" in await who(target, trusts_old)

    another = certify("another authority")
    trusts_new = grpc.ssl_channel_credentials(another.cert_pem)
    server_certificate(another).write(tmp_path, "server")
    assert b"local" in await who(target, trusts_new)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await who(target, trusts_old)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_half_a_rotation_and_rubbish_change_nothing(tmp_path: Path, authority: Certified) -> None:
    files = CertificateFiles(*server_certificate(authority).write(tmp_path, "server"), None)
    assert files.newest() is None
    new = server_certificate(authority)
    (tmp_path / "server.pem").write_bytes(new.cert_pem)
    assert files.newest() is None, "a certificate without its key was used"
    (tmp_path / "server.key").write_bytes(b"rubbish")
    assert files.newest() is None
    (tmp_path / "server.key").unlink()
    assert files.newest() is None
    (tmp_path / "server.key").write_bytes(new.key_pem)
    assert files.newest() is not None
    assert files.newest() is None


def test_a_link_that_turns_to_other_files_is_noticed(tmp_path: Path, authority: Certified) -> None:
    """As a mounted Kubernetes secret does: the names stay, the folder behind them changes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        server_certificate(authority).write(tmp_path / name, "server")
    (tmp_path / "now").symlink_to("one")
    files = CertificateFiles(tmp_path / "now" / "server.pem", tmp_path / "now" / "server.key", None)
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "now")  # noqa: PTH105 - the atomic swap that is meant
    assert files.newest() is not None


@pytest.mark.parametrize("broken", ["missing", "rubbish", "foreign key"])
def test_a_server_does_not_start_with_files_that_cannot_be_used(
    tmp_path: Path, authority: Certified, broken: str
) -> None:
    settings = settings_of(tmp_path, authority)
    assert settings.tls_key is not None
    if broken == "missing":
        settings.tls_key.unlink()
    elif broken == "rubbish":
        settings.tls_key.write_bytes(b"-----BEGIN")
    else:
        settings.tls_key.write_bytes(server_certificate(authority).key_pem)
    with pytest.raises(MooringError, match="certificate"):
        server_credentials(settings)


# -- client certificates ------------------------------------------------------------------------------------


def client_of(authority: Certified, trusted: Certified, **names: tuple[str, ...]) -> grpc.ChannelCredentials:
    shown = certify("client", by=authority, **names)
    return grpc.ssl_channel_credentials(trusted.cert_pem, shown.key_pem, shown.cert_pem)


@pytest.fixture
async def target(tmp_path: Path, authority: Certified, listen: Listen) -> str:
    ca, _ = authority.write(tmp_path, "ca")
    return await listen(settings_of(tmp_path, authority, tls_client_ca=ca, auth=("mtls",)))


async def test_a_certificate_says_who_calls(target: str, authority: Certified) -> None:
    name = "spiffe://mooring/tenants/acme/read-only"
    credentials = client_of(authority, authority, uris=(name,), dns=("acme.example",))
    expected = Identity("acme", Role.READ_ONLY, name, "mtls")
    assert await who(target, credentials) == repr(expected).encode()


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"dns": ("spiffe://mooring/tenants/acme/admin",)},
        {"uris": ("https://mooring/tenants/acme/admin",)},
        {"uris": ("spiffe://elsewhere/tenants/acme/admin",)},
        {"uris": ("spiffe://mooring/tenants/acme/god",)},
        {"uris": ("spiffe://mooring/tenants/-/admin",)},
        {"uris": ("spiffe://mooring/tenants/acme",)},
        {"uris": ("spiffe://mooring/tenants/acme/admin/x",)},
        {"uris": ("spiffe://mooring/tenants/acme/admin?x",)},
        {"uris": ("spiffe://mooring/tenants/acme/user", "spiffe://mooring/tenants/other/user")},
    ],
)
async def test_other_names_in_a_certificate_open_nothing(
    target: str, authority: Certified, names: dict[str, tuple[str, ...]]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await who(target, client_of(authority, authority, **names))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_no_certificate_or_a_stranger_s_does_not_get_through_the_handshake(
    target: str, authority: Certified
) -> None:
    stranger = certify("stranger")
    uris = ("spiffe://mooring/tenants/acme/admin",)
    for credentials in (
        grpc.ssl_channel_credentials(authority.cert_pem),
        client_of(stranger, authority, uris=uris),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await who(target, credentials)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_that_counts_no_longer_is_out_when_its_connection_ends(
    tmp_path: Path, authority: Certified, listen: Listen
) -> None:
    ca, _ = authority.write(tmp_path, "ca")
    settings = settings_of(
        tmp_path,
        authority,
        tls_client_ca=ca,
        auth=("mtls",),
        max_connection_age_seconds=1.0,
        max_connection_grace_seconds=1.0,
    )
    target = await listen(settings)
    credentials = client_of(authority, authority, uris=("spiffe://mooring/tenants/acme/user",))
    async with grpc.aio.secure_channel(target, credentials) as channel:
        call = channel.unary_unary("/test.Tls/Who")
        assert b"acme" in await call(b"", timeout=DEADLINE)
        ready = grpc.ChannelConnectivity.READY
        await asyncio.wait_for(channel.wait_for_state_change(ready), DEADLINE)
        assert b"acme" in await call(b"", timeout=DEADLINE), "a good certificate connects anew"
        ca.write_bytes(certify("another authority").cert_pem)
        while channel.get_state() is not ready:  # the connection of the call just made
            await channel.wait_for_state_change(channel.get_state())
        await asyncio.wait_for(channel.wait_for_state_change(ready), DEADLINE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_connections_end_only_where_a_certificate_says_who_calls(
    tmp_path: Path, authority: Certified
) -> None:
    ca, _ = authority.write(tmp_path, "ca")
    assert connection_options(settings_of(tmp_path, authority)) == []
    guarded = settings_of(tmp_path, authority, tls_client_ca=ca)
    assert connection_options(guarded) == [
        ("grpc.max_connection_age_ms", 3_600_000),
        ("grpc.max_connection_age_grace_ms", 3_600_000),
    ]
    assert connection_options(guarded.model_copy(update={"max_connection_age_seconds": 0.0})) == []
