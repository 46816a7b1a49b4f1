"""Federated averaging, and the methods that run it on sub-models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.traits import AlgorithmTraits


class FedAvg(BaseAlgorithm):
    """FedAvg (McMahan et al., arXiv 1602.05629): local SGD, weighted mean of the changes, a server step.

    With ``server_momentum`` it is FedAvgM (Hsu et al., arXiv 1909.06335).
    """

    class Options(BaseAlgorithm.Options):
        """Options of FedAvg and its sub-model variants.

        Attributes:
            server_lr: factor of the mean change.
            server_momentum: share of its last step that the server takes again.
        """

        server_lr: float = Field(default=1.0, gt=0)
        server_momentum: float = Field(default=0.0, ge=0, lt=1)

    traits = AlgorithmTraits()

    @property
    def averages(self) -> bool:
        """Whether changes are averaged by this class, and the server adds their mean as it is."""
        own, traits = type(self), self.traits
        is_plain = own.end is FedAvg.end and own.update is FedAvg.update
        changes_loss = traits.has_local_loss or traits.transforms_parameters
        return is_plain and not changes_loss and self.options.server_lr == 1 and not self.options.server_momentum

    def init(self, x: Tensor) -> Arrays:
        """Return the model, and its velocity where the server has momentum."""
        return {"x": x} | ({"velocity": torch.zeros_like(x)} if self.options.server_momentum else {})

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model to train, and moments: zero, or those that the client kept."""
        x = state["x"].clone()
        return {"x": x} | self.moments(x, client_state)

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return by how much each model changed; moments that the client keeps."""
        return {"x": carry["x"].sub_(state["x"])}, self.private(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the mean change times ``server_lr``; what nobody held keeps its bits."""
        x, change, held = state["x"], inbox["x"], inbox["held"]
        new: Arrays = {}
        if self.options.server_momentum:
            change = new["velocity"] = state["velocity"] * self.options.server_momentum + change
        if held is None:
            new["x"] = x.add_(change, alpha=self.options.server_lr)
            return new
        new["x"] = x + change * self.options.server_lr
        return where_held(held, new, state)


class FedRolex(FedAvg):
    """FedRolex (Alam et al., arXiv 2212.01548): windows roll over the channels, one stride a round."""

    traits = replace(FedAvg.traits, strategy="rolling", capacities="given", default_label_mask="zero")


class HeteroFL(FedAvg):
    """HeteroFL (Diao et al., arXiv 2010.01264): every client holds the first channels."""

    traits = replace(FedAvg.traits, strategy="static", capacities="given", default_label_mask="zero")


class FederatedDropout(FedAvg):
    """Federated Dropout (Caldas et al., arXiv 1812.07210): random channels, aligned within each width group."""

    traits = replace(FedAvg.traits, strategy="random", capacities="given", default_label_mask="zero")


class AllSmallest(FedAvg):
    """Every client, and the global model itself, has the smallest capacity: the floor of any comparison."""

    traits = replace(FedAvg.traits, capacities="smallest", default_label_mask="zero")


class AllLargest(FedAvg):
    """Every client, and the global model itself, has the largest capacity: the ceiling of any comparison."""

    traits = replace(FedAvg.traits, capacities="largest", default_label_mask="zero")
