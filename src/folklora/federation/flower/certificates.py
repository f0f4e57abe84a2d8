"""Keys and certificates as bytes: what a federation signs with, and the checks of what it is given. Knows no files."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from folklora.errors import FederationError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import ssh
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise FederationError("a federation needs Flower: pip install 'folklora[flower]'") from None

BACKDATED = timedelta(hours=1)
"""A certificate holds from this long before it was made: members' clocks may be behind the server's."""

Pem = bytes


def authority(name: str, days: int) -> tuple[Pem, Pem]:
    """A new private key and the certificate it signs for itself; it signs the server's, and nothing below that."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(NameOID.COMMON_NAME, "FolkLoRA federation"),
        ]
    )
    certificate = (
        _builder(subject, subject, key.public_key(), datetime.now(UTC) + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return _private(key), certificate.public_bytes(serialization.Encoding.PEM)


def server_key() -> Pem:
    """A new private key for the server."""
    return _private(ec.generate_private_key(ec.SECP384R1()))


def server_certificate(host: str, days: int, key: Pem, ca_key: Pem, ca: Pem) -> Pem:
    """The authority's word that ``key`` is the server's, reached as ``host`` (a DNS name or an IP) or on loopback.

    It never outlives the authority's own certificate.
    """
    signer, issuer = load_private_key(ca_key), x509.load_pem_x509_certificate(ca)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FolkLoRA federation server")])
    ends = min(datetime.now(UTC) + timedelta(days=days), issuer.not_valid_after_utc)
    names = [_general_name(name) for name in dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])]
    issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, issuer.subject, load_private_key(key).public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=datetime.now(UTC) - BACKDATED,
        not_valid_after=ends,
    ).add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> Pem:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_private_key(data: Pem) -> ec.EllipticCurvePrivateKey:
    """A key that `authority` or `server_key` made.

    Raises
    ------
    FederationError
        It is anything else.
    """
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FederationError(f"not a private key in PEM without a passphrase ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FederationError("not an elliptic-curve private key")
    return key


def load_certificate(data: Pem, now: datetime | None = None) -> x509.Certificate:
    """A certificate that holds at ``now`` (default: this moment).

    Raises
    ------
    FederationError
        It cannot be read, holds no longer or does not hold yet.
    """
    now = now or datetime.now(UTC)
    try:
        certificate = x509.load_pem_x509_certificate(data)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except ValueError as error:
        raise FederationError(f"not a certificate in PEM ({error})") from None
    if not begins <= now <= ends:
        state = "expired" if now > ends else "does not hold yet"
        raise FederationError(
            f"the certificate {state}: it holds from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, and "
            f"this computer's clock says {now:%Y-%m-%d %H:%M} UTC"
        )
    return certificate


def check_server(certificate: x509.Certificate, key: Pem, ca: x509.Certificate, host: str) -> None:
    """Refuse a server certificate that members of this federation would refuse.

    Raises
    ------
    FederationError
        It is for another key or another host, or not signed by ``ca``.
    """
    if certificate.public_key() != load_private_key(key).public_key():
        raise FederationError("the certificate is not for server.key")
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise FederationError("the certificate is not signed by ca.crt") from None
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    if _general_name(host) not in names:
        known = ", ".join(str(name.value) for name in names)
        raise FederationError(f"the certificate is not for host {host!r}; it is for {known or 'no host'}")


# -- members' keys: what `ssh-keygen -t ecdsa -b 384` writes, as Flower's SuperNode wants them ------------------------


def member_keys() -> tuple[bytes, bytes]:
    """A new private key (OpenSSH, no passphrase) and its public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, _line(key.public_key())


def member_public(data: bytes) -> bytes:
    """A public key given as one OpenSSH line, written as `member_keys` writes it: no comment.

    Raises
    ------
    FederationError
        It is anything else, or of a kind that Flower does not take.
    """
    if b"PRIVATE KEY" in data:
        raise FederationError("that is a private key, which stays with its member; allowed: the .pub file beside it")
    try:
        key = ssh.load_ssh_public_key(data.strip())
    except _UNREADABLE:
        key = None
    return _checked_line(key, "a public key")


def member_public_of(private: bytes) -> bytes:
    """The public line of a private key.

    Raises
    ------
    FederationError
        It is not an OpenSSH private key of a kind that Flower takes, or has a passphrase, which nobody would be asked.
    """
    try:
        key = ssh.load_ssh_private_key(private, None)
    except TypeError:
        raise FederationError("the private key has a passphrase; allowed: one without (ssh-keygen -p)") from None
    except _UNREADABLE:
        raise FederationError(f"not a private key; allowed: {_ALLOWED}") from None
    return _checked_line(key.public_key(), "a private key")


def member_spki(line: bytes) -> bytes:
    """A member's public line in the form (PEM, SubjectPublicKeyInfo) in which its SuperNode names itself."""
    return ssh.load_ssh_public_key(line).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def signed_by(spki: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (ECDSA with SHA-256) was made over ``message`` with the private half of a `member_spki`."""
    key = serialization.load_pem_public_key(spki)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
            return True
    except InvalidSignature:
        pass
    return False


_ALLOWED = "what `ssh-keygen -t ecdsa -b 384` writes"
_UNREADABLE = (ValueError, UnsupportedAlgorithm, NotImplementedError)
"""What the reader of OpenSSH keys raises; the last for a point in compressed form."""


def _checked_line(key: object, what: str) -> bytes:
    # Flower takes NIST curves only; these three of them have an OpenSSH form.
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1
    ):
        raise FederationError(f"not {what} that Flower takes; allowed: {_ALLOWED}")
    return _line(key)


def _line(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
