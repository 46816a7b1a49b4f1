"""Exact diffusion and D2: a correction by the last round's step, so that unequal data leave no bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD, min_real_part
from gossamer.topology import Topology


class D2(PeerSGD):
    """D2 (Tang et al., arXiv 1803.07068), in the form of exact diffusion (Yuan et al., arXiv 1702.05122)::

        new psi = x - lr gradient;  x <- W (new psi + x - psi);  psi <- new psi

    that is, with psi starting at x, ``x_{k+1} = W (2 x_k - x_{k-1} - lr_k g_k + lr_{k-1} g_{k-1})``.
    """

    traits = replace(
        PeerSGD.traits,
        uplink={"x": "sum"},
        whole_models_only="the correction belongs to coordinates that a peer also held in the round before",
        no_merge="its correction takes every mixing for the same W, and diverges if some are exact means",
        one_step_only="the correction removes the bias of single gradient steps only, not the drift of several",
        no_momentum="its correction takes the last step for a plain gradient step",
        sgd_only="its correction takes the last step for a plain gradient step",
    )

    def init(self, x: Tensor) -> Arrays:
        """Return the models, twice."""
        return {"x": x, "psi": x.clone()}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return corrected models; the models before the correction."""
        return {"x": carry["x"] + state["x"] - state["psi"]}, {"psi": carry["x"]}

    def check(self, topology: Topology) -> list[str]:
        """Refuse all but one symmetric W whose eigenvalues lie above -1/3."""
        self._require_fixed(topology)
        least = min_real_part(topology)
        if least is None:
            return [
                f"the least eigenvalue of topology {topology.name!r} is not computed for n = {topology.n}: D2 diverges"
                " where it is -1/3 or below; set lazy: true, or take algorithm 'exact-diffusion'"
            ]
        if least < -1.0 / 3.0 + 1e-9:
            reason = f"its least eigenvalue is {least:.4g}, and D2 diverges at -1/3 or below"
            raise self.refusal(topology, reason, "set lazy: true, or take algorithm 'exact-diffusion'")
        return []

    def _require_fixed(self, topology: Topology) -> None:
        reason = "its correction needs the same symmetric, doubly stochastic W every round"
        self.require_fixed_symmetric(topology, reason, "choose a static, undirected topology, or algorithm 'dsgt'")


class ExactDiffusion(D2):
    """Exact diffusion (Yuan et al., arXiv 1702.05122 and 1702.05142): D2 with (I + W) / 2 in the place of W."""

    traits = replace(D2.traits, lazy=True)

    def check(self, topology: Topology) -> list[str]:
        """Refuse all but one symmetric W."""
        self._require_fixed(topology)
        return []
