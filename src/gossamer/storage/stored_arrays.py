"""Arrays in safetensors files, of which those that are needed are read, whole or some rows of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.errors import CheckpointError


class Piece(NamedTuple):
    """Where rows of an array lie.

    Attributes:
        path: file.
        shape: shape that the array has there.
    """

    path: Path
    shape: tuple[int, ...]


class StoredArrays(Mapping[str, Tensor]):
    """Arrays of one or several files. One that several files have is their rows together, file after file.

    An array is read anew each time, into memory of its own that starts on a 64-byte boundary: operands that do not
    could change bits.

    Attributes:
        paths: the files.
        prefix: what names begin with in the files, but not here; others are not here.
    """

    def __init__(self, paths: Sequence[Path], prefix: str = "") -> None:
        """Read which arrays there are.

        Raises:
            CheckpointError: a file cannot be read, or holds no arrays.
        """
        self.paths, self.prefix = list(paths), prefix
        self._pieces: dict[str, list[Piece]] = {}
        for path in self.paths:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        piece = Piece(path, tuple(file.get_slice(name).get_shape()))
                        self._pieces.setdefault(name.removeprefix(prefix), []).append(piece)

    def below(self, prefix: str) -> StoredArrays:
        """Return the arrays whose names begin with `prefix`, without it."""
        return StoredArrays(self.paths, self.prefix + prefix)

    def rows(self, name: str, low: int, high: int) -> Tensor:
        """Read the rows low, ..., high - 1 of an array.

        Raises:
            CheckpointError: a file cannot be read, or has no such rows.
        """
        found, start = list[Tensor](), 0
        for path, shape in self._pieces[name]:
            first, last = max(low - start, 0), min(high - start, shape[0])
            if first < last:
                with _opened(path) as file:
                    found.append(file.get_slice(self.prefix + name)[first:last])
            start += shape[0]
        if sum(map(len, found)) != high - low:
            raise CheckpointError(f"{name!r} has {start} rows, but {high} are needed: resume from another checkpoint")
        return torch.cat(found)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) > 1:
            return self.rows(name, 0, sum(piece.shape[0] for piece in pieces))
        with _opened(pieces[0].path) as file:
            whole: Tensor = file.get_tensor(self.prefix + name).clone()
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file, mapped into memory, for the block.

    Raises:
        CheckpointError: it cannot be read, or is none of arrays.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {str(path)!r} ({error}): restore it") from error
