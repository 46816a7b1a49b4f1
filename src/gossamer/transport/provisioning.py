"""A federation on disk: its authority, the list of its members, and a start-up kit for each node.

What a directory holds::

    members.json    what is known of every node, without secrets; the kits of nodes that listen have a copy
    authority/      ca.crt, and ca.key, which signs certificates: never copy it to a node
    kits/NODE/      what NODE needs: ca.crt node.crt node.key token kit.json README.md, where it listens members.json

What stands is kept, so that nodes are added by repeating the command. A kit is written aside, and renamed before the
list of members names it, so that the command can also be repeated after it was killed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from gossamer.errors import AuthenticationError, ConfigError, nearest, storage_errors, warn
from gossamer.storage.disk import LOCK, DirectoryLock, sync, write_atomically
from gossamer.transport import certificates, kit_readme
from gossamer.transport.authentication import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    KIT_FILE,
    MEMBERS_FILE,
    SERVER,
    TOKEN_FILE,
    WARN_DAYS,
    Kind,
    KitFacts,
    Member,
    Members,
    hash_of,
    read_members,
)
from gossamer.transport.certificates import Pair
from gossamer.transport.federation_file import Federation, NodeEntry, read_federation

AUTHORITY, AUTHORITY_KEY, KITS, README = "authority", "ca.key", "kits", "README.md"
TOKEN_BYTES = 32
PRIVATE, PUBLIC, PRIVATE_FOLDER = 0o600, 0o644, 0o700
LOOPBACK = ("localhost", "127.0.0.1")  # by which commands on its own machine reach a server


@dataclass(frozen=True)
class Provisioned:
    """What became of a node.

    Attributes:
        node, kind: which one.
        state: "new", "kept", "renewed" or "revoked".
        expires: last day of its certificate.
        kit: folder of its kit; None: it is not there (any more).
    """

    node: str
    kind: Kind
    state: str
    expires: date
    kit: Path | None


def provision(
    file: Path,
    directory: Path,
    renew: Collection[str] = (),
    revoke: Collection[str] = (),
    now: datetime | None = None,
) -> list[Provisioned]:
    """Make what is missing of a federation, and return its nodes.

    Args:
        file: FEDERATION.yaml, see `Federation`.
        directory: where it is kept; made if needed.
        renew: nodes that get a new key, certificate and token; their old ones are refused from then on.
        revoke: nodes that are kept out, until they are renewed.
        now: time of day, in UTC; None: that of the clock.

    Raises:
        ConfigError: the file or a name is wrong, or the directory holds something else.
        AuthenticationError: the authority has expired.
        StorageError: the disk refuses a write.
    """
    federation = read_federation(file)
    held = DirectoryLock(directory)
    try:
        work = _Provisioning(directory, federation, (now or datetime.now(UTC)).replace(microsecond=0))
        found = work.run(renew, revoke)
    except BaseException:
        held.close(discard=True)
        raise
    held.close()
    return found


class _Provisioning:
    """One call of `provision`, which has the directory to itself."""

    def __init__(self, directory: Path, federation: Federation, now: datetime) -> None:
        self.directory, self.federation, self.now = directory, federation, now
        self.path = directory / MEMBERS_FILE
        present = {path.name for path in directory.iterdir()} - {LOCK}
        if MEMBERS_FILE in present:
            before = read_members(self.path)
            if before.federation != federation.name:
                raise ConfigError(
                    f"{str(directory)!r} holds federation {before.federation!r}, not {federation.name!r}: choose"
                    " another directory, or correct the name"
                )
            self.authority = self._read_authority()
        elif present:
            raise ConfigError(f"{str(directory)!r} holds other files, such as {min(present)!r}: choose a new directory")
        else:
            before = Members(federation=federation.name)
            self.authority = self._make_authority()
        self.nodes, self.revoked = dict(before.nodes), dict(before.revoked)

    def run(self, renew: Collection[str], revoke: Collection[str]) -> list[Provisioned]:
        """Do what is asked for, and return all nodes."""
        self._check(renew, revoke)
        entries, states = self.federation.entries, dict.fromkeys(self.nodes, "kept")
        for name in revoke:
            self._revoke(name)
            states[name] = "revoked"
        for entry in entries:
            if entry.name not in self.nodes or entry.name in renew:
                states[entry.name] = "renewed" if entry.name in self.nodes else "new"
                self._issue(entry)
        self._write_members()
        self._warn(entries)
        states |= {name: "revoked" for name, member in self.nodes.items() if member.is_revoked}
        return [self._told(name, member, states[name]) for name, member in self.nodes.items()]

    def _check(self, renew: Collection[str], revoke: Collection[str]) -> None:
        """Refuse names that cannot be renewed or revoked, before anything is written."""
        named = [entry.name for entry in self.federation.entries]
        for name in (*renew, *revoke):
            known = list(dict.fromkeys((*self.nodes, *named) if name in renew else self.nodes))
            if name not in known:
                raise ConfigError(
                    f"federation {self.federation.name!r} has no node {name!r}{nearest(name, known)} (known:"
                    f" {', '.join(known)})"
                )
        if both := set(renew) & set(revoke):
            raise ConfigError(f"node {min(both)!r} is to be renewed and revoked: say one of them")
        if gone := set(renew) - set(named):
            raise ConfigError(f"node {min(gone)!r} is no longer in the file of the federation: add it, or leave it out")
        if SERVER in revoke:
            raise ConfigError(
                "the server cannot be revoked, because nodes trust whom the authority signed: if its key was stolen,"
                " make the federation anew in another directory, and give all nodes their new kits"
            )

    def _revoke(self, name: str) -> None:
        member = self.nodes[name]
        self.revoked[member.serial] = name
        self.nodes[name] = member.model_copy(update={"is_revoked": True})
        # First the list: a kit that is gone but let in would be worse than the reverse.
        self._write_members()
        shutil.rmtree(self.directory / KITS / name, ignore_errors=True)

    def _issue(self, entry: NodeEntry) -> None:
        """Write a kit, and take it into the members."""
        name, federation, kind = entry.name, self.federation, entry.kind
        hosts = [*entry.hosts, *(host for host in LOOPBACK if entry.hosts and host not in entry.hosts)]
        pair = certificates.issue(self.authority, federation.name, name, hosts, federation.days, self.now)
        token, facts = secrets.token_urlsafe(TOKEN_BYTES), certificates.read(pair.certificate)
        number = self._number(entry)
        kit = KitFacts(federation=federation.name, node=name, kind=kind, number=number, server=federation.address)
        member = Member(
            kind=kind,
            number=number,
            hosts=entry.hosts,
            serial=facts.serial,
            token_sha256=hash_of(token),
            expires=facts.expires.date(),
        )
        self._write_kit(
            name,
            {
                AUTHORITY_FILE: (self.authority.certificate, PUBLIC),
                CERTIFICATE_FILE: (pair.certificate, PUBLIC),
                KEY_FILE: (pair.key, PRIVATE),
                TOKEN_FILE: (f"{token}\n".encode(), PRIVATE),
                KIT_FILE: (f"{kit.model_dump_json(indent=1)}\n".encode(), PUBLIC),
                README: (kit_readme.text(kit, member.expires, self._port()).encode(), PUBLIC),
            },
        )
        if name in self.nodes:
            self.revoked[self.nodes[name].serial] = name
        self.nodes[name] = member

    def _number(self, entry: NodeEntry) -> int | None:
        """Return the number that a node has, or the next one."""
        if entry.kind == "server":
            return None
        if entry.name in self.nodes:
            return self.nodes[entry.name].number
        return 1 + max((-1 if one.number is None else one.number for one in self.nodes.values()), default=-1)

    def _port(self) -> int:
        return 8443 if self.federation.server is None else self.federation.server.port

    def _write_kit(self, name: str, files: dict[str, tuple[bytes, int]]) -> None:
        folder, aside = self.directory / KITS / name, self.directory / KITS / f".{name}.writing"
        with storage_errors(folder):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(PRIVATE_FOLDER, parents=True)
            for file, (content, mode) in files.items():
                _write(aside / file, content, mode)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            sync(folder.parent)

    def _write_members(self) -> None:
        """Write the list of members, here and into the kits of those who listen."""
        members = Members(federation=self.federation.name, nodes=self.nodes, revoked=self.revoked)
        text = json.dumps(members.model_dump(mode="json"), indent=1) + "\n"
        kits = (self.directory / KITS / name for name, member in self.nodes.items() if member.kind != "client")
        for path in (self.path, *(kit / MEMBERS_FILE for kit in kits if kit.is_dir())):
            if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_atomically(path, text)

    def _warn(self, entries: Sequence[NodeEntry]) -> None:
        """Warn of nodes that are not as the file says, and of those that expire soon."""
        named, soon = {entry.name: entry for entry in entries}, (self.now + timedelta(days=WARN_DAYS)).date()
        for name, member in self.nodes.items():
            if member.is_revoked:
                continue
            if name not in named:
                warn([f"node {name!r} is no longer in the file, but still let in: keep it out with --revoke {name}"])
            elif named[name].hosts != member.hosts:
                changed = f"were {member.hosts} and are now {named[name].hosts}"
                warn([f"the hosts of node {name!r} {changed}: replace its certificate with --renew {name}"])
            if member.expires <= soon:
                warn([f"the certificate of node {name!r} expires on {member.expires}: replace it with --renew {name}"])

    def _told(self, name: str, member: Member, state: str) -> Provisioned:
        kit = self.directory / KITS / name
        return Provisioned(name, member.kind, state, member.expires, kit if kit.is_dir() else None)

    def _make_authority(self) -> Pair:
        folder = self.directory / AUTHORITY
        pair = certificates.make_authority(self.federation.name, self.now)
        with storage_errors(folder):
            folder.mkdir(PRIVATE_FOLDER)
            _write(folder / AUTHORITY_KEY, pair.key, PRIVATE)
            _write(folder / AUTHORITY_FILE, pair.certificate, PUBLIC)
            sync(folder)
        return pair

    def _read_authority(self) -> Pair:
        folder = self.directory / AUTHORITY
        try:
            pair = Pair((folder / AUTHORITY_FILE).read_bytes(), (folder / AUTHORITY_KEY).read_bytes())
            is_whole, expires = certificates.belong_together(pair), certificates.read(pair.certificate).expires
        except (OSError, ValueError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot read the authority in {str(folder)!r} ({reason}): restore {AUTHORITY_FILE} and {AUTHORITY_KEY}"
            ) from None
        if not is_whole:
            raise ConfigError(f"{AUTHORITY_KEY} in {str(folder)!r} is not the key of {AUTHORITY_FILE}: restore both")
        if self.now >= expires:
            raise AuthenticationError(
                f"the authority of federation {self.federation.name!r} expired on {expires:%Y-%m-%d}: make the"
                " federation anew in another directory, and give all nodes their new kits"
            )
        return pair


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file, and sync it.

    Raises:
        OSError: the disk refuses, or the file is there.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
