"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378, option II), as a plug-in that keeps state on its clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays, Uplink
from gossamer.errors import ConfigError


class Scaffold:
    """Local SGD whose drift is corrected by control variates, one at the server and one at every client."""

    uplink: Mapping[str, Uplink] = {"x": "mean", "control": "sum"}
    downlink: tuple[str, ...] | None = ("x", "control")
    client_arrays: tuple[str, ...] = ("control",)

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        if options or momentum or weight_decay:
            raise ConfigError(
                f"SCAFFOLD has no options, but algorithm = {dict(options)!r}, train.momentum = {momentum!r} and"
                f" train.weight_decay = {weight_decay!r}: leave them out"
            )

    def init(self, x: Tensor) -> Arrays:
        return {"x": x, "control": torch.zeros_like(x)}

    def init_client(self, x: Tensor) -> Arrays:
        return {"control": torch.zeros_like(x)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone(), "correction": state["control"] - client_state["control"]}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["x"].sub_(grad + carry["correction"], alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        change = carry["x"] - state["x"]
        control_change = -state["control"] - change / (steps * lr)
        return {"x": change, "control": control_change}, {"control": client_state["control"] + control_change}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {"x": state["x"] + inbox["x"], "control": state["control"] + inbox["control"] / num_clients}
