"""An algorithm that sends numbers beside its model, and keeps what the server made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg


class Tallying(FedAvg):
    """FedAvg whose participants also send 1, to be added up, and their number of steps, to be averaged."""

    traits = replace(FedAvg.traits, uplink={"count": "sum", "x": "mean", "steps": "mean"}, scalars=("count", "steps"))

    def init(self, x: Tensor) -> Arrays:
        return {"x": x, "count": torch.zeros_like(x), "steps": torch.zeros_like(x)}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        payload, _ = super().end(state, client_state, carry, steps, lr)
        ones = payload["x"].new_ones(len(payload["x"]), 1)
        return {"count": ones, "x": payload["x"], "steps": ones * steps}, {}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        assert inbox["count"].shape == inbox["steps"].shape == (1, 1)
        tallies = {name: inbox[name].expand_as(state["x"]) for name in self.traits.scalars}
        return super().update(state, inbox, num_clients) | tallies
