"""Gradient tracking: every peer estimates the gradient of all, so that unequal data leave no bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD, min_real_part
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
    )

    def init(self, x: Tensor) -> Arrays:
        """Return the models, trackers 0, and last gradients 0."""
        return {"x": x, "y": torch.zeros_like(x), "gradient": torch.zeros_like(x)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return copies of everything."""
        return {name: state[name].clone() for name in ("x", "y", "gradient")}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """Correct the tracker, and step along it."""
        grad = self.decayed(carry, grad)
        carry["y"].add_(grad).sub_(carry["gradient"])
        carry["gradient"].copy_(grad)
        carry["x"].sub_(carry["y"], alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return models and trackers; the last gradients."""
        return {"x": carry["x"], "y": carry["y"]}, {"gradient": carry["gradient"]}

    def check(self, topology: Topology) -> list[str]:
        """Refuse all but doubly stochastic mixings; warn of eigenvalues with a negative real part."""
        reason = "its trackers must keep the sum of all gradients"
        self.require_doubly(topology, reason, "choose a doubly stochastic topology")
        least = min_real_part(topology)
        if least is None or least > -1e-9:
            return []
        return [
            f"topology {topology.name!r} has an eigenvalue of real part {least:.3g}: gradient tracking may diverge at"
            " steps where other graphs converge; lower train.lr, or set lazy: true"
        ]
