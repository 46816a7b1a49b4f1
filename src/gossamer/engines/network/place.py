"""Who a node is among the peers of a run, and which others it lets in."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.engines.network.addresses import AddressBook
from gossamer.engines.network.roster import shape_objection, versions
from gossamer.transport import Hello
from gossamer.transport.authentication import MEMBERS_FILE, Kit, read_members


@dataclass(frozen=True)
class Samples:
    """What a node tells of its data.

    Attributes:
        data: digest of the experiment's own data; None: the node has others.
        shape: see `shape_of`.
        model: see `model_digest`.
    """

    data: str | None
    shape: Mapping[str, Any]
    model: str

    def are_others(self, body: Mapping[str, Any]) -> bool:
        """Say whether a node that tells `body` has another model, or is to have the same data and has not."""
        told = body.get("data")
        return body.get("model") != self.model or (None not in (told, self.data) and told != self.data)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Who a node is among the peers of a run, and how it is reached.

    Attributes:
        number: of the peer; None: it is the observer.
        num_peers: peers of the run.
        num_rounds: rounds of the run.
        run: id of the run, which all nodes of an experiment compute alike.
        samples: see `Samples`.
        listen: host:port.
        book: where the others are.
        kit: start-up kit of the node; None: it stays on loopback.
        secret: what nodes must say that were started by one process; "": nothing.
        directory: of the node's run.
    """

    number: int | None
    num_peers: int
    num_rounds: int
    run: str
    samples: Samples
    listen: str
    book: AddressBook
    kit: Kit | None
    secret: str = field(repr=False)
    directory: Path

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.kit.node if self.kit is not None else name_of(self.number)

    @property
    def members(self) -> dict[str, int | None]:
        """Number of each node of the federation, by name; without a kit, that of the names which peers have then."""
        if self.kit is None:
            return {name_of(number): number for number in range(self.num_peers)} | {name_of(None): None}
        return {name: one.number for name, one in read_members(self.kit.directory / MEMBERS_FILE).nodes.items()}

    def objection(self, hello: Hello) -> str | None:
        """Return why a node may not join; None: it may."""
        body, who, here = hello.body, hello.node, described(self.number)
        if self.secret and not secrets.compare_digest(str(body.get("secret")), self.secret):
            return f"{here} takes only peers that were started with it"
        told = body.get("versions")
        for part, value in versions().items():
            other = told.get(part) if isinstance(told, dict) else None
            if other != value:
                return f"{who} has {part} {other!r:.80}, but {here} has {value!r}: install the same version"
        number = body.get("peer")
        is_number = type(number) is int and 0 <= number < self.num_peers
        if not is_number or self.members.get(who, -1) != number:
            return f"{who} says that it is peer {number!r:.80}, which it is not: give it the --id of its kit or its own"
        if number == self.number:
            return f"{who} is peer {number}, as is {here}: give each a number of its own, --id"
        is_same = body.get("experiment") == self.run
        if is_same and (reason := shape_objection(body.get("shape"), self.samples.shape, here)):
            return f"{who}: {reason}"
        if not is_same or self.samples.are_others(body):
            return (
                f"{who} and {here} have other experiments, or data: give both the same FILE, KEY=VALUE and versions of"
                " the data"
            )
        return None


def name_of(number: int | None) -> str:
    """Return the name of a node that has no kit."""
    return "observer" if number is None else f"peer-{number}"


def described(number: Any) -> str:
    """Return what a node is called, by its number."""
    return "the observer" if number is None else f"peer {number!r:.20}"
