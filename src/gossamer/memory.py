"""How much memory this machine has, the refusal of what needs more, and memory that several processes map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigError, EngineError, one_line

CGROUP = Path("/sys/fs/cgroup")
MEMORY_FACTS = Path("/proc/meminfo")


def machine_memory() -> tuple[int | None, int | None]:
    """Return total and available memory in bytes, within the container's limit; None where the system does not say."""
    try:
        lines = (line.split() for line in MEMORY_FACTS.read_text().splitlines())
        facts = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
        total, available = facts["MemTotal"], facts["MemAvailable"]
    except (OSError, ValueError, LookupError):
        return None, None
    limit = number_in(CGROUP / "memory.max") or number_in(CGROUP / "memory" / "memory.limit_in_bytes")
    return (total, available) if limit is None else (int(min(total, limit)), int(min(available, limit)))


def number_in(path: Path) -> float | None:
    """Return the number that is all that a file holds, or None where there is none."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def require_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Check that something could fit into this machine if nothing else were there.

    Args:
        num_bytes: lower bound of what it needs.
        what: subject of the sentence.
        remedy: what to do instead.

    Raises:
        ConfigError: it could not.
    """
    total, _ = machine_memory()
    if total is not None and num_bytes > total:
        raise ConfigError(f"{what} needs {_gigabytes(num_bytes)}, but this machine has {_gigabytes(total)}: {remedy}")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Convert what numpy and torch raise where memory is short, within the block, to an `EngineError`.

    Raises:
        EngineError: memory is short.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise EngineError(
            f"memory is short ({one_line(error)}): take a smaller model, smaller batches, fewer steps a round or fewer"
            " engine.workers"
        ) from error


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


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e15 else f"{num_bytes / 1e9:.1e} GB"
