"""Who may talk to whom: mutual TLS and a token, or loopback only."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import ConfigError, Refused


@dataclass(frozen=True)
class Caller:
    """Who calls, as far as it is known before anything of the call is read.

    Attributes:
        name: that it gives; under TLS one of `identities`.
        token: that it gives; shown nowhere.
        certificate: PEM, which TLS has verified: signed by the authority, and not expired; None without TLS.
        identities: common name and alternative names in the certificate.
        address: of its connection.
    """

    name: str
    token: str = field(repr=False)
    certificate: bytes | None = field(repr=False)
    identities: tuple[str, ...]
    address: str


@dataclass(frozen=True)
class Credentials:
    """Mutual TLS and a token.

    Attributes:
        certificate: PEM, the chain of this node's certificate; its common name, or a DNS name in it, is the node's.
        key: PEM of its private key.
        authority: PEM of the certificates of the private authority; nobody else's are trusted.
        token: secret that a client shows.
        verify: of a server; asked at every call, before anything of it is read, and before each message that is sent to
            a node; raises an error of gossamer's whose sentence is told the caller. It must be quick.
    """

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    authority: bytes = field(repr=False)
    token: str = field(default="", repr=False)
    verify: Callable[[Caller], object] | None = field(default=None, repr=False)


def verify_tokens(sha256_by_name: Mapping[str, str]) -> Callable[[Caller], None]:
    """Return a `Credentials.verify` for tokens.

    Args:
        sha256_by_name: name of each node that may call, and the SHA-256 of its token, hexadecimal.
    """

    def verify(caller: Caller) -> None:
        """Compare in constant time."""
        found = hashlib.sha256(caller.token.encode()).hexdigest()
        if not hmac.compare_digest(found, sha256_by_name.get(caller.name, "")):
            raise Refused(f"node {caller.name!r} is unknown here, or its token is another one")

    return verify


def host_and_port(address: str, what: str) -> tuple[str, int]:
    """Return the parts of "host:port", or "[IPv6]:port".

    Args:
        what: subject of the sentence.

    Raises:
        ConfigError: it is not of this form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{what} is {address!r}: give HOST:PORT, such as 127.0.0.1:9000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Say whether what listens on `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_protected(address: str, credentials: Credentials | None, what: str) -> None:
    """Check that nothing leaves this machine without mutual TLS and a token.

    Args:
        what: subject of the sentence, such as "listening on".

    Raises:
        ConfigError: it would.
    """
    host, _ = host_and_port(address, what)
    if credentials is None and not is_loopback(host):
        raise ConfigError(
            f"{what} {address} without mutual TLS and a token is refused: make credentials with `gossamer node"
            " provision FEDERATION.yaml -o DIR` and give the start-up kit of this node, or stay on 127.0.0.1"
        )


def caller_of(context: Any, metadata: Mapping[str, str]) -> Caller:
    """Return who makes a call of gRPC, as its metadata and TLS say.

    Raises:
        Refused: it gives a name that its certificate does not.
    """
    found: Mapping[str, list[bytes]] = context.auth_context()
    names = (*found.get("x509_common_name", ()), *found.get("x509_subject_alternative_name", ()))
    certificates = found.get("x509_pem_cert", ())
    caller = Caller(
        name=metadata.get("gossamer-node", ""),
        token=metadata.get("gossamer-token", ""),
        certificate=certificates[0] if certificates else None,
        identities=tuple(dict.fromkeys(name.decode(errors="replace") for name in names)),
        address=context.peer(),
    )
    if caller.certificate is not None and caller.name not in caller.identities:
        raise Refused(
            f"node {caller.name[:80]!r} shows a certificate of another name: give the start-up kit of this node"
        )
    return caller
