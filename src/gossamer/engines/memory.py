"""Memory shared by forked workers."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from gossamer.errors import EngineError


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
