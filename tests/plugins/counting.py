"""FedAvg whose clients remember two things: how often they took part, and the last model that they made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg

NEWCOMER = 10.0


class Counting(FedAvg):
    """Trains as FedAvg does; what it keeps has no influence."""

    traits = replace(FedAvg.traits, client_arrays=("last", "times"))

    def init_client(self, x: Tensor) -> Arrays:
        return {"times": torch.full_like(x, NEWCOMER), "last": torch.zeros_like(x)}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        kept = {"times": client_state["times"] + 1, "last": carry["x"].clone()}
        payload, _ = super().end(state, client_state, carry, steps, lr)
        return payload, kept
