"""What a planner is, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gossamer.plan import RoundPlan
from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Costs
from gossamer.simulation.devices import Ints


@dataclass(frozen=True)
class TimedPlan:
    """The plan of a phase and what simulated time makes of it.

    Attributes:
        plan: who trains; those that are late are its `dropped` and never train.
        costs: what the phase costs, late participants included.
        num_expected: updates that it waits for; the quorum is a share of it.
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
        costs: what participants cost in each phase of a round.
    """

    section: str
    costs: Sequence[Costs]

    def phases(self, round: int, now: float) -> list[TimedPlan]:
        """Return the plans of a round's phases, in order.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took.
        """
        ...

    def plan(self, round: int, now: float = 0.0, phase: int = 0) -> RoundPlan:
        """Return one plan alone."""
        ...
