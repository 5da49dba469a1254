"""Certificates as an organisation's own authority would issue them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def named(name: str) -> x509.Name:
    parts = [(NameOID.ORGANIZATION_NAME, f"{name} Ltd"), (NameOID.COMMON_NAME, name)]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


class Authority:
    """A certificate authority."""

    def __init__(self, name: str = "Harbour") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = named(f"{name} authority")
        self.certificate = (
            self._begun(self.name, self.key.public_key(), timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(_usage(certificates=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self,
        folder: Path,
        name: str = "Harbour marks",
        *,
        key: Any = None,
        ends: timedelta = timedelta(days=7),
        usage: bool = True,
        password: bytes = b"",
    ) -> tuple[Path, Path]:
        """Write a signing certificate and its key; their paths."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = (
            self._begun(named(name), key.public_key(), ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .add_extension(_usage(certificates=False), critical=True)
        )
        if usage:
            wanted = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(wanted, critical=False)
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "tls.crt", folder / "tls.key"
        certificate = builder.sign(self.key, hashes.SHA256())
        hidden = BestAvailableEncryption(password) if password else NoEncryption()
        for path, data in zip(
            paths,
            (
                certificate.public_bytes(Encoding.PEM),
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden),
            ),
            strict=True,
        ):
            part = path.with_suffix(".part")
            part.write_bytes(data)
            part.replace(path)
        return paths

    def _begun(self, subject: x509.Name, key: Any, ends: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + ends)
        )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
