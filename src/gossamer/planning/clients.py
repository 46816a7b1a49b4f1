"""Who trains what in a round: a pure function of (configuration, round, simulated time)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.plan import RoundPlan
from gossamer.planning.base import Planner, TimedPlan
from gossamer.simulation.costs import add_up
from gossamer.simulation.devices import Floats, Ints

Sampler = Callable[[int, int, int, int], NDArray[np.int64]]


def uniform(seed: int, round: int, num_clients: int, count: int) -> NDArray[np.int64]:
    """Sample `count` of `num_clients` clients without replacement; int64 [count], ascending."""
    return rng.choose(seed, "sample-clients", round, num_clients, count)


def first_to_finish(
    seconds: Floats, clients: Ints, num_expected: int, deadline_seconds: float
) -> tuple[NDArray[np.bool_], float]:
    """Take the quickest participants of those that meet the deadline; of two equally quick ones the lower number.

    Args:
        seconds: float64 [p], how long each one takes.
        clients: int64 [p].
        num_expected: how many the round waits for; at most p.
        deadline_seconds: when it ends at the latest; infinite where there is no deadline.

    Returns:
        bool [p], who is in time, and how long the round lasts: until the last of `num_expected` has finished, or, where
        they are fewer, until the deadline.
    """
    order = np.lexsort((clients, seconds))
    quickest = order[seconds[order] <= deadline_seconds][:num_expected]
    kept = np.zeros(len(clients), dtype=bool)
    kept[quickest] = True
    if len(quickest) < num_expected:
        return kept, deadline_seconds
    return kept, float(seconds[quickest].max(initial=0.0))


@dataclass(kw_only=True)
class ClientPlanner(Planner):
    """Builds the plans of a round.

    Attributes:
        drops_late: whether those are left out who are late in simulated time.
    """

    section = "clients"
    seed: int
    per_round: int
    sampler: Sampler
    weighting: str
    deadline_seconds: float = math.inf
    over_selection: float = 1.0
    drops_late: bool = True

    def phases(self, round: int, now: float) -> list[TimedPlan]:
        """Return the plan of each phase of a round, rows in canonical order, and how it goes in simulated time.

        Late participants are found here, before anybody trains, so neither wall-clock time nor workers matter. Who is
        in time takes part in the next phase, too; a deadline is for each phase.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took.

        Raises:
            ConfigError: a sampler of the user's returned something else than distinct clients, or nobody is ever
                available.
        """
        began, clients = self._choose(round, now)
        steps, variant = self.num_steps(clients), self.capacities.variants(clients, round)
        order = np.lexsort((clients, -steps, variant))
        clients, steps, variant = clients[order], steps[order], variant[order]
        num_expected = len(clients) if self.over_selection == 1 else min(self.per_round, len(clients))
        found, waited, num_unavailable = list[TimedPlan](), began - now, self._num_wanted - len(clients)
        for phase, costs in enumerate(self.costs):
            efforts = costs.efforts(clients, variant, self.samples_trained(clients, steps), round)
            left = min(num_expected, len(clients)) if self.drops_late else len(clients)
            deadline = self.deadline_seconds if self.drops_late else math.inf
            kept, seconds = first_to_finish(efforts.seconds, clients, left, deadline)
            too_slow = efforts.seconds > deadline
            late = {
                "deadline": np.sort(clients[too_slow]),
                "over-selection": np.sort(clients[~kept & ~too_slow]),
            }
            dropped = np.sort(clients[~kept])
            clients, steps, variant = clients[kept], steps[kept], variant[kept]
            plan = RoundPlan(
                round=round,
                phase=phase,
                client=clients,
                weight=self._weights(clients),
                steps=steps.astype(np.int32),
                variant=variant,
                lr=self.learning_rate(round),
                dropped=dropped,
            )
            costs_of_phase = add_up(efforts, kept, seconds, waited)
            found.append(TimedPlan(plan, costs_of_phase, num_expected, late, num_unavailable))
            waited, num_unavailable = 0.0, 0
        return found

    def _weights(self, clients: Ints) -> Floats:
        return self.num_samples[clients].astype(np.float64) if self.weighting == "samples" else np.ones(len(clients))

    def _choose(self, round: int, now: float) -> tuple[float, Ints]:
        """Return when the round begins, and who is asked to take part.

        The sampler chooses among those who are available, numbered in ascending order; where they are fewer than are
        wanted, all take part.
        """
        began, available = self.costs[0].devices.available(round, now)
        count = min(self._num_wanted, len(available))
        positions = np.asarray(self.sampler(self.seed, round, len(available), count), dtype=np.int64)
        known = positions.size > 0 and positions.min() >= 0 and positions.max() < len(available)
        if positions.ndim != 1 or not known or len(np.unique(positions)) != len(positions):
            raise ConfigError(
                f"clients.sampler returned {positions.tolist()!r:.80}: it must return one or more distinct clients"
                f" in 0..{len(available) - 1}"
            )
        return began, available[positions]

    @property
    def _num_wanted(self) -> int:
        wanted = math.ceil(self.over_selection * self.per_round * (1 - 1e-12))  # 1.12 * 25 is a little more than 28
        return min(wanted, len(self.num_samples))
