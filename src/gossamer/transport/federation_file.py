"""FEDERATION.yaml: the name of a federation, where its server is reached, and its nodes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.storage.strict_yaml import read_yaml
from gossamer.transport.authentication import SERVER, Kind

NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9_-])?"  # fit for a folder, and for the name in a certificate
HOST_NAME = r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*"


def _check_hosts(hosts: list[str]) -> list[str]:
    """Check names and addresses by which a node is reached.

    Raises:
        ValueError: one is neither, or reaches nobody.
    """
    for host in hosts:
        try:
            if ipaddress.ip_address(host).is_unspecified:
                raise ConfigError(f"{host!r} is an address to listen on: give the one by which others reach this node")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        except ValueError:
            if not re.fullmatch(HOST_NAME, host) or len(host) > 253:
                raise ValueError(
                    f"{host!r} is no host: give names such as fl.example.org or addresses such as 10.0.0.5, without a"
                    " port"
                ) from None
    return hosts


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(
            "use letters, digits, '.', '_' and '-', 63 at most, a letter or a digit first and no '.' last, because it"
            " names a folder"
        )
    return name


class ServerEntry(Options):
    """Where the server is reached.

    Attributes:
        hosts: names and addresses by which the nodes dial it.
        port: port on which it listens.
    """

    hosts: list[str]
    port: int = Field(default=8443, ge=1, le=65535)

    @field_validator("hosts")
    @classmethod
    def _reachable(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("give at least one host by which the nodes reach the server")
        return _check_hosts(value)


class NodeEntry(Options):
    """A node; a bare name is its `name`.

    Attributes:
        name: its name, and that of its kit's folder.
        hosts: names and addresses by which peers reach it; a client has none.
    """

    name: str
    hosts: list[str] = []

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _check_name(value)

    @field_validator("hosts")
    @classmethod
    def _reachable(cls, value: list[str]) -> list[str]:
        return _check_hosts(value)

    @property
    def kind(self) -> Kind:
        """What it is."""
        if self.name == SERVER:
            return "server"
        return "peer" if self.hosts else "client"


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Federation(Options):
    """What FEDERATION.yaml says.

    Attributes:
        name: name of the federation.
        server: where its server is reached; None: its nodes are peers.
        nodes: its nodes, clients of the server or peers.
        days: days for which certificates of nodes hold.
    """

    name: str
    server: ServerEntry | None = None
    nodes: list[Annotated[NodeEntry, BeforeValidator(_by_name)]]
    days: int = Field(default=365, ge=1, le=3650)

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _check_name(value)

    @property
    def entries(self) -> list[NodeEntry]:
        """All nodes, the server first."""
        server = [] if self.server is None else [NodeEntry(name=SERVER, hosts=self.server.hosts)]
        return [*server, *self.nodes]

    @property
    def address(self) -> str | None:
        """``HOST:PORT`` of the server."""
        if self.server is None:
            return None
        host = self.server.hosts[0]
        return f"[{host}]:{self.server.port}" if ":" in host else f"{host}:{self.server.port}"


def read_federation(path: Path) -> Federation:
    """Read FEDERATION.yaml.

    Raises:
        ConfigError: it is missing or malformed, names a node twice, or no host of a server.
    """
    data = read_yaml(path, "federation")
    if not isinstance(data, Mapping):
        raise ConfigError(f"{str(path)!r} must hold a mapping with name, server and nodes, not {data!r}")
    federation = parse_options(Federation, data, path.name)
    if not federation.nodes:
        raise ConfigError(f"{path.name}.nodes = []: name at least one node")
    seen: dict[str, str] = {}
    for node in federation.nodes:
        name = node.name
        if name.lower() == SERVER:
            raise ConfigError(f"{path.name}.nodes names {name!r}, which is the name of the server: choose another one")
        if name.lower() in seen:
            before = seen[name.lower()]
            same = "twice" if before == name else f"and {before!r}, which are one folder on some disks"
            raise ConfigError(f"{path.name}.nodes names {name!r} {same}: give each node a name of its own")
        seen[name.lower()] = name
    for node in federation.entries:
        for host in node.hosts:
            if seen.get(host.lower(), node.name) != node.name:
                raise ConfigError(
                    f"{path.name} has a node {seen[host.lower()]!r}, which is also a host of node {node.name!r}: rename"
                    " it, because one could be taken for the other"
                )
    alone = next((node.name for node in federation.nodes if not node.hosts), None)
    if federation.server is None and alone is not None:
        raise ConfigError(
            f"{path.name} names no host of a server, and node {alone!r} has no hosts of its own: add"
            " server: {hosts: [fl.example.org]}, or, for peers without a server, hosts to each node"
        )
    return federation
