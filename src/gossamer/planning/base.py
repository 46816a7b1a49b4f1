"""What planners of clients and of peers have in common, and what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gossamer.plan import RoundPlan
from gossamer.planning.assignment import Capacities
from gossamer.planning.schedule import ScheduleOptions, learning_rate
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
        num_unavailable: how many fewer were chosen than wanted, because the others were not available.
    """

    plan: RoundPlan
    costs: RoundCosts
    num_expected: int
    late: Mapping[str, Ints]
    num_unavailable: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """``{reason: number of those who were wanted, but will not train}``."""
        return {reason: len(clients) for reason, clients in self.late.items()} | {"availability": self.num_unavailable}


@dataclass(kw_only=True)
class Planner(ABC):
    """Decides who trains what: a pure function of (configuration, round, simulated time).

    Attributes:
        section: section of the configuration that describes the participants.
        num_samples: int64 [n], training samples of each participant.
        capacities: capacity of each participant.
        costs: costs of participants in each phase of a round.
        epochs, steps: local work of a round; one of them is None.
        lr: learning rate, which `schedule` changes from round to round.
    """

    section: ClassVar[str]
    num_rounds: int
    num_samples: Ints
    capacities: Capacities
    costs: Sequence[Costs]
    epochs: int | None
    steps: int | None
    batch_size: int
    lr: float
    schedule: ScheduleOptions

    @abstractmethod
    def phases(self, round: int, now: float) -> list[TimedPlan]:
        """Return the plans of a round's phases, in order.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took.
        """

    def plan(self, round: int, now: float = 0.0, phase: int = 0) -> RoundPlan:
        """Return one plan alone."""
        return self.phases(round, now)[phase].plan

    def own_models(self, round: int, count: int, num_steps: int = 0) -> RoundPlan:
        """Return a plan of evenly spaced participants whose own models are evaluated, after `num_steps` steps, too.

        Its phase follows those of the round, so that its random numbers are others.
        """
        n = len(self.num_samples)
        count = min(count, n)
        chosen = np.arange(count, dtype=np.int64) * n // max(count, 1)
        variant = self.capacities.variants(chosen, round)
        order = np.argsort(variant, kind="stable")
        return RoundPlan(
            round=round,
            phase=len(self.costs),
            client=chosen[order],
            weight=np.ones(count),
            steps=np.full(count, num_steps, dtype=np.int32),
            variant=variant[order],
            lr=self.learning_rate(round),
        )

    def learning_rate(self, round: int) -> float:
        """Return the local learning rate of a round."""
        return learning_rate(self.lr, self.schedule, round, self.num_rounds)

    def num_steps(self, participants: Ints) -> Ints:
        """Return int64 [p], local steps of each participant."""
        if self.epochs is None:
            return np.full(len(participants), self.steps, dtype=np.int64)
        return self.epochs * self._per_epoch(participants)

    def samples_trained(self, participants: Ints, steps: Ints) -> Ints:
        """Return int64 [p], samples that each participant's local steps go through."""
        samples = self.num_samples[participants]
        whole, rest = np.divmod(steps, self._per_epoch(participants))
        trained: Ints = whole * samples + np.minimum(rest * self.batch_size, samples)
        return trained

    def _per_epoch(self, participants: Ints) -> Ints:
        return -(-self.num_samples[participants] // self.batch_size)
