"""Memory shared by forked workers, and the allocator's settings."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from gossamer.errors import EngineError

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2


def shared_zeros(num_floats: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a zeroed tensor [num_floats] of `dtype` in anonymous shared memory, page aligned.

    Processes forked later see the same memory. It has no name: nothing is left behind when they are killed.

    Raises:
        EngineError: the system does not grant that much memory.
    """
    num_bytes = max(dtype.itemsize * num_floats, mmap.PAGESIZE)
    try:
        buffer = mmap.mmap(-1, num_bytes)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"cannot reserve {num_bytes / 1e9:.1f} GB of shared memory ({error}): lower engine.workers, or the number"
            " of peers"
        ) from error
    return torch.frombuffer(buffer, dtype=dtype)[:num_floats]


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
