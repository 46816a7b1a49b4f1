"""What a planner returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.plan import RoundPlan
from gossamer.round_record import RoundCosts
from gossamer.simulation.devices import Ints


@dataclass(frozen=True)
class TimedPlan:
    """A round's plan and what simulated time makes of the round.

    Attributes:
        plan: who trains; those that are late are its `dropped` and never train.
        costs: what the round costs, late participants included.
        num_expected: updates that the round waits for; the quorum is a share of it.
        late: ``{reason: int64 clients, ascending}``: "deadline" for those who would not have met it, "over-selection"
            for those who would, but others were quicker.
    """

    plan: RoundPlan
    costs: RoundCosts
    num_expected: int
    late: Mapping[str, Ints]
