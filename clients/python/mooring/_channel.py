"""How the client's channels are made: TLS and credentials, retries, keepalive, message sizes.

Retries are gRPC's own, by service config, so that they respect deadlines and the server's push-back
(`grpc-retry-pushback-ms`). Only UNAVAILABLE is retried: every creating call carries a `request_id`, so that a
retried one is the same one. A stream is retried until its first message; afterwards `watch` resumes by
sequence.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc

Pem: TypeAlias = str | Path | bytes
"""A PEM file's path, or its contents."""
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's default limit, kept on both sides: whatever is larger travels in chunks."""

SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],  # every method
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


def channel_options() -> list[tuple[str, object]]:
    """Options of `grpc.insecure_channel` and its relatives, sync and asyncio."""
    return [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        # an upload of photos is kept for a retry; 256 KiB, the default, would give it up
        ("grpc.per_rpc_retry_buffer_size", 16 * 1024 * 1024),
        # an open call without data is probed every 30 s; the server allows 10 s
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.primary_user_agent", "mooring-python"),
        # a client that outlives a server restart finds the new one within seconds, not minutes
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


def from_environment() -> dict[str, Any]:
    """Arguments of `Client` and `aio.Client` that the environment sets; an empty variable counts as unset.

    `MOORING_API_KEY`: the key. `MOORING_TOKEN_FILE`: file that holds the token, read again at every call, so
    that it may be replaced. `MOORING_ROOT_CERTIFICATES`: PEM of the authorities to trust.
    `MOORING_CLIENT_CERTIFICATE` and `MOORING_CLIENT_KEY`: PEM of the client's chain and key.

    Example:
        >>> client = mooring.Client("mooring.example:443", **mooring.from_environment())

    Raises:
        ValueError: one half of a client certificate is missing.
    """
    names = ("API_KEY", "TOKEN_FILE", "ROOT_CERTIFICATES", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    key, token_file, roots, chain, private = (os.environ.get(f"MOORING_{name}", "") for name in names)
    if bool(chain) != bool(private):
        message = "MOORING_CLIENT_CERTIFICATE and MOORING_CLIENT_KEY belong together"
        raise ValueError(message)
    found: dict[str, Any] = {}
    if key:
        found["api_key"] = key
    if token_file:
        found["token"] = lambda: Path(token_file).read_text(encoding="utf-8").strip()
    if roots:
        found["root_certificates"] = roots
    if chain:
        found["client_certificate"] = (chain, private)
    return found


def channel_credentials(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None,
    api_key: str,
    token: Callable[[], str] | None,
    root_certificates: Pem | None,
    client_certificate: tuple[Pem, Pem] | None,
) -> grpc.ChannelCredentials | None:
    """TLS and what goes with every call; None (plain text) for a loopback target and nothing of TLS.

    Raises:
        ValueError: a key or token would travel in the clear, or two ways of security were asked for.
        OSError: a PEM file cannot be read.
    """
    if credentials and (root_certificates or client_certificate):
        message = "credentials and root_certificates or client_certificate exclude each other"
        raise ValueError(message)
    if api_key and token:
        message = "api_key and token exclude each other"
        raise ValueError(message)
    source = (lambda: api_key) if api_key else token
    if not (credentials or root_certificates or client_certificate) and is_loopback(target):
        if source:
            message = "A credential is not sent in the clear: give root_certificates or credentials, for TLS."
            raise ValueError(message)
        return None
    if credentials is None:
        chain, private = client_certificate or (None, None)
        credentials = grpc.ssl_channel_credentials(
            _contents(root_certificates), _contents(private), _contents(chain)
        )
    if source is None:
        return credentials
    return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_Bearer(source)))


def is_loopback(target: str) -> bool:
    """Whether a target can be reached from this machine only."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        target = target.removeprefix(scheme)
    host = target.rpartition(":")[0] if target.count(":") == 1 or "]" in target else target
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


class _Bearer(grpc.AuthMetadataPlugin):
    """Sends what a function returns as `authorization: Bearer`, asked at every call."""

    def __init__(self, source: Callable[[], str]) -> None:
        self._source = source

    def __call__(self, _: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            callback((("authorization", f"Bearer {self._source()}"),), None)
        except Exception as error:  # noqa: BLE001 - of the caller's function; gRPC makes it the call's failure
            callback((), error)


def _contents(pem: Pem | None) -> bytes | None:
    return pem if pem is None or isinstance(pem, bytes) else Path(pem).read_bytes()
