"""A sampler that holds a run at one round until it is let go."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossamer.planning import clients

HELD_ROUND = 3
PATIENCE = 200.0


def hold(seed: int, round: int, num_clients: int, count: int) -> NDArray[np.int64]:
    """Sample uniformly; at one round, say so in the folder ``$GATE`` and wait for the file ``open`` there."""
    folder = os.environ.get("GATE")
    if round == HELD_ROUND and folder is not None:
        (Path(folder) / "reached").touch()
        deadline = time.monotonic() + PATIENCE
        while not (Path(folder) / "open").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody made {folder}/open within {PATIENCE} s")
            time.sleep(0.01)
    return clients.uniform(seed, round, num_clients, count)
