"""What a planner is, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gossamer.plan import RoundPlan
from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Costs
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


class Planner(Protocol):
    """Decides who trains what: a pure function of (configuration, round, simulated time).

    Attributes:
        section: of the configuration in which its population stands.
        costs: what participants cost.
    """

    section: str
    costs: Costs

    def timed_plan(self, round: int, now: float) -> TimedPlan:
        """Return the plan of a round, counted from 0; `now`: simulated seconds that the rounds before took."""
        ...
