"""Memory that several processes of this machine map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import EngineError


class Mappable:
    """Zeroed shared memory that other processes of this machine and user can map while this one keeps it.

    Nothing is left behind when processes are killed, because it has no name but that of the open file.

    Attributes:
        tensor: [num_floats].
        address: argument of `attach`, of plain JSON values.
    """

    def __init__(self, num_floats: int, dtype: torch.dtype = torch.float32) -> None:
        """Reserve memory; pages that are never written take none.

        Raises:
            EngineError: the system does not grant that much memory.
        """
        num_bytes = max(dtype.itemsize * num_floats, mmap.PAGESIZE)
        self._file = os.memfd_create("gossamer")
        try:
            os.ftruncate(self._file, num_bytes)
            buffer = mmap.mmap(self._file, num_bytes)
        except (OSError, ValueError) as error:
            raise EngineError(f"cannot reserve {num_bytes / 1e9:.1f} GB of shared memory ({error})") from error
        self.tensor = torch.frombuffer(buffer, dtype=dtype)[:num_floats]
        number = os.fstat(self._file).st_ino  # tells it from one that had the same file descriptor
        self.address = [os.getpid(), self._file, number, num_floats, str(dtype).removeprefix("torch.")]

    def close(self) -> None:
        """Let nobody map it any more; who has it mapped keeps it, as does `tensor`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def attach(address: Sequence[Any]) -> Tensor:
    """Return the tensor of a `Mappable` of another process.

    Raises:
        OSError: it is not there any more.
    """
    process, file, _, num_floats, dtype = address
    with open(f"/proc/{process}/fd/{file}", "r+b") as opened:
        buffer = mmap.mmap(opened.fileno(), 0)
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype))[:num_floats]
