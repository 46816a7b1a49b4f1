"""What BatchNorm normalised by when a run was last evaluated: a commit keeps it, so that a model can be taken home."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PREFIX = "statistics."
ROUND = "round"
MODEL = "model"  # the whole model, of peers the merged one


def name_of(capacity: float = 1.0, peer: int | None = None, client: int | None = None) -> str:
    """Return what the statistics of a (sub-)model are kept under."""
    if client is not None:
        return f"client={client}" + ("" if capacity == 1.0 else f",capacity={capacity:g}")
    if peer is not None:
        return f"peer={peer}"
    return MODEL if capacity == 1.0 else f"capacity={capacity:g}"


class Statistics:
    """Sums of static BatchNorm of each model that was evaluated last, see `Workload.statistics`."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}
        self._round = 0

    def begin(self, round: int) -> None:
        """Forget all; what is kept from now on is of the model after `round`, counted from 0."""
        self._arrays, self._round = {}, round + 1

    def keep(self, name: str, sums: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep the sums of a model, see `name_of`."""
        self._arrays |= {f"{PREFIX}{name}.{key}": torch.tensor(value) for key, value in sums.items()}

    def read(self) -> dict[str, Tensor]:
        """Return arrays for a commit; {} where the model has no BatchNorm."""
        return {**self._arrays, PREFIX + ROUND: torch.tensor(self._round)} if self._arrays else {}

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over what `read` returned, if `state` holds it, and return the other arrays of `state`."""
        found = {name: state[name] for name in state if name.startswith(PREFIX)}
        if found:
            self._round = int(found.pop(PREFIX + ROUND))
            self._arrays = found
        return {name: state[name] for name in state if not name.startswith(PREFIX)}


def statistics_in(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], int]:
    """Return the sums of a model in the arrays of a commit, and the rounds that were done when they were taken."""
    prefix = f"{PREFIX}{name}."
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return found, int(state[PREFIX + ROUND]) if found else 0
