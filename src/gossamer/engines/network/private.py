"""The private state of a client on its own disk: one file for each phase in which it was trained.

Whether the update of a phase was used is known to the server alone. It therefore names, with every job, the phase whose
state holds; files of phases that no commit can go back to any more are deleted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gossamer.errors import CheckpointError, storage_errors
from gossamer.storage.disk import sync

When = tuple[int, int]  # round and phase, counted from 0
_FILE = re.compile(r"(\d+)-(\d+)\.safetensors")


class PrivateState:
    """Rows of one client, by namespace; a `gossamer.engines.private_rows.RowStore`."""

    def __init__(self, directory: Path, kept: When | None) -> None:
        """Read what holds.

        Args:
            directory: of the client, in the run's.
            kept: phase whose state holds; None: the client keeps nothing yet.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        self._directory, self._rows = directory, dict[str, Tensor]()
        if kept is None:
            return
        file = self._file(kept)
        try:
            self._rows = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {str(file)!r}, the private state of round {kept[0] + 1} ({error}): give the client the"
                " directory that it had"
            ) from error

    def get(self, namespace: str, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of the client, [1, width], and whether there is one."""
        row = self._rows.get(namespace)
        if row is None:
            return torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool)
        return row.clone(), torch.ones(1, dtype=torch.bool)

    def put(self, namespace: str, clients: Tensor, rows: Tensor) -> None:
        """Replace the row of the client, [1, width], in memory."""
        self._rows[namespace] = rows.clone()

    def write(self, when: When) -> None:
        """Write all rows as those of a phase, in the place of any that were.

        Raises:
            StorageError: the disk refuses a write.
        """
        file = self._file(when)
        aside = file.with_name(f".{file.name}.writing")
        with storage_errors(file):
            self._directory.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as opened:
                opened.write(save({name: row.contiguous() for name, row in self._rows.items()}))
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(aside, file)
            sync(self._directory)

    def forget(self, before: When) -> None:
        """Delete the files of phases before one.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self._directory):
            for name in os.listdir(self._directory):
                found = _FILE.fullmatch(name)
                if found and (int(found[1]), int(found[2])) < before:
                    (self._directory / name).unlink()

    def _file(self, when: When) -> Path:
        return self._directory / f"{when[0]}-{when[1]}.safetensors"
