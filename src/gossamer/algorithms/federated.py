"""Federated averaging, and the methods that run it on sub-models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, Uplink, takes_plain_steps
from gossamer.options import Options, parse_options


class FedAvg:
    """FedAvg (McMahan et al., arXiv 1602.05629): local SGD, weighted mean of the changes, a server step.

    With ``server_momentum`` it is FedAvgM (Hsu et al., arXiv 1909.06335).
    """

    class Options(Options):
        """Options of FedAvg and its sub-model variants."""

        server_lr: float = Field(default=1.0, gt=0)
        server_momentum: float = Field(default=0.0, ge=0, lt=1)

    uplink: Mapping[str, Uplink] = {"x": "mean"}
    downlink: tuple[str, ...] | None = ("x",)
    client_arrays: tuple[str, ...] = ()

    # What the sub-model methods below change.
    strategy: ClassVar[str | None] = None
    capacities: ClassVar[Literal["one", "given", "smallest", "largest"]] = "one"
    default_label_mask: ClassVar[str] = "none"
    default_scaler: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.options = parse_options(type(self).Options, options, "algorithm")
        self.momentum, self.weight_decay = momentum, weight_decay

    def init(self, x: Tensor) -> Arrays:
        """Return the model, and its velocity where the server has momentum."""
        return {"x": x} | ({"velocity": torch.zeros_like(x)} if self.options.server_momentum else {})

    def init_client(self, x: Tensor) -> Arrays:
        """Return nothing: clients keep no state."""
        return {}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model to train, and zero momentum if there is any."""
        x = state["x"].clone()
        return {"x": x} | ({"momentum": torch.zeros_like(x)} if self.momentum else {})

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is that of SGD without momentum and weight decay."""
        return takes_plain_steps(self, FedAvg.step)

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step of SGD, as `torch.optim.SGD` takes it with the same momentum and weight decay."""
        if self.weight_decay:
            grad = grad.add(carry["x"], alpha=self.weight_decay)
        if self.momentum:
            grad = carry["momentum"].mul_(self.momentum).add_(grad)
        carry["x"].sub_(grad, alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return by how much each model changed."""
        return {"x": carry["x"].sub_(state["x"])}, {}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the mean change times ``server_lr``; what nobody held keeps its bits."""
        x, change, held = state["x"], inbox["x"], inbox["held"]
        new: Arrays = {}
        if self.options.server_momentum:
            change = new["velocity"] = state["velocity"] * self.options.server_momentum + change
        if held is None:
            new["x"] = x.add_(change, alpha=self.options.server_lr)
            return new
        # What nobody held keeps its bits (adding 0 would turn -0.0 into 0.0), and so does its velocity.
        new["x"] = x + change * self.options.server_lr
        return {name: torch.where(held, value, state[name]) for name, value in new.items()}


class FedRolex(FedAvg):
    """FedRolex (Alam et al., arXiv 2212.01548): windows roll over the channels, one stride a round."""

    strategy = "rolling"
    capacities = "given"
    default_label_mask = "zero"


class HeteroFL(FedAvg):
    """HeteroFL (Diao et al., arXiv 2010.01264): every client holds the first channels."""

    strategy = "static"
    capacities = "given"
    default_label_mask = "zero"


class FederatedDropout(FedAvg):
    """Federated Dropout (Caldas et al., arXiv 1812.07210): random channels, aligned within each width group."""

    strategy = "random"
    capacities = "given"
    default_label_mask = "zero"


class AllSmallest(FedAvg):
    """Every client, and the global model itself, has the smallest capacity: the floor of any comparison."""

    capacities = "smallest"
    default_label_mask = "zero"


class AllLargest(FedAvg):
    """Every client, and the global model itself, has the largest capacity: the ceiling of any comparison."""

    capacities = "largest"
    default_label_mask = "zero"
