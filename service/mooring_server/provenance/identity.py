"""Who signs: a certificate chain and its key, named by settings or made at the first start.

What a server makes for itself is an authority that signs one certificate and is then forgotten: its key is
never written, so nobody can make a second certificate that the same anchor would vouch for. C2PA does not
take a certificate that signed itself. Verifiers trust neither unless they are given the authority.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mooring_server.errors import FieldViolation, MooringError, Reason

FOLDER = "provenance"
"""Of what a server made for itself, in its state directory."""
CERTIFICATE, KEY, AUTHORITY = "certificate.pem", "key.pem", "authority.pem"
"""Files of a folder that `self_issued` made; the last one is what verifiers may trust."""
VALIDITY = timedelta(days=3650)
"""Long, because a mark without a time stamp of a third party is valid only as long as its certificate."""

_CLAIM_SIGNING = x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1")  # c2pa-kp-claimSigning
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class Identity:
    """What marks are signed with.

    Attributes:
        chain: PEM, the signing certificate first.
        key: PEM of its private key, PKCS #8.
        algorithm: C2PA's name of the signature algorithm.
        expires: when the certificate ends.
        names: files it was read from.
    """

    chain: bytes
    key: bytes
    algorithm: str
    expires: datetime
    names: tuple[Path, Path]

    def unusable(self, problem: str) -> MooringError:
        """Why it cannot sign. Reason INVALID_FIELD."""
        return _unusable(*self.names, problem)


def load(certificate: Path, key: Path) -> Identity:
    """The identity in two PEM files.

    Args:
        certificate: chain, the signing certificate first.
        key: its private key without a password: EC P-256, P-384 or P-521, RSA from 2,048 bits, or Ed25519.

    Raises:
        MooringError: INVALID_FIELD: a file is missing or no PEM, the two do not belong together, or the
            certificate is not valid now.
    """
    try:
        chain, secret = certificate.read_bytes(), key.read_bytes()
        leaf = x509.load_pem_x509_certificates(chain)[0]
        private = load_pem_private_key(secret, password=None)
    except OSError as error:
        raise _unusable(certificate, key, f"{error.filename}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:  # TypeError: the key has a password
        raise _unusable(certificate, key, str(error)) from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if leaf.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise _unusable(certificate, key, "the key is not the certificate's")
    if not leaf.not_valid_before_utc <= datetime.now(UTC) <= leaf.not_valid_after_utc:
        lasts = f"{leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}"
        raise _unusable(certificate, key, f"the certificate is valid from {lasts}, not now")
    algorithm = _algorithm(private)
    if not algorithm:
        problem = "the key is none of EC P-256, P-384, P-521, RSA from 2,048 bits, Ed25519"
        raise _unusable(certificate, key, problem)
    plain = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(chain, plain, algorithm, leaf.not_valid_after_utc, (certificate, key))


def self_issued(folder: Path) -> Identity:
    """The identity of a folder, made when there is none. Raises as `load`.

    Args:
        folder: absent, or as an earlier call left it. It appears whole or not at all.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # for this user alone
        try:
            _make(making)
            with contextlib.suppress(OSError):  # another process was faster
                making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return load(folder / CERTIFICATE, folder / KEY)


def _make(folder: Path) -> None:
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = _name("Mooring self-issued authority")
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        _certificate(_name("Mooring image marks"), authority_name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION, _CLAIM_SIGNING]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(folder / KEY, plain, 0o600)
    _write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM), 0o644)
    _write(folder / AUTHORITY, authority.public_bytes(Encoding.PEM), 0o644)


def _name(common: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Mooring (self-issued)")
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of verifiers may be behind
        .not_valid_after(now + VALIDITY)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _algorithm(key: object) -> str:
    """C2PA's name of how a key signs; "" when it may not."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return _CURVES.get(key.curve.name, "")
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256" if key.key_size >= 2048 else ""
    return "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else ""


def _write(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _unusable(certificate: Path, key: Path, problem: str) -> MooringError:
    found = f"{certificate} and {key} cannot sign images: {problem}"
    return MooringError(
        Reason.INVALID_FIELD,
        f"The provenance mark: {found}.",
        remedy="Set MOORING_PROVENANCE_CERT and MOORING_PROVENANCE_KEY to a PEM chain and its key "
        "(docs/provenance.md), or MOORING_PROVENANCE=false to send images without a mark.",
        fields=[FieldViolation("provenance_cert", found)],
    )
