"""SCAFFOLD: control variates, one at the server and one at every client, against client drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, Uplink
from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options


class Scaffold:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378, Algorithm 1 with option II).

    A local step goes along ``gradient - own control + server's control``. Afterwards the client's control becomes the
    mean of the gradients that it saw, ``own - server's + (start - end) / (steps lr)``; the server's control is the mean
    over all registered clients, of whom those that never took part have 0. Weight decay belongs to the gradient. The
    changes are averaged with the weights of the run, where the paper has equal ones (``clients.weighting: equal``).
    """

    class Options(Options):
        """Options of SCAFFOLD; server_lr: the paper's global step size."""

        server_lr: float = Field(default=1.0, gt=0)

    uplink: Mapping[str, Uplink] = {"x": "mean", "control": "sum"}
    downlink: tuple[str, ...] | None = ("x", "control")
    client_arrays: tuple[str, ...] = ("control",)
    whole_models_only: ClassVar[str | None] = (
        "the server's control variate is the mean over all registered clients at every coordinate, and windows leave"
        " clients out"
    )

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.options = parse_options(Scaffold.Options, options, "algorithm")
        if momentum:
            raise ConfigError(
                f"SCAFFOLD does not go with train.momentum = {momentum!r}, because its control variates take a client's"
                " change for a sum of plain gradient steps: set train.momentum to 0"
            )
        self.weight_decay = weight_decay

    def init(self, x: Tensor) -> Arrays:
        """Return the model and the server's control variate, 0."""
        return {"x": x, "control": torch.zeros_like(x)}

    def init_client(self, x: Tensor) -> Arrays:
        """Return the control variates of newcomers, 0."""
        return {"control": torch.zeros_like(x)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model to train, and by what every gradient is corrected."""
        return {"x": state["x"].clone(), "correction": state["control"] - client_state["control"]}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step of SGD along the corrected gradient."""
        if self.weight_decay:
            grad = grad.add(carry["x"], alpha=self.weight_decay)
        carry["x"].sub_(grad + carry["correction"], alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the changes of models and controls; the new controls."""
        change = carry["x"] - state["x"]
        control_change = -state["control"] - change / (steps * lr)
        return {"x": change, "control": control_change}, {"control": client_state["control"] + control_change}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the mean change times ``server_lr``; keep the control the mean over all clients."""
        return {
            "x": state["x"] + self.options.server_lr * inbox["x"],
            "control": state["control"] + inbox["control"] / num_clients,
        }
