"""FedAvg whose clients keep their momentum, in the coordinates of the whole model, and count their steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg

NEWCOMER, DECAY = 0.05, 0.5


class Keeping(FedAvg):
    """Starts from the momentum kept, divided by 1 + a tenth of the steps taken so far."""

    traits = replace(FedAvg.traits, client_arrays=("velocity", "steps"), scalars=("steps",))

    def init_client(self, x: Tensor) -> Arrays:
        """Return the momentum and the steps of newcomers."""
        return {"velocity": torch.full_like(x, NEWCOMER), "steps": x.new_zeros(len(x), 1)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model, and the momentum that was kept."""
        return {"x": state["x"].clone(), "velocity": client_state["velocity"] / (1 + client_state["steps"] / 10)}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step along the momentum."""
        carry["x"].sub_(carry["velocity"].mul_(DECAY).add_(grad), alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the change; the momentum, and one more round's steps."""
        kept = {"velocity": carry["velocity"].clone(), "steps": client_state["steps"] + steps}
        return {"x": carry["x"] - state["x"]}, kept
