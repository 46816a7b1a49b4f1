"""What a peer sent last, on its own disk: whoever was restarted in between gets it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from gossamer.algorithms.base import Arrays
from gossamer.engines.network.lanes import When
from gossamer.errors import CheckpointError, storage_errors
from gossamer.storage.disk import sync

_FILE = re.compile(r"(\d+)-(\d+)\.safetensors")
RECEIVERS = "receivers"
OUTBOX = "outbox"  # the folder, in the directory of a peer's run
ENDED = "ended"  # the file that says after how many rounds all others had ended


def is_awaited(directory: Path, num_rounds: int) -> bool:
    """Say whether neighbours may still wait for a peer that has finished a run of so many rounds in a directory."""
    folder = directory / OUTBOX
    if not folder.is_dir():
        return False
    try:
        return (folder / ENDED).read_text() != str(num_rounds)
    except OSError:
        return True


class Outbox:
    """One file for each phase, with the arrays and who gets them."""

    def __init__(self, directory: Path) -> None:
        """Make the folder.

        Raises:
            StorageError: the disk refuses.
        """
        self._directory = directory
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def write(self, address: When, arrays: Arrays, receivers: Collection[int]) -> None:
        """Write what is sent in a phase, durably.

        Raises:
            StorageError: the disk refuses.
        """
        file = self._file(address)
        aside = file.with_name(f".{file.name}.writing")
        with storage_errors(file):
            with aside.open("wb") as opened:
                opened.write(save(dict(arrays), {RECEIVERS: json.dumps(sorted(receivers))}))
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(aside, file)
            sync(self._directory)

    def read(self, before: When) -> Iterator[tuple[When, Arrays, list[int]]]:
        """Yield what was sent in phases before one, in their order, and to whom.

        Raises:
            CheckpointError: a file is damaged.
        """
        for address in sorted(self._addresses()):
            if address < before:
                try:
                    arrays = load_file(self._file(address))
                    with safe_open(self._file(address), "pt") as opened:
                        receivers = json.loads(opened.metadata()[RECEIVERS])
                except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
                    raise CheckpointError(
                        f"cannot read {str(self._file(address))!r}, which others may need again ({error}): restore it"
                    ) from error
                yield address, arrays, receivers

    def keep(self, addresses: Collection[When]) -> None:
        """Delete what belongs to other phases.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self._directory):
            for address in self._addresses():
                if address not in addresses:
                    self._file(address).unlink()

    def end(self, num_rounds: int) -> None:
        """Note that after so many rounds nobody needs anything of this peer, see `is_awaited`.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self._directory):
            (self._directory / ENDED).write_text(str(num_rounds))

    def _addresses(self) -> list[When]:
        found = (_FILE.fullmatch(name) for name in os.listdir(self._directory))
        return [(int(one[1]), int(one[2])) for one in found if one]

    def _file(self, address: When) -> Path:
        return self._directory / f"{address[0]}-{address[1]}.safetensors"
