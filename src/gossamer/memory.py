"""How much memory this machine has, the refusal of what needs more, and the allocator's settings."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.errors import ConfigError, EngineError, one_line

CGROUP = Path("/sys/fs/cgroup")
MEMORY_FACTS = Path("/proc/meminfo")
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # of mallopt


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


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of giving it back to the system.

    Gradients are freed and allocated at every step; page faults on fresh pages cost more than writing the gradient.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_TOP_PAD, 1 << 24)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e15 else f"{num_bytes / 1e9:.1e} GB"
