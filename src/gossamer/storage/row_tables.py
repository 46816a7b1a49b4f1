"""Which rows of which files are live: the index of a client store, which a commit keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.errors import CheckpointError

PREFIX = "clientstore"


@dataclass
class Table:
    """The files of one namespace that one process writes: the current one, and the position of each client's row in it.

    Attributes:
        width: floats of a row.
        itemsize: bytes of one.
        generation: number of the current file.
        num_rows: rows in it, including dead ones.
        descriptor: of the current file, where it is open.
        is_made: whether the current file is one of this store.
        clients: i64[m], ascending; slots: i64[m], position in the file; checksums: i64[m], CRC-32 of the row's bytes.
        committed: generations of the last `keep` commits, newest last.
        issued: generation in the `index` of a commit that may or may not have succeeded since then.
    """

    width: int
    itemsize: int
    generation: int = 0
    num_rows: int = 0
    descriptor: int | None = None
    is_made: bool = False
    clients: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    slots: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    checksums: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    committed: list[int] = field(default_factory=list)
    issued: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.itemsize * self.width

    def find(self, clients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the position of each client in the index, or where it would go, and whether it is there."""
        positions = np.searchsorted(self.clients, clients)
        present = np.zeros(len(clients), bool)
        inside = positions < len(self.clients)
        present[inside] = self.clients[positions[inside]] == clients[inside]
        return positions, present

    def append(self, clients: NDArray[np.int64], checksums: NDArray[np.int64]) -> None:
        """Take over rows of distinct `clients`, which stand behind all others in the file."""
        order = np.argsort(clients)
        slots = self.num_rows + order
        clients, checksums = clients[order], checksums[order]
        positions, present = self.find(clients)
        self.slots[positions[present]] = slots[present]
        self.checksums[positions[present]] = checksums[present]
        gaps = positions[~present]
        self.clients = np.insert(self.clients, gaps, clients[~present])
        self.slots = np.insert(self.slots, gaps, slots[~present])
        self.checksums = np.insert(self.checksums, gaps, checksums[~present])
        self.num_rows += len(clients)

    def forget(self, clients: NDArray[np.int64]) -> None:
        """Take the rows of `clients` for dead."""
        positions, present = self.find(clients)
        gone = positions[present]
        self.clients, self.slots, self.checksums = (
            np.delete(one, gone) for one in (self.clients, self.slots, self.checksums)
        )

    def arrays(self, name: str, keep: int) -> dict[str, torch.Tensor]:
        """Return the index as arrays, and the generations that the last `keep` commits refer to with this one."""
        parts = {
            "clients": self.clients,
            "slots": self.slots,
            "checksums": self.checksums,
            "file": np.array([self.width, self.generation, self.num_rows], np.int64),
            "committed": np.array([*self.committed, self.generation][-keep:], np.int64),
        }
        return {f"{PREFIX}/{name}/{part}": torch.from_numpy(array.copy()) for part, array in parts.items()}


def parse_index(index: Mapping[str, torch.Tensor], itemsize: int) -> dict[str, Table]:
    """Return the tables of which `index` has the arrays, by their names.

    Raises:
        CheckpointError: it is malformed.
    """
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    for key, array in index.items():
        prefix, _, rest = key.partition("/")
        if prefix == PREFIX:
            name, _, part = rest.partition("/")
            found.setdefault(name, {})[part] = array.numpy().copy()
    tables = {}
    for name, parts in found.items():
        try:
            width, generation, num_rows = parts["file"].tolist()
            tables[name] = Table(
                width,
                itemsize,
                generation,
                num_rows,
                clients=parts["clients"],
                slots=parts["slots"],
                checksums=parts["checksums"],
                committed=parts["committed"].tolist(),
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"the index of client state {name!r} is malformed ({error}): resume from an earlier checkpoint"
            ) from error
    return tables
