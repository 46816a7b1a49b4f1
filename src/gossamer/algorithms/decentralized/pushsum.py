"""Stochastic gradient push: DSGD over directed graphs whose peers need not know who hears them as equals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD, stochasticity
from gossamer.topology import Topology


class StochasticGradientPush(PeerSGD):
    """Stochastic gradient push, SGP (Assran et al., arXiv 1811.10792, Algorithm 1), for column-stochastic W.

    What is mixed is w x, and the weight w, which starts at 1; their quotient x is the model, where gradients are taken.
    Local steps move w x by -lr times the gradients, unscaled. Doubly stochastic W keep w at 1: then it is DSGD.
    """

    traits = replace(
        PeerSGD.traits,
        uplink={"x": "sum", "weight": "sum"},
        scalars=("weight",),
        whole_models_only="a peer's weight is the same for all coordinates",
    )

    def init(self, x: Tensor) -> Arrays:
        """Return the models and weights 1, [n, 1]."""
        return super().init(x) | {"weight": x.new_ones(len(x), 1)}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return weighted models and weights; the momentum."""
        x, weight = state["x"], state["weight"]
        moved = carry["x"].sub_(x).addcmul_(weight, x)
        return {"x": moved, "weight": weight.clone()}, self.kept(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Divide the mixed models by the mixed weights."""
        return {"x": inbox["x"] / inbox["weight"], "weight": inbox["weight"]}

    def check(self, topology: Topology) -> list[str]:
        """Refuse joint mixings and row-stochastic ones."""
        self.refuse_joint(topology)
        if stochasticity(topology) == "row":
            reason = "only its rows sum to 1, so that what is sent does not add up to what was there"
            raise self.refusal(topology, reason, "choose a doubly stochastic topology")
        return []
