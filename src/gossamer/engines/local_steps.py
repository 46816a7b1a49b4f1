"""How the local steps of a participant are taken: learning rates, groups of parameters, clipping, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from gossamer.algorithms.base import Algorithm
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.submodel import Layout
from gossamer.workloads.holdings import Holding
from gossamer.workloads.parts import matching

Precision = Literal["float32", "bfloat16", "float16", "float64"]
LOSS_SCALE = 1024.0  # by which losses in float16 are multiplied, so that small gradients are not 0


class LocalSchedule(Options):
    """Learning rate over the steps of a round, as a factor of that of the round.

    Attributes:
        name: constant; or "linear" or "cosine", from 1 at the first step towards 0 after the participant's last.
        warmup_steps: number of steps over which it rises linearly to its full height.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)

    @property
    def depends_on_length(self) -> bool:
        """Whether participants that take more steps have other factors."""
        return self.name != "constant"

    @cached_property
    def is_flat(self) -> bool:
        """Whether all factors are 1."""
        return self.name == "constant" and self.warmup_steps <= 1

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor of a step, counted from 0, of `num_steps`."""
        found = 1.0
        if self.name == "linear":
            found = 1 - step / num_steps
        elif self.name == "cosine":
            found = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        return found * (step + 1) / self.warmup_steps if step < self.warmup_steps else found


CONSTANT = LocalSchedule()


class ParameterGroup(Options):
    """What some parameters have instead of what the others have.

    Attributes:
        match: pattern of their names, with ``*``, ``?`` and ``[...]``; of several groups the first that fits holds.
        lr: learning rate, in the place of ``train.lr``; schedules act on it, too. 0: they stay as they are.
        weight_decay: in the place of the optimizer's.
    """

    match: str
    lr: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _have_something(self) -> ParameterGroup:
        if self.lr is None and self.weight_decay is None:
            raise ValueError(f"group {self.match!r} has nothing of its own: give lr or weight_decay, or leave it out")
        return self


class Stepper(NamedTuple):
    """Who takes the steps of a parameter, and by which factor of the learning rate."""

    algorithm: Algorithm
    lr_factor: float


@dataclass(frozen=True)
class LocalSteps:
    """How local steps of one capacity are taken, whatever the optimizer.

    Attributes:
        clip_norm: largest Euclidean norm of a step's gradient, or None.
        lr: the learning rate that `groups` and `capacity_lr` replace.
        capacity_lr: learning rate of the capacity; None: `lr`.
        groups: see `ParameterGroup`.
        part_size: samples of a batch that a gradient is computed of at a time; None: all of a step's.
        precision: type of what is computed within the loss, where it is a lower one than that of parameters, which
            stay as they are.
        schedule: see `LocalSchedule`.
    """

    clip_norm: float | None = None
    lr: float = 1.0
    capacity_lr: float | None = None
    groups: tuple[ParameterGroup, ...] = ()
    part_size: int | None = None
    precision: Precision = "float32"
    schedule: LocalSchedule = CONSTANT

    def rate(self, lr: float) -> float:
        """Return the capacity's learning rate in a round of which `lr` is that of all others."""
        return lr if self.capacity_lr is None else lr * (self.capacity_lr / self.lr)

    @property
    def leaves_products(self) -> bool:
        """Whether a gradient that is left in two factors may be added to its parameter as it is."""
        others = self.groups or self.part_size is not None or self.is_mixed
        return self.clip_norm is None and not others and self.schedule.is_flat

    @cached_property
    def is_mixed(self) -> bool:
        """Whether the loss is computed in a lower precision than that of parameters."""
        return self.precision in ("bfloat16", "float16")

    @cached_property
    def loss_scale(self) -> float:
        """By what a loss is multiplied before it is differentiated."""
        return LOSS_SCALE if self.precision == "float16" else 1.0

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """Return the context that a loss is computed in where it `is_mixed`."""
        return torch.autocast(torch.device(device).type, torch_dtype(self.precision))

    def steppers(self, algorithm: Algorithm, layout: Layout) -> dict[str, Stepper]:
        """Return who takes the steps of each parameter of a (sub-)model."""
        found = {}
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            group = next((group for group in self.groups if fnmatchcase(name, group.match)), None)
            decay = None if group is None else group.weight_decay
            factor = 1.0 if group is None or group.lr is None else group.lr / self.lr
            found[name] = Stepper(algorithm.of_parameter(name, shape, decay), factor)
        return found


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return torch's type of a precision."""
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }[precision]


def require_matches(groups: Sequence[ParameterGroup], layout: Layout, holdings: Sequence[Holding] = ()) -> None:
    """Refuse groups that no parameter belongs to, and such as leave all that somebody holds as it is.

    Raises:
        ConfigError: there is one, or somebody would train nothing.
    """
    names = layout.names
    left = list(names)
    for number, group in enumerate(groups):
        matched = matching(f"train.groups[{number}].match", [group.match], names, "trained parameter")
        taken = [name for name in left if name in matched]
        if not taken:
            raise ConfigError(
                f"train.groups[{number}].match = {group.match!r} has parameters of groups before it only: put it first,"
                " or leave it out"
            )
        left = [name for name in left if name not in taken]
    first = {name: next((group for group in groups if fnmatchcase(name, group.match)), None) for name in names}
    trained = {name for name, group in first.items() if group is None or group.lr != 0}
    held = {f" that clients of {one.name} hold": layout.of_modules(one.modules).names for one in holdings}
    for whose, own in {"": names, **held}.items():
        if not trained & {*own}:
            raise ConfigError(
                f"train.groups have the learning rate 0 for all parameters{whose}, so that nothing would be trained:"
                " give some of them another one, or leave some out"
            )


def capacity_rates(lr_by_capacity: Mapping[float, float], capacities: list[float]) -> dict[float, float]:
    """Return the learning rates of capacities that have their own.

    Raises:
        ConfigError: a capacity is not one of the run's.
    """
    for capacity in lr_by_capacity:
        if capacity not in capacities:
            raise ConfigError(
                f"train.lr_by_capacity names capacity {capacity}, but the run has {sorted(capacities)}: name these"
            )
    return dict(lr_by_capacity)
