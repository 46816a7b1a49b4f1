"""FedProx: local steps that are pulled back to the model that they started from."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg


class FedProx(FedAvg):
    """FedProx (Li et al., arXiv 1812.06127, Eq. 2): client k minimises ``F_k(x) + mu / 2 * |x - start|^2``.

    `start` is the model that the client received, or its sub-model; the term is coordinatewise, so any window will do.
    Its gradient is added after clipping (``train.clip_norm`` bounds that of F_k alone) and before weight decay and
    moments of the optimizer. With mu = 0 it is FedAvg, bit for bit. Unequal work, which the paper allows, is planned
    elsewhere.
    """

    class Options(FedAvg.Options):
        """Options of FedProx.

        Attributes:
            mu: strength of the pull (the paper tries 0.001, 0.01, 0.1 and 1).
        """

        mu: float = Field(default=0.01, ge=0)

    options: FedProx.Options

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return what FedAvg works on, and where it started."""
        carry = super().begin(state, client_state)
        return carry | ({"start": state["x"].clone()} if self.options.mu else {})

    @property
    def changes_gradients(self) -> bool:
        """Whether there is a pull."""
        return self.options.mu > 0 or type(self).gradient is not FedProx.gradient

    def gradient(self, carry: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        """Return the gradient of the loss and the proximal term."""
        return grad.add(carry["x"] - carry["start"], alpha=self.options.mu) if self.options.mu else grad
