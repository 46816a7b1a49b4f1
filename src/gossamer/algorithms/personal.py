"""FedPer, FedRep and FedBN: a part of the model stays with the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from gossamer.algorithms.federated import FedAvg


class FedPer(FedAvg):
    """FedPer (Arivazhagan et al., arXiv 1912.00818): clients keep the layers ``clients.personal``, usually the last.

    All layers are trained together; the others are averaged as in FedAvg.
    """

    traits = replace(FedAvg.traits, personal="given")


class FedRep(FedPer):
    """FedRep (Collins et al., arXiv 2102.07078): the first local steps train the personal layers, then the others.

    The paper trains the personal head for several epochs and the shared layers for one. Optimizers that correct for
    their first steps, such as AdamW, count the steps of both parts together.
    """

    class Options(FedPer.Options):
        """Options of FedRep; head_share: share of the local steps, rounded down, that train the personal layers."""

        head_share: float = Field(default=0.5, gt=0, lt=1)

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        self.traits = replace(self.traits, personal_first=self.options.head_share)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether every step goes along all gradients: it does not."""
        return False


class FedBN(FedAvg):
    """FedBN (Li et al., arXiv 2102.07623): clients keep their BatchNorm layers, and normalise by their own moments."""

    traits = replace(FedAvg.traits, personal="norms")
