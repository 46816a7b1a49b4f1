"""Several optimizers of one model, each of some of its parameters, as `torch.optim` has them by parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.algorithms.optimizers import NUM_STEPS, Optimizer, OptimizerTraits
from gossamer.errors import ConfigError


class Group(NamedTuple):
    """Parameters, by a pattern of their names, and their optimizer; None: that of all others."""

    match: str
    optimizer: Optimizer | None


class Grouped(Optimizer):
    """Optimizers of groups of parameters; of several groups the first that fits holds.

    Its moments are those of all of them. An array that several have is shared: each coordinate belongs to one.

    Attributes:
        rest: optimizer of the parameters of no group.
        groups: the groups.
    """

    def __init__(self, rest: Optimizer, groups: Sequence[Group]) -> None:
        """Take the optimizers.

        Raises:
            ConfigError: two of them begin with other values of moments of one name.
        """
        self.rest, self.groups = rest, tuple(groups)
        self.options, self.weight_decay, self.lr_factor = rest.options, rest.weight_decay, rest.lr_factor
        every = self._optimizers
        self.traits = OptimizerTraits(
            moments=tuple(dict.fromkeys(name for one in every for name in one.traits.moments)),
            counts_steps=any(one.traits.counts_steps for one in every),
            decouples_weight_decay=rest.traits.decouples_weight_decay,
        )
        probe = torch.tensor([[0.0, 1.0, -2.0]])
        found = self.init(probe)
        for one in every:
            for name, value in one.init(probe).items():
                if not torch.equal(value, found[name]):
                    raise ConfigError(
                        f"train.groups has two optimizers that begin with other values of {name!r}: give one of them"
                        " the options of the other"
                    )

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [self.rest, *(group.optimizer for group in self.groups if group.optimizer is not None)]

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """Return the moments of all optimizers."""
        found = dict[str, Tensor]()
        for one in self._optimizers:
            found = one.init(x) | found
        counts = (NUM_STEPS,) if self.traits.counts_steps else ()
        return {name: found[name] for name in (*self.traits.moments, *counts)}

    def of_parameter(self, name: str, shape: tuple[int, ...]) -> Optimizer:
        """Return the optimizer of the parameter's group."""
        group = next((group for group in self.groups if fnmatchcase(name, group.match)), None)
        own = self.rest if group is None or group.optimizer is None else group.optimizer
        return own.of_parameter(name, shape)

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Take a step of a parameter of no group."""
        self.rest.step(x, grad, moments, lr)
