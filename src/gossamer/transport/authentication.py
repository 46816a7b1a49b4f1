"""Who may talk to whom: start-up kits of nodes, and the list of members by which a node is verified.

A node shows a certificate of the federation's authority, and the token of its kit. Whoever listens has a list of
members: of each one the serial number of its certificate and the hash of its token, and what was revoked. A kit that
was renewed or revoked is refused as soon as the list is replaced, at the next call of its node.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gossamer.errors import AuthenticationError, ConfigError, warn
from gossamer.options import Options, parse_options
from gossamer.transport.credentials import Caller, Credentials

AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE = "ca.crt", "node.crt", "node.key", "token"
KIT_FILE, MEMBERS_FILE = "kit.json", "members.json"
MAX_FILE_BYTES = 16 << 20
MAX_TOKEN_CHARACTERS = 200
WARN_DAYS = 30
GRACE_SECONDS = 10.0
SERVER = "server"  # the name of a federation's server
Kind = Literal["server", "client", "peer"]
HOW = "make kits with gossamer node provision FEDERATION.yaml -o DIR and give --kit DIR/kits/NODE"


class Member(Options):
    """What is known of one node.

    Attributes:
        kind: server, client or peer.
        number: number of the client, or the peer, in a run; the server has none.
        hosts: names and addresses in its certificate.
        serial: serial number of its certificate, hexadecimal.
        token_sha256: hash of its token, hexadecimal.
        expires: last day of its certificate.
        is_revoked: whether it is kept out.
    """

    kind: Kind
    number: int | None = None
    hosts: list[str] = []
    serial: str
    token_sha256: str
    expires: date
    is_revoked: bool = False


class Members(Options):
    """The nodes of a federation, as in members.json; holds no secret.

    Attributes:
        federation: its name.
        nodes: ``{name: member}``.
        revoked: ``{serial number: name}`` of certificates that were replaced or revoked.
    """

    format: Literal[1] = 1
    federation: str
    nodes: dict[str, Member] = {}
    revoked: dict[str, str] = {}


class KitFacts(Options):
    """What kit.json says.

    Attributes:
        federation, node, kind: whose kit it is.
        number: see `Member`.
        server: ``HOST:PORT`` of the federation's server; None: it has none.
    """

    format: Literal[1] = 1
    federation: str
    node: str
    kind: Kind
    number: int | None = None
    server: str | None = Field(default=None)


@dataclass(frozen=True)
class Kit:
    """A start-up kit: all that a node needs to prove who it is, and to check the others.

    Attributes:
        federation, node, kind: whose it is; the name is the common name of the certificate.
        number: see `Member`.
        server: ``HOST:PORT`` of the federation's server; None: it has none.
        authority, certificate, key: PEM.
        token: what it shows besides when it joins, within TLS.
        directory: where it lies.
    """

    federation: str
    node: str
    kind: Kind
    number: int | None
    server: str | None
    authority: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    token: str = field(repr=False)
    directory: Path

    def credentials(self) -> Credentials:
        """Return what a `Server` or a `Client` takes; who listens verifies all who call by the list of members.

        Raises:
            ConfigError: that list is missing or malformed.
        """
        if self.kind == "client":
            return Credentials(self.certificate, self.key, self.authority, self.token)
        return Credentials(self.certificate, self.key, self.authority, self.token, self.members().verify_caller)

    def members(self) -> MemberList:
        """Return the list of members, which the kit of a node that listens has.

        Raises:
            ConfigError: it is missing or malformed.
        """
        return MemberList(self.directory / MEMBERS_FILE, self.federation)


def load_kit(directory: Path, kind: Kind | None = None) -> Kit:
    """Read a start-up kit, and warn where its certificate expires soon.

    Args:
        kind: that the node must have; None: any.

    Raises:
        ConfigError: a file is missing or malformed, or does not belong to the others; or the node is of another kind.
        AuthenticationError: others may read its secrets, or its certificate has expired.
    """
    if not (directory / KIT_FILE).is_file():
        raise ConfigError(f"{str(directory)!r} holds no start-up kit ({KIT_FILE} is missing): {HOW}")
    facts = parse_options(KitFacts, _read_json(directory / KIT_FILE), KIT_FILE)
    if kind not in (None, facts.kind):
        raise ConfigError(
            f"the kit {str(directory)!r} is that of {facts.kind} {facts.node!r}: give the kit of a {kind}, see gossamer"
            " node provision"
        )
    for name in (KEY_FILE, TOKEN_FILE):
        _require_private(directory / name)
    files = {name: _read(directory / name) for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE)}
    kit = Kit(
        facts.federation,
        facts.node,
        facts.kind,
        facts.number,
        facts.server,
        files[AUTHORITY_FILE],
        files[CERTIFICATE_FILE],
        files[KEY_FILE],
        files[TOKEN_FILE].decode("ascii", errors="replace").strip(),
        directory,
    )
    _check_certificate(kit)
    return kit


def _check_certificate(kit: Kit) -> None:
    """Check that the parts of a kit belong together, and hold today."""
    from gossamer.transport import certificates

    where = f"the kit {str(kit.directory)!r}"
    try:
        found, authority = certificates.read(kit.certificate), certificates.read(kit.authority)
        is_whole = certificates.belong_together(certificates.Pair(kit.certificate, kit.key))
        is_whole = is_whole and certificates.is_issued_by(kit.certificate, kit.authority)
    except ValueError as error:
        raise ConfigError(
            f"{where} has a file that is damaged ({error}): copy it again from where it was made"
        ) from None
    if not is_whole or (found.federation, found.node) != (kit.federation, kit.node):
        raise ConfigError(
            f"{where} has files of different kits: key, certificate and authority do not belong to node {kit.node!r} of"
            f" federation {kit.federation!r}: copy it again from where it was made"
        )
    now, renewal = datetime.now(UTC), f"renew it with gossamer node provision FEDERATION.yaml -o DIR --renew {kit.node}"
    if now >= authority.expires:
        raise AuthenticationError(
            f"the authority of federation {kit.federation!r} expired on {authority.expires:%Y-%m-%d}: make the"
            " federation anew in another directory, and give all nodes their new kits"
        )
    if now >= found.expires:
        raise AuthenticationError(
            f"the certificate of node {kit.node!r} expired on {found.expires:%Y-%m-%d}: {renewal}"
        )
    if now < found.begins:
        raise AuthenticationError(
            f"the certificate of node {kit.node!r} holds from {found.begins:%Y-%m-%d %H:%M} UTC on, and this machine's"
            f" clock says {now:%Y-%m-%d %H:%M}: set the clock"
        )
    if found.expires - now < timedelta(days=WARN_DAYS):
        warn([f"the certificate of node {kit.node!r} expires on {found.expires:%Y-%m-%d}: {renewal}"])


class MemberList:
    """The members as the file says, which is read again when it changes; safe to use from several threads."""

    def __init__(self, path: Path, federation: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Read the file.

        Args:
            federation: whose list it must be.
            clock: returns the time of day, in UTC.

        Raises:
            ConfigError: it is missing, malformed, or that of another federation.
        """
        self.path, self._federation, self._clock = path, federation, clock
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._broken: datetime | None = None  # since when it cannot be read
        self._members = Members(federation=federation)
        self.current()

    def current(self) -> Members:
        """Return the members.

        While the file is being replaced, for `GRACE_SECONDS`, those that it listed before hold.

        Raises:
            ConfigError: the file is missing, malformed, or that of another federation: then nobody is let in.
        """
        with self._lock:
            try:
                self._read()
                self._broken = None
            except ConfigError:
                now = self._clock()
                self._broken = self._broken or now
                if self._stamp is None or now - self._broken >= timedelta(seconds=GRACE_SECONDS):
                    raise
            return self._members

    def _read(self) -> None:
        """Read the file, if it has changed."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise ConfigError(
                f"cannot read the list of members {str(self.path)!r} ({error.strerror}): copy it again from where the"
                " federation was made"
            ) from None
        stamp = found.st_mtime_ns, found.st_size, found.st_ino
        if stamp == self._stamp:
            return
        members = read_members(self.path)
        if members.federation != self._federation:
            raise ConfigError(
                f"{str(self.path)!r} lists the members of federation {members.federation!r}, not of"
                f" {self._federation!r}: copy the right one"
            )
        self._members, self._stamp = members, stamp

    def client_of(self, number: int) -> str | None:
        """Return the name of the client whose kit has a number; None: there is none that is not revoked.

        Raises:
            ConfigError: see `current`.
        """
        nodes = self.current().nodes.items()
        found = (name for name, one in nodes if (one.kind, one.number) == ("client", number) and not one.is_revoked)
        return next(found, None)

    def verify_caller(self, caller: Caller) -> None:
        """Verify who makes a call, see `verify`."""
        self.verify(caller.certificate or b"", caller.name, caller.token)

    def verify(self, certificate: bytes, claimed: str, token: str) -> None:
        """Verify a node that calls.

        Args:
            certificate: PEM of the certificate that it showed, whose signature TLS has checked.
            claimed: name that it gives itself.
            token: token that it gives.

        Raises:
            AuthenticationError: it is not who it says, or not let in.
            ConfigError: the list of members cannot be read.
        """
        from gossamer.transport import certificates

        try:
            found = certificates.read(certificate)
        except ValueError:
            raise AuthenticationError(
                "a node showed no certificate of a federation: give it the kit of its own"
            ) from None
        members = self.current()
        node, member = _shown(claimed), members.nodes.get(claimed)
        if found.node != claimed or found.federation != members.federation:
            raise AuthenticationError(
                f"a node calls itself {node}, but its certificate is that of {_shown(found.node)} of federation"
                f" {_shown(found.federation)}: give it the kit of its own"
            )
        if member is None:
            raise AuthenticationError(
                f"node {node} is no member of federation {members.federation!r}: add it to FEDERATION.yaml, and copy"
                f" the new {MEMBERS_FILE} to whoever listens"
            )
        if found.serial in members.revoked or member.is_revoked or found.serial != member.serial:
            raise AuthenticationError(
                f"the certificate {found.serial} of node {node} was revoked or replaced: give it its newest kit"
            )
        if not found.begins <= self._clock() < found.expires:
            raise AuthenticationError(
                f"the certificate of node {node} holds from {found.begins:%Y-%m-%d} to {found.expires:%Y-%m-%d} only:"
                f" renew it with gossamer node provision FEDERATION.yaml -o DIR --renew {claimed}"
            )
        if len(token) > MAX_TOKEN_CHARACTERS or not hmac.compare_digest(hash_of(token), member.token_sha256):
            raise AuthenticationError(f"node {node} gave another token than that of its kit: give it its newest kit")


def hash_of(token: str) -> str:
    """Return the hash of a token, hexadecimal; a token is random, and long enough for a hash without salt."""
    return hashlib.sha256(token.encode("utf-8", errors="replace")).hexdigest()


def read_members(path: Path) -> Members:
    """Read a list of members.

    Raises:
        ConfigError: it is missing or malformed.
    """
    return parse_options(Members, _read_json(path), path.name)


def _shown(name: str) -> str:
    """Return a name that a stranger gave, quoted and not too long."""
    return repr(name[:100])


def _require_private(path: Path) -> None:
    """Refuse a secret that others on this machine may read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r} ({error.strerror}): copy the kit again") from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise AuthenticationError(f"others may read {str(path)!r}, which is secret: chmod 600 {path}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r} ({error.strerror}): copy the kit again") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{str(path)!r} has {len(content)} bytes, which no kit needs: copy the kit again")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError):
        raise ConfigError(f"{str(path)!r} is no JSON: copy it again from where the federation was made") from None
