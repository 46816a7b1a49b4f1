"""FedOpt: adaptive optimizers at the server (FedAdam, FedYogi, FedAdagrad)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.federated import FedAvg


class FedOpt(FedAvg, ABC):
    """FedOpt (Reddi et al., arXiv 2003.00295, Algorithm 2): FedAvg's mean change is the server's gradient.

        m <- beta1 m + (1 - beta1) change,  v <- (see the methods below),  x <- x + server_lr m / (sqrt(v) + tau)

    m starts at 0 and v at tau^2; there is no bias correction, as in the paper. Everything is coordinatewise, so
    sub-models of any strategy will do: coordinates that nobody held keep x, m and v.
    """

    class Options(BaseAlgorithm.Options):  # not those of FedAvg's server
        """Options of adaptive servers; the defaults of betas and tau are those of the paper's experiments.

        Attributes:
            server_lr: the server's learning rate. The paper tunes it for every task.
            beta1: decay of the first moment.
            tau: degree of adaptivity, added to the root of the second moment; coordinates whose changes are well below
                it move as under FedAvg with momentum.
        """

        server_lr: float = Field(default=0.01, gt=0)
        beta1: float = Field(default=0.9, ge=0, lt=1)
        tau: float = Field(default=1e-3, gt=0)

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new v from the old one and the squared change."""

    def init(self, x: Tensor) -> Arrays:
        """Return the model and its two moments."""
        return {"x": x, "m": torch.zeros_like(x), "v": torch.full_like(x, self.options.tau**2)}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the server's optimizer; what nobody held keeps its bits."""
        server, change = self.options, inbox["x"]
        new = {
            "m": server.beta1 * state["m"] + (1 - server.beta1) * change,
            "v": self.second_moment(state["v"], change.square()),
        }
        new["x"] = state["x"] + server.server_lr * new["m"] / (new["v"].sqrt() + server.tau)
        return where_held(inbox["held"], new, state)


class FedAdam(FedOpt):
    """FedAdam: ``v <- beta2 v + (1 - beta2) change^2``."""

    class Options(FedOpt.Options):
        """Options of FedAdam and FedYogi.

        Attributes:
            beta2: decay of the second moment.
        """

        beta2: float = Field(default=0.99, ge=0, lt=1)

    options: FedAdam.Options

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return a moving mean of the squared changes."""
        return self.options.beta2 * v + (1 - self.options.beta2) * square


class FedYogi(FedAdam):
    """FedYogi: ``v <- v - (1 - beta2) change^2 sign(v - change^2)``: v falls more slowly than FedAdam's."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v moved towards the squared changes, by steps that do not depend on how far away it is."""
        return v - (1 - self.options.beta2) * square * torch.sign(v - square)


class FedAdagrad(FedOpt):
    """FedAdagrad: ``v <- v + change^2``."""

    class Options(FedOpt.Options):
        """Options of FedAdagrad, whose second moment never decays."""

        beta1: float = Field(default=0.0, ge=0, lt=1)

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the sum of all squared changes."""
        return v + square
