"""Certificates, tokens and key sets for tests, made fresh for each run."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

ISSUER, AUDIENCE = "https://issuer.example", "mooring-tests"


@dataclass(frozen=True)
class Certified:
    """A certificate with its key."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Both as PEM files, replaced by renaming as tools do."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        for path, data in ((cert, self.cert_pem), (key, self.key_pem)):
            temporary = path.with_suffix(".new")
            temporary.write_bytes(data)
            temporary.replace(path)
        return cert, key


def certify(
    name: str, *, by: Certified | None = None, dns: tuple[str, ...] = (), uris: tuple[str, ...] = ()
) -> Certified:
    """A certificate signed by another, or a self-signed authority."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.certificate.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    names: list[x509.GeneralName] = [x509.DNSName(value) for value in dns]
    names += [x509.UniformResourceIdentifier(value) for value in uris]
    if "localhost" in dns:
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = private if by is None else by.private
    return Certified(builder.sign(signer, hashes.SHA256()), private)


def server_certificate(authority: Certified) -> Certified:
    return certify("server", by=authority, dns=("localhost",))


class Issuer:
    """Signs tokens, and publishes its keys."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}

    def add(self, kid: str, algorithm: str = "ES256", *, bits: int = 2048) -> Any:
        """Make a key."""
        if algorithm.startswith("ES"):
            curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
            private: Any = ec.generate_private_key(curves[algorithm])
        elif algorithm == "EdDSA":
            private = ed25519.Ed25519PrivateKey.generate()
        else:
            private = rsa.generate_private_key(public_exponent=65537, key_size=bits)
        self.keys[kid] = private
        return private

    def jwks(self) -> bytes:
        return json.dumps({"keys": [self.jwk(kid) for kid in self.keys]}).encode()

    def jwk(self, kid: str) -> dict[str, Any]:
        public = self.keys[kid].public_key()
        kind = {
            ec.EllipticCurvePublicKey: jwt.algorithms.ECAlgorithm,
            rsa.RSAPublicKey: jwt.algorithms.RSAAlgorithm,
            ed25519.Ed25519PublicKey: jwt.algorithms.OKPAlgorithm,
        }
        algorithm = next(value for base, value in kind.items() if isinstance(public, base))
        return {**algorithm.to_jwk(public, as_dict=True), "kid": kid, "use": "sig"}

    def token(
        self,
        kid: str = "one",
        algorithm: str = "ES256",
        *,
        headers: dict[str, Any] | None = None,
        **changes: Any,
    ) -> str:
        """A token of tenant acme, role user; `changes` replace claims, None leaves one out."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "somebody",
            "exp": now + 600,
            "iat": now,
            "tenant": "acme",
            "role": "user",
            **changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.keys[kid], algorithm, headers={"kid": kid, **(headers or {})})
