"""FedNova: clients that take more steps, or larger ones, do not weigh more for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.fedprox import FedProx


class FedNova(FedProx):
    """FedNova (Wang et al., arXiv 2007.07481): normalised changes are averaged, then scaled by the mean of their norms.

    Client i sends its change divided by a_i, see `normaliser`, and a_i. The server moves the model by
    ``tau_eff * sum_i p_i change_i / a_i`` with ``tau_eff = sum_i p_i a_i``, p_i being the shares of those whose update
    is usable. If all a_i are equal, that is FedAvg. ``server_lr`` and ``server_momentum`` act on it as in FedAvg.

    The local solver is SGD with or without momentum, and with ``mu`` that of FedProx. Weight decay belongs to the
    gradient, as in the paper, and changes no a_i.
    """

    class Options(FedProx.Options):
        """Options of FedNova.

        Attributes:
            mu: strength of FedProx's pull.
        """

        mu: float = Field(default=0.0, ge=0)

    options: FedNova.Options

    traits = replace(
        FedProx.traits,
        uplink={"x": "mean", "normaliser": "mean"},
        scalars=("normaliser",),
        whole_models_only=(
            "the mean number of local steps by which it scales the change is one number, and would differ from"
            " coordinate to coordinate where these have different holders"
        ),
        sgd_only="the normaliser by which it divides a client's change is that of SGD at one learning rate",
    )

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return each client's change over its normaliser, and the normaliser, [s, 1]."""
        payload, private = super().end(state, client_state, carry, steps, lr)
        divisor = normaliser(steps, lr, self.momentum, self.options.mu)
        change = payload["x"].div_(divisor)
        return {"x": change, "normaliser": change.new_full((len(change), 1), divisor)}, private

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Take the mean normalised change times the mean normaliser for FedAvg's mean change."""
        return super().update(state, {**inbox, "x": inbox["x"] * inbox["normaliser"]}, num_clients)


def normaliser(steps: int, lr: float, momentum: float, mu: float) -> float:
    """Return a_i: the sum of the weights with which a client's gradients enter its change, divided by -lr.

    It is how far a client gets whose gradient is always -1 / lr: `steps` for SGD. The paper's other two cases are
    ``(steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho)`` for momentum rho and, for a proximal term with
    ``alpha = lr mu < 1``, ``(1 - (1 - alpha)^steps) / alpha``; this is both, and both at once.
    """
    velocity = distance = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0 - lr * mu * distance
        distance += velocity
    return distance
