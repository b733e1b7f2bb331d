"""A certificate made on this machine, for TLS between programs of this machine or of a lab's network."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from labkit.errors import UserError

ALWAYS = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
VALID_DAYS = 365
RENEW_DAYS = 30


@dataclass(frozen=True)
class Certificate:
    """Paths of two PEM files: the certificate (chain), which clients that are to trust it are given, and its key."""

    certificate: Path
    key: Path


def own_certificate(hosts: Sequence[str] = (), directory: Path | None = None) -> Certificate:
    """A self-signed certificate for ``localhost``, ``127.0.0.1``, ``::1`` and ``hosts`` (names or addresses).

    It is kept, readable by its owner only, under ``directory`` (``$XDG_STATE_HOME/labkit/tls``) and made anew 30 days
    before it ends. Several processes may ask at once. Raises UserError for a host that no certificate can name.
    """
    names = sorted({*ALWAYS, *(host for host in hosts if host not in EVERYWHERE)})
    folder = (directory or _state()) / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _still_good(made):
            key, certificate = _make(names)
            _write(made.key, key)
            _write(made.certificate, certificate)
    return made


def given_certificate(certificate: Path, key: Path) -> Certificate:
    """One's own. Raises UserError for files that cannot be read or do not belong together."""
    try:
        public = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{certificate} and {key} should be PEM files, the key without a password: {error}") from error
    if _public_bytes(public) != _public_bytes(private.public_key()):
        raise UserError(f"the key {key} does not belong to the certificate {certificate}")
    return Certificate(certificate, key)


def _state() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "labkit" / "tls"


def _still_good(made: Certificate) -> bool:
    try:
        given_certificate(made.certificate, made.key)
    except UserError:
        return False
    ends = x509.load_pem_x509_certificate(made.certificate.read_bytes()).not_valid_after_utc
    return ends - datetime.datetime.now(datetime.UTC) > datetime.timedelta(days=RENEW_DAYS)


def _make(names: Sequence[str]) -> tuple[bytes, bytes]:
    """(key, certificate) as PEM. P-256: every TLS library takes it, and a handshake costs a tenth of RSA's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "labkit on this machine")])
    now = datetime.datetime.now(datetime.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of two machines differ.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([_name(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise UserError(f"no certificate can name the host {host!r}: {error}") from error


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    beside = path.with_name(f".{path.name}.partial")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _public_bytes(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
