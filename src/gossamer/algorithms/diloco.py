"""DiLoCo: many local steps of any optimizer, then a step of Nesterov momentum along the mean change of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.federated import FedAvg


class DiLoCo(FedAvg):
    """DiLoCo (Douillard et al., arXiv 2311.08105, Algorithm 1): the mean change of the workers is an outer gradient::

        D = mean_k(theta_k - phi);  v <- mu v + D;  phi <- phi + outer_lr (D + mu v)

    A round is `train.steps` inner steps of each worker, H in the paper, which takes 500 of AdamW
    (``train.optimizer: {name: adamw, betas: [0.9, 0.95], state: keep}``). With momentum 0 and a rate of 1 it is FedAvg;
    without Nesterov's lookahead it is FedAvgM. Everything is coordinatewise, so sub-models of any strategy will do:
    coordinates that nobody held keep phi and v.
    """

    class Options(BaseAlgorithm.Options):
        """Options of DiLoCo; the defaults are the paper's.

        Attributes:
            outer_lr: step size of the outer optimizer.
            outer_momentum: its momentum, mu.
            nesterov: whether it looks ahead; otherwise phi moves by ``outer_lr v``.
        """

        outer_lr: float = Field(default=0.7, gt=0)
        outer_momentum: float = Field(default=0.9, ge=0, lt=1)
        nesterov: bool = True

    def init(self, x: Tensor) -> Arrays:
        """Return the model and the outer momentum, 0."""
        return {"x": x, "velocity": torch.zeros_like(x)}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the outer optimizer; what nobody held keeps its bits."""
        outer, change = self.options, inbox["x"]
        velocity = state["velocity"] * outer.outer_momentum + change
        direction = change + outer.outer_momentum * velocity if outer.nesterov else velocity
        new = {"x": torch.add(state["x"], direction, alpha=outer.outer_lr), "velocity": velocity}
        return where_held(inbox["held"], new, state)
