"""Which modules of a model participants hold, and how the kinds of participants are assigned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer import rng


@dataclass(frozen=True)
class Holding:
    """The modules that some participants hold, such as those of the modalities they have.

    Attributes:
        name: what these are called in logs and configurations, such as ``"video+text"``.
        modules: names of modules, see `Layout.modules`.
    """

    name: str
    modules: frozenset[str]


def apportion(shares: Sequence[float], count: int) -> NDArray[np.int64]:
    """Split `count` clients in proportion to `shares` by largest remainders; int64, sums to `count`."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * count
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    for index in np.argsort(whole - exact, kind="stable")[: count - int(whole.sum())]:
        whole[index] += 1
    return whole


def assigned(shares: Sequence[float], num_clients: int, seed: int, purpose: str) -> NDArray[np.int16]:
    """Divide clients among kinds in proportion to `shares`, shuffled; int16 [num_clients], the kind of each.

    Args:
        seed, purpose: address of the shuffle.
    """
    kinds = np.empty(num_clients, dtype=np.int16)
    sorted_kinds = np.repeat(np.arange(len(shares), dtype=np.int16), apportion(shares, num_clients))
    kinds[rng.generator(seed, purpose).permutation(num_clients)] = sorted_kinds
    return kinds
