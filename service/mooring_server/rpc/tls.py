"""The server's certificate, read again when its files change, so that a rotation needs no restart.

gRPC asks for the certificate at every handshake; the files are looked at then, which costs three `stat`s.
A pair of which only one half has been replaced yet is not used: the old one serves until both are there.
Connections that exist keep the certificate that they began with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from mooring_server.config import Settings
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.tls")


class CertificateFiles:
    """A certificate chain, its key, and the authorities of clients.

    Args:
        cert: PEM chain, the server's own first.
        key: PEM private key without a password.
        client_ca: PEM of the authorities, None when clients show no certificate.

    Raises:
        MooringError: INVALID_FIELD when the files cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = (cert, key) if client_ca is None else (cert, key, client_ca)
        self._seen: object = None
        try:
            self._seen = self._marks()
            self._current = self._read()
        except (OSError, ValueError) as error:
            problem = f"{cert} and {key} cannot be used: {error}"
            raise MooringError(
                Reason.INVALID_FIELD,
                f"The server's certificate: {problem}.",
                remedy="Set MOORING_TLS_CERT and MOORING_TLS_KEY to a PEM chain and its key.",
                fields=[FieldViolation("tls_cert", problem)],
            ) from error

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; with authorities, clients without a certificate are refused."""
        fetch: Any = self.newest  # the stubs forget that None means unchanged
        return grpc.dynamic_ssl_server_credentials(
            self._current, fetch, require_client_authentication=len(self._paths) == 3
        )

    def newest(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificate if it changed since the last call, else None. Called on gRPC's threads."""
        try:
            marks = self._marks()
            if marks == self._seen:
                return None
            self._current = self._read()
        except (OSError, ValueError) as error:
            log.warning("the new certificate cannot be used yet; the old one serves", error=str(error))
            return None
        self._seen = marks
        log.info("the certificate was replaced")
        return self._current

    def _marks(self) -> object:
        """What changes when a file is replaced, also when by a link to another one."""
        found = [os.stat(path) for path in self._paths]  # noqa: PTH116 - one call, links followed
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        chain, key, *authorities = (path.read_bytes() for path in self._paths)
        certificate = x509.load_pem_x509_certificates(chain)[0]
        private = load_pem_private_key(key, password=None)
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        if certificate.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
            message = "the key is not the certificate's"
            raise ValueError(message)
        for authority in authorities:
            x509.load_pem_x509_certificates(authority)
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], root_certificates=authorities[0] if authorities else None
        )


def connection_options(settings: Settings) -> list[tuple[str, Any]]:
    """Options of the gRPC server that end connections in time where a client certificate says who calls.

    It is looked at in the handshake alone, while keys and tokens are checked at every call: without an end, a
    certificate that was revoked or has expired would count for as long as its holder keeps the connection.
    gRPC adds up to a tenth, so that clients do not come back all at once.
    """
    if settings.tls_client_ca is None or not settings.max_connection_age_seconds:
        return []
    return [
        ("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", round(settings.max_connection_grace_seconds * 1000)),
    ]


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What the settings ask for; None for plain text. Raises INVALID_FIELD."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca).credentials()
