"""Certificates of a federation: an authority of its own, and a key and a certificate for each node.

Keys are on the curve P-256, signatures ECDSA with SHA-256. A node that listens has its hosts among the subject
alternative names and may act as a server; another one may only act as a client, so that its key cannot be used to stand
for the server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
CLOCK_SKEW = timedelta(hours=1)  # a certificate holds so long before it was made: clocks differ


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Facts:
    """What a certificate says.

    Attributes:
        federation, node: organisation and common name of its subject.
        serial: its serial number, hexadecimal.
        begins, expires: when it holds, in UTC.
    """

    federation: str
    node: str
    serial: str
    begins: datetime
    expires: datetime


def make_authority(federation: str, now: datetime) -> Pair:
    """Make the authority of a federation, which signs the certificates of its nodes.

    Args:
        now: time of day, in UTC.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(federation, "authority")
    builder = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _pair(builder, key, key)


def issue(authority: Pair, federation: str, node: str, hosts: Sequence[str], days: int, now: datetime) -> Pair:
    """Issue a key and a certificate of a node.

    Args:
        hosts: names and addresses by which others reach it, to which its own name is added; without any it may only be
            a client.
        days: how long it holds; not beyond the authority's own end.
        now: time of day, in UTC.
    """
    signer = _private_key(authority.key)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * bool(hosts)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"gossamer:{federation}:{node}")]
    names += [_host_name(host) for host in dict.fromkeys((*hosts, node) if hosts else ())]
    end = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    builder = (
        _builder(_name(federation, node), issuer.subject, key.public_key(), now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return _pair(builder, key, signer)


@lru_cache(maxsize=4096)
def read(certificate: bytes) -> Facts:
    """Return what a certificate, PEM, says.

    Raises:
        ValueError: it is none, or its subject is not that of a node.
    """
    found = x509.load_pem_x509_certificate(certificate)
    organisations = found.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    nodes = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(organisations) != 1 or len(nodes) != 1:
        raise ValueError("its subject names no federation and node")
    return Facts(
        federation=str(organisations[0].value),
        node=str(nodes[0].value),
        serial=f"{found.serial_number:x}",
        begins=found.not_valid_before_utc,
        expires=found.not_valid_after_utc,
    )


def is_issued_by(certificate: bytes, authority: bytes) -> bool:
    """Say whether an authority signed a certificate, both PEM.

    Raises:
        ValueError: one of them is none.
    """
    signer = x509.load_pem_x509_certificate(authority)
    try:
        x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def belong_together(pair: Pair) -> bool:
    """Say whether a key is that of a certificate.

    Raises:
        ValueError: one of them is none.
    """
    public = x509.load_pem_x509_certificate(pair.certificate).public_key()
    return _private_key(pair.key).public_key() == public


def _private_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        found = serialization.load_pem_private_key(key, password=None)
    except Exception:  # whose text might have parts of the key
        raise ValueError("it is no private key") from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("it is no key on an elliptic curve")
    return found


def _name(federation: str, node: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, node)]
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pair(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Pair:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    signed = builder.add_extension(identifier, critical=False).sign(signer, hashes.SHA256())
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(signed.public_bytes(serialization.Encoding.PEM), encoded)
