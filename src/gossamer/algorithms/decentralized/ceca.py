"""DSGD over CECA's joint mixings, which reach the exact mean of any number of peers in ceil(log2 n) rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD, mixings
from gossamer.topology import Topology


class DSGDCECA(PeerSGD):
    """DSGD-CECA (Ding et al., arXiv 2306.00256): a peer's x and y both take its local steps, and are mixed jointly.

    As in the paper one gradient a round moves both rows, so that their means agree and move by -lr times the mean
    gradient. The paper takes it at the row that the round sends, x or y; here it is always taken at x, the model.
    """

    traits = replace(
        PeerSGD.traits,
        uplink={"x": "sum", "y": "sum"},
        joint=True,
        whole_models_only="its mixings need all coordinates of both rows",
    )

    def init(self, x: Tensor) -> Arrays:
        """Return the models, twice."""
        return super().init(x) | {"y": x.clone()}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return both rows, moved alike; the momentum."""
        x = carry["x"]
        return {"x": x, "y": x - state["x"] + state["y"]}, self.kept(carry)

    def check(self, topology: Topology) -> list[str]:
        """Refuse all mixings but joint ones."""
        if any(mixing.kind != "joint" for mixing in mixings(topology)):
            reason = "it mixes one row of each peer, of which this method has two"
            raise self.refusal(topology, reason, "choose topology 'ceca', or algorithm 'dsgd'")
        return []
