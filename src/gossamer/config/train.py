"""The section ``train`` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from gossamer.config.plugins import Plugin, as_mapping
from gossamer.engines.local_steps import LocalSchedule, ParameterGroup, Precision
from gossamer.options import Options
from gossamer.planning.schedule import ScheduleOptions


class TrainedGroup(ParameterGroup):
    """What some parameters have instead of what the others have, see `ParameterGroup`.

    Attributes:
        optimizer: name and options of an optimizer in the place of ``train.optimizer``, whose ``state`` holds for it,
            too. Nothing else is taken over: neither its options, nor ``train.momentum`` and ``train.weight_decay``.
    """

    optimizer: Plugin | None = None

    @model_validator(mode="after")
    def _have_something(self) -> TrainedGroup:
        if self.lr is None and self.weight_decay is None and self.optimizer is None:
            raise ValueError(
                f"group {self.match!r} has nothing of its own: give lr, weight_decay or optimizer, or leave it out"
            )
        if self.weight_decay is not None and self.optimizer is not None and "weight_decay" in self.optimizer:
            raise ValueError(f"group {self.match!r} has two weight decays: leave out that of its optimizer")
        if self.lr == 0 and (self.weight_decay is not None or self.optimizer is not None):
            raise ValueError(f"group {self.match!r} is not trained, because its lr is 0: leave out all else")
        return self


class TrainConfig(Options):
    """Local training, for `epochs` or `steps`.

    Attributes:
        epochs: passes over a client's data in a round; 1 if neither this nor `steps` is given.
        steps: steps of a client in a round, instead of epochs.
        batch_size: samples of a batch, or what is left of an epoch: all samples of a client that has fewer.
        accumulate: batches that a step goes through one after another as if they were one, which bounds memory.
        lr: learning rate of local steps, before the schedules.
        lr_by_capacity: ``{capacity: learning rate}`` of capacities that have one of their own.
        momentum: share of its last step that a local step takes again, as `torch.optim.SGD` has it; short for that of
            ``optimizer: sgd``.
        weight_decay: that of the optimizer, for which it is short: factor of the parameters that is added to their
            gradient, or that they lose (adamw, muon).
        optimizer: name and options of the optimizer of local steps, and ``state``: "reset" (its moments begin anew in
            every round; clients, unless told otherwise) or "keep" (every participant keeps its own; peers).
        groups: parameters, by patterns of their names, with a learning rate, weight decay or optimizer of their own.
        clip_norm: largest Euclidean norm of a step's gradient, to which larger ones are scaled down; None: any.
        precision: type of numbers: float64 for all of them (parameters, samples in a batch, gradients, moments, sums,
            what is sent, kept and evaluated); bfloat16 or float16 within the loss alone (`torch.autocast`), while
            parameters and gradients stay float32.
        schedule: name and options of how the learning rate changes over rounds.
        local_schedule: name and options of how it changes over the steps of a round.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=10, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(gt=0)
    lr_by_capacity: dict[float, Annotated[float, Field(gt=0)]] = {}
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Plugin = {"name": "sgd"}
    groups: list[TrainedGroup] = []
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    schedule: Annotated[ScheduleOptions, BeforeValidator(as_mapping)] = ScheduleOptions()
    local_schedule: Annotated[LocalSchedule, BeforeValidator(as_mapping)] = LocalSchedule()

    @property
    def step_size(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.accumulate

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("epochs") is None and data.get("steps") is None:
            return {**data, "epochs": 1}
        return data

    @model_validator(mode="after")
    def _not_both(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"train.epochs = {self.epochs} contradicts train.steps = {self.steps}: give one of them, and leave the"
                " other out or unset it by train.epochs=null or train.steps=null"
            )
        return self
