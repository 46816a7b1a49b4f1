"""Where peers listen: a file that lists them, or a folder into which the peers of one machine write it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from gossamer.errors import ConfigError, storage_errors
from gossamer.options import Options, parse_options
from gossamer.storage.disk import write_atomically
from gossamer.storage.strict_yaml import read_yaml
from gossamer.transport.credentials import host_and_port

OBSERVER = "observer"


class Addresses(Options):
    """What ADDRESSES.yaml says.

    Attributes:
        peers: ``HOST:PORT`` of each peer, in the order of their numbers.
        observer: that of who collects metrics; None: nobody does.
    """

    peers: list[str] = Field(min_length=2)
    observer: str | None = None


class AddressBook:
    """Addresses of the peers of a run, read anew whenever one is asked for."""

    def __init__(self, path: Path, num_peers: int) -> None:
        """Check what is there.

        Args:
            path: of the file, or of the folder.

        Raises:
            ConfigError: the file is missing or malformed, or names another number of peers.
        """
        self.path, self._num_peers = path, num_peers
        if not self.is_folder:
            self._read()

    @property
    def is_folder(self) -> bool:
        """Whether peers write their addresses themselves."""
        return self.path.is_dir()

    def of(self, number: int | None) -> str | None:
        """Return the address of a peer (None: of the observer); None: it has none, or none yet."""
        if not self.is_folder:
            found = self._read()
            return found.observer if number is None else found.peers[number]
        try:
            return (self.path / _name(number)).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def announce(self, number: int | None, address: str) -> None:
        """Say where a peer, or the observer, listens; a file says so already.

        Raises:
            StorageError: the disk refuses.
        """
        if self.is_folder:
            with storage_errors(self.path):
                write_atomically(self.path / _name(number), f"{address}\n")

    @property
    def has_observer(self) -> bool:
        """Whether somebody collects metrics."""
        return self.of(None) is not None

    def _read(self) -> Addresses:
        data, name = read_yaml(self.path, "list of addresses"), self.path.name
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{str(self.path)!r} must hold a mapping with peers, a list of HOST:PORT, not {data!r:.80}"
            )
        found = parse_options(Addresses, data, name)
        if len(found.peers) != self._num_peers:
            raise ConfigError(
                f"{name} has {len(found.peers)} addresses, but the run has {self._num_peers} peers: give the HOST:PORT"
                " of each, in the order of their numbers"
            )
        addresses = [*found.peers, *([found.observer] if found.observer else [])]
        for place, address in enumerate(addresses):
            host_and_port(address, f"an address in {name}")
            if address in addresses[:place]:
                raise ConfigError(f"{name} has the address {address!r} twice: give each node one of its own")
        return found


def _name(number: int | None) -> str:
    return OBSERVER if number is None else f"peer-{number}"
