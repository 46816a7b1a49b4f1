"""SCAFFOLD: control variates, one at the server and one at every client, against client drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm
from gossamer.algorithms.traits import AlgorithmTraits


class Scaffold(BaseAlgorithm):
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378, Algorithm 1 with option II).

    A local step goes along ``gradient - own control + server's control``. Afterwards the client's control becomes the
    mean of the gradients that it saw, ``own - server's + (start - end) / (steps lr)``; the server's control is the mean
    over all registered clients, of whom those that never took part have 0. Weight decay belongs to the gradient. The
    changes are averaged with the weights of the run, where the paper has equal ones (``clients.weighting: equal``).
    """

    class Options(BaseAlgorithm.Options):
        """Options of SCAFFOLD.

        Attributes:
            server_lr: the paper's global step size.
        """

        server_lr: float = Field(default=1.0, gt=0)

    traits = AlgorithmTraits(
        uplink={"x": "mean", "control": "sum"},
        downlink=("x", "control"),
        client_arrays=("control",),
        whole_models_only=(
            "the server's control variate is the mean over all registered clients at every coordinate, and windows"
            " leave clients out"
        ),
        no_compression=(
            "the server's control variate must stay the mean of what clients keep, and follow from the same steps as"
            " their changes"
        ),
        no_momentum="its control variates take a client's change for a sum of plain gradient steps",
        sgd_only="its control variates take a client's change for a sum of plain gradient steps",
    )

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
        carry["x"].sub_(self.decayed(carry, grad) + carry["correction"], alpha=lr)
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
