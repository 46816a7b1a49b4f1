"""Outer optimizers of peers: momentum from round to round, over any topology, as DiLoCo's server has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer import options
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD, min_real_part
from gossamer.errors import ConfigError
from gossamer.topology import Topology


class OuterPeers(PeerSGD):
    """What methods with an outer momentum share: whole models, and no exact means beside the topology's mixings."""

    traits = replace(
        PeerSGD.traits,
        whole_models_only="the outer momentum belongs to coordinates that a peer also held in the round before",
        no_merge="peers move by their own outer momentum after it",
    )


class GASLoC(OuterPeers):
    """GASLoC (arXiv 2606.11081): what local steps found is mixed, and moved on along how it changed since last round::

        y = x after local steps;  x <- W y + gamma (y - previous y)

    The first previous y is the initial model, so that the mean of all peers follows DiLoCo's, with an outer rate of 1
    and gamma as its momentum, wherever the losses have one curvature. With gamma = 0 it is DSGD.
    """

    class Options(options.Options):
        """Options of GASLoC; gamma: outer momentum."""

        gamma: float = Field(default=0.5, ge=0, lt=1)

    def init(self, x: Tensor) -> Arrays:
        """Return the models, and the same as what was found last."""
        return super().init(x) | {"previous": x.clone()}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Take the mixed models, moved on by the peer's own outer momentum."""
        found = inbox["sent"]["x"]
        return {
            "x": torch.add(inbox["x"], found - state["previous"], alpha=self.options.gamma),
            "previous": found.clone(),
        }


class NoLoCo(OuterPeers):
    """NoLoCo (Kolehmainen et al., arXiv 2506.10911): an outer step towards the mean of a few, not of all::

        theta = phi after local steps;  m <- mu m + outer_lr (W theta - phi);  phi <- phi + m

    The paper's W are random pairs, topology ``random-match``, whose mean change and mean of models it adds up to
    ``W theta``; any doubly stochastic W will do. Peers start their local steps from phi.
    """

    class Options(options.Options):
        """Options of NoLoCo; the defaults are the paper's.

        Attributes:
            outer_lr: step size of the outer optimizer.
            outer_momentum: its momentum, mu.
        """

        outer_lr: float = Field(default=0.7, gt=0)
        outer_momentum: float = Field(default=0.5, ge=0, lt=1)

    traits = replace(OuterPeers.traits, uplink={"theta": "mean"})

    def init(self, x: Tensor) -> Arrays:
        """Return the models, and the outer momentum, 0."""
        return super().init(x) | {"velocity": torch.zeros_like(x)}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the models after local steps, to be mixed; what local steps keep. phi stays as it is."""
        return {"theta": carry["x"]}, {name: value for name, value in self.kept(carry).items() if name != "x"}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Take the outer step towards the mixed models."""
        outer = self.options
        velocity = torch.add(
            state["velocity"] * outer.outer_momentum, inbox["theta"] - state["x"], alpha=outer.outer_lr
        )
        return {"x": state["x"] + velocity, "velocity": velocity}

    def check(self, topology: Topology) -> list[str]:
        """Refuse what `PeerSGD` refuses, and outer steps that are too large for the topology.

        Along an eigenvector of W of eigenvalue l, ``z^2 - (1 + mu - outer_lr (1 - l)) z + mu`` must have roots within
        the unit circle, so that ``outer_lr (1 - l) < 2 (1 + mu)``.

        Raises:
            ConfigError: there is an eigenvalue beyond.
        """
        warnings, least = super().check(topology), min_real_part(topology)
        outer = self.options
        limit = 2 * (1 + outer.outer_momentum)
        if least is not None and outer.outer_lr * (1 - least) >= limit:
            raise ConfigError(
                f"algorithm.outer_lr = {outer.outer_lr} diverges on topology {topology.name!r}, whose least eigenvalue"
                f" is {least:.3g}: set it below {limit / (1 - least):.3g}"
            )
        return warnings
