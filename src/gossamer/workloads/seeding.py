"""Global generators that modules draw from as they are built, seeded for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(source: np.random.Generator) -> int:
    """Draw the seed of a module's build."""
    return int(source.integers(2**63))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (on processors), numpy and `random`, and leave them as they were."""
    states = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
