"""Schedules of the learning rate."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gossamer.options import Options

FOLLOW_END = ("cosine",)  # schedules that go by the number of rounds


class ScheduleOptions(Options):
    """Learning rate over rounds.

    Attributes:
        name: "constant", "multistep" (times `factor` from each milestone on) or "cosine" (down to 0).
        milestones: rounds of a multistep schedule, counted from 0.
        factor: factor of a multistep schedule.
        warmup_rounds: first rounds, in which the rate rises linearly.
    """

    name: Literal["constant", "multistep", "cosine"] = "constant"
    milestones: list[int] = []
    factor: float = Field(default=0.1, gt=0)
    warmup_rounds: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _read_by_multistep(self) -> ScheduleOptions:
        if self.milestones and self.name != "multistep":
            raise ValueError(
                f"schedule {self.name!r} does not read milestones {self.milestones}: set name to multistep, or leave"
                " them out"
            )
        return self


def learning_rate(base: float, schedule: ScheduleOptions, round: int, num_rounds: int) -> float:
    """Return the local learning rate of a round (counted from 0)."""
    rate = base
    if schedule.name == "multistep":
        rate *= schedule.factor ** sum(round >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * round / num_rounds))
    if round < schedule.warmup_rounds:
        rate *= (round + 1) / schedule.warmup_rounds
    return rate
