"""CHOCO-SGD: peers send compressed differences to what their neighbours know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer import options
from gossamer.aggregate.codecs import make_codec
from gossamer.aggregate.tensor_codecs import LowRank
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.errors import ConfigError
from gossamer.topology import Topology


class ChocoSGD(PeerSGD):
    """CHOCO-SGD (Koloskova et al., arXiv 1902.00340, Algorithm 2), in its memory-efficient form.

    ``hat`` is what all neighbours know of a peer, and ``neighbours`` the mean of theirs, ``sum_j W[i, j] hat[j]``; both
    start at 0. After local steps, with Q the codec::

        q = Q(x - hat);  hat <- hat + q;  neighbours <- neighbours + W q;  x <- x + gamma (neighbours - hat)

    Without compression and with gamma = 1 this is DSGD.
    """

    class Options(options.Options):
        """Options of CHOCO-SGD.

        Attributes:
            compressor: name and options of the codec, see `gossamer.aggregate.codecs`.
            gamma: consensus step size; too large a one diverges. With the default codec 0.2 converges on rings, stars,
                complete graphs and U-EquiStatic, and 0.3 does not on most, so that the default is half of that. Random
                or fewer entries need 0.05 or less; without compression 1 will do.
        """

        compressor: str | dict[str, Any] = {"name": "top-k", "share": 0.1}
        gamma: float = Field(default=0.1, gt=0, le=1)

    traits = replace(
        PeerSGD.traits,
        uplink={"q": "sum"},
        no_merge="what a peer keeps of its neighbours' sum belongs to the topology's W",
        whole_models_only="neighbours know a peer by the sum of all that it ever sent",
    )

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        codec = make_codec(self.options.compressor, "algorithm.compressor")
        if isinstance(codec, LowRank):
            raise ConfigError(
                f"algorithm.compressor = {self.options.compressor} needs matrices, and peers compress a model as one"
                " vector: choose another codec"
            )
        if codec.is_unbiased:
            raise ConfigError(
                f"algorithm.compressor = {self.options.compressor} is unbiased and need not contract, which CHOCO-SGD"
                " asks for: take rounding: nearest of int8 and int4, and leave unbiased out elsewhere"
            )
        self.traits = replace(self.traits, codecs={"q": codec})

    def init(self, x: Tensor) -> Arrays:
        """Return the models, of which nothing is known yet."""
        return super().init(x) | {"hat": torch.zeros_like(x), "neighbours": torch.zeros_like(x)}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return what is not known yet of the models; the models and their moments."""
        return {"q": carry["x"] - state["hat"]}, self.kept(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Add what was learnt, and move towards the neighbours."""
        hat = state["hat"] + inbox["sent"]["q"]
        neighbours = state["neighbours"] + inbox["q"]
        x = torch.add(state["x"], neighbours - hat, alpha=self.options.gamma)
        return {"x": x, "hat": hat, "neighbours": neighbours}

    def check(self, topology: Topology) -> list[str]:
        """Refuse all but one symmetric, doubly stochastic W."""
        reason = "what a peer keeps of its neighbours' sum belongs to one symmetric, doubly stochastic W"
        self.require_fixed_symmetric(topology, reason, "choose a static, undirected topology, or algorithm 'dsgd'")
        return []
