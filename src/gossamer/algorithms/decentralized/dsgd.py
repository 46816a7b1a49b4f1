"""Decentralized SGD: in its two orders, with periodic global averages, and with quasi-global momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from gossamer import options
from gossamer.algorithms.base import Arrays, where_held
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.algorithms.optimizers import Optimizer
from gossamer.errors import ConfigError


class DSGD(PeerSGD):
    """Decentralized SGD, also D-PSGD (Lian et al., arXiv 1705.09056).

    With u the sum of a round's local steps, "adapt-then-combine" is x <- W (x - lr u) and "combine-while-adapt", which
    can overlap communication and computation, x <- W x - lr u, so that even an exact mean leaves peers a step apart.
    Momentum stays local, or is mixed like the models (Yu et al., arXiv 1905.03817).
    """

    class Options(options.Options):
        """Options of DSGD.

        Attributes:
            order: see `DSGD`.
            mix_momentum: whether momentum is mixed as well; twice the bytes.
        """

        order: Literal["adapt-then-combine", "combine-while-adapt"] = "adapt-then-combine"
        mix_momentum: bool = False

    traits = replace(PeerSGD.traits, capacities="given")

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        self.combines_first = self.options.order == "combine-while-adapt"
        if self.combines_first:
            self.traits = replace(
                self.traits,
                overlaps=not self.options.mix_momentum,  # which local steps change before it is sent
                no_merge="peers add their own last change after it",
                whole_models_only="peers add their own change to whatever coordinates they receive",
            )
        if self.options.mix_momentum:
            if not momentum:
                raise ConfigError("algorithm.mix_momentum = True, but train.momentum is 0: set it, or leave this out")
            self.traits = replace(self.traits, uplink={"x": "mean", "momentum": "mean"})

    def with_optimizer(self, optimizer: Optimizer, keeps_moments: bool) -> Self:
        """Return a copy with another optimizer.

        Raises:
            ConfigError: momentum is mixed, which it does not keep.
        """
        if self.options.mix_momentum and (optimizer.traits.moments != ("momentum",) or not keeps_moments):
            raise ConfigError(
                "algorithm.mix_momentum = True mixes the momentum that peers keep of SGD, which train.optimizer does"
                " not: leave mix_momentum out, or take sgd with state: keep"
            )
        return super().with_optimizer(optimizer, keeps_moments)

    @property
    def averages(self) -> bool:
        """Whether models are mixed by this class, after local steps."""
        own = type(self)
        return own.end is DSGD.end and own.update is DSGD.update and not self.combines_first

    def init(self, x: Tensor) -> Arrays:
        """Return the models, with zero momentum and changes where these are needed."""
        return super().init(x) | ({"change": torch.zeros_like(x)} if self.combines_first else {})

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the models to be mixed, before or after local steps; momentum and changes that stay."""
        if self.combines_first:
            carry["change"] = carry["x"] - state["x"]
            carry["x"].copy_(state["x"])
        return {name: carry[name] for name in self.traits.uplink}, self.kept(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Take what was mixed, and add the changes that were not."""
        new = super().update(state, inbox, num_clients)
        if self.combines_first:
            new["x"] = new["x"] + state["change"]
        return new


class GossipPGA(DSGD):
    """Gossip-PGA (Chen et al., arXiv 2105.09080): DSGD whose peers average exactly every `period` rounds."""

    class Options(DSGD.Options):
        """Options of Gossip-PGA.

        Attributes:
            period: rounds from one global average to the next.
        """

        period: int = Field(default=10, ge=1)

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        if self.combines_first:
            raise ConfigError(
                f"GossipPGA with algorithm.order = {self.options.order!r} never ends in an exact average, because"
                f" {self.traits.no_merge}: leave it out"
            )
        self.traits = replace(self.traits, merge_every=self.options.period)


class QuasiGlobalMomentum(PeerSGD):
    """QG-DSGDm (Lin et al., arXiv 2102.04761, Algorithm 1): momentum from how models really moved, mixing included.

    Every local step goes along ``gradient + momentum * m``. Once models are mixed, with b = train.momentum::

        m <- mu m + (1 - mu) (x before the round - x after it) / (lr steps)

    where the paper has one step a round. A peer that took none divides by lr alone.
    """

    class Options(options.Options):
        """Options of QG-DSGDm.

        Attributes:
            mu: how slowly m follows; None: train.momentum.
        """

        mu: float | None = Field(default=None, ge=0, lt=1)

    traits = replace(
        PeerSGD.traits,
        uplink={"half": "mean"},
        scalars=("steps",),
        capacities="given",
        sgd_only="its momentum is that of SGD, told from how far models moved",
    )

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        if not momentum:
            raise ConfigError("QuasiGlobalMomentum with train.momentum = 0 is DSGD: set it, or take algorithm 'dsgd'")
        self.mu = momentum if self.options.mu is None else self.options.mu

    def init(self, x: Tensor) -> Arrays:
        """Return the models, zero momentum, and the number of local steps [n, 1]."""
        return super().init(x) | {"steps": x.new_zeros(len(x), 1)}

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model, and the momentum, which local steps do not change."""
        return {"x": state["x"].clone(), "momentum": state["momentum"]}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step of SGD along gradient and momentum."""
        grad = self.decayed(carry, grad)
        carry["x"].sub_(grad.add(carry["momentum"], alpha=self.momentum), alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the models after local steps; the number of these."""
        return {"half": carry["x"]}, {"steps": carry["x"].new_full((len(carry["x"]), 1), float(steps))}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Take the mixed models, and the momentum from how far they are from the old ones."""
        x = inbox["half"]
        velocity = (state["x"] - x) / (inbox["lr"] * state["steps"].clamp(min=1.0))
        new = {"x": x, "momentum": torch.lerp(velocity, state["momentum"], self.mu)}
        return where_held(inbox["held"], new, state)
