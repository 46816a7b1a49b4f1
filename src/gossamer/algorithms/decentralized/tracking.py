"""Gradient tracking: every peer estimates the gradient of all, so that unequal data leave no bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import MAX_PEERS, PeerSGD
from gossamer.topology import Topology


class DSGT(PeerSGD):
    """Stochastic gradient tracking (Pu and Nedic, arXiv 1805.11454), local steps as in LU-GT (arXiv 2210.04757).

    A local step corrects the tracker y by how the peer's gradient changed, and follows it; after the last one, both are
    mixed::

        y <- y + gradient - last gradient;  x <- x - lr y;  ...  x <- W x;  y <- W y

    y and the last gradient start at 0, so that the first tracker is the first gradient and the mean of y is that of the
    last gradients ever after: the fixed point is a stationary point of the mean loss, whatever the number of local
    steps.
    """

    traits = replace(
        PeerSGD.traits,
        uplink={"x": "sum", "y": "sum"},
        whole_models_only="the trackers' sum must stay the sum of all gradients, coordinate by coordinate",
        no_momentum="its trackers follow plain gradients",
        sgd_only="its trackers follow plain gradients",
    )

    def init(self, x: Tensor) -> Arrays:
        """Return the models, trackers 0, and last gradients 0."""
        return {"x": x, "y": torch.zeros_like(x), "gradient": torch.zeros_like(x)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return copies of everything."""
        return {name: state[name].clone() for name in ("x", "y", "gradient")}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """Correct the tracker, and step along it."""
        self.track(carry, self.decayed(carry, grad))
        carry["x"].sub_(carry["y"], alpha=lr)
        return carry

    def track(self, carry: Mapping[str, Tensor], grad: Tensor) -> None:
        """Correct the tracker in place by how the gradient changed; coordinatewise."""
        carry["y"].add_(grad).sub_(carry["gradient"])
        carry["gradient"].copy_(grad)

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return models and trackers; the last gradients."""
        return {"x": carry["x"], "y": carry["y"]}, {"gradient": carry["gradient"]}

    def check(self, topology: Topology) -> list[str]:
        """Refuse all but doubly stochastic mixings; warn where a fixed one bounds the step more than descent does."""
        reason = "its trackers must keep the sum of all gradients"
        self.require_doubly(topology, reason, "choose a doubly stochastic topology")
        limit = topology.tracking_limit() if topology.n <= MAX_PEERS else None
        if limit is None or limit > 2.0 - 1e-9:
            return []
        return [
            f"gradient tracking on topology {topology.name!r} is stable where train.lr times the largest curvature"
            f" of the loss is below {limit:.3g}, not below 2 as for gradient descent: lower train.lr, or choose"
            f" another graph; lazy: true has the limit {topology.tracking_limit(lazy=True):.3g}, but averages slower"
        ]
