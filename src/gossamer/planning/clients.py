"""Who trains what in a round: a pure function of (configuration, round, simulated time)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.plan import RoundPlan
from gossamer.planning.assignment import Capacities
from gossamer.planning.base import TimedPlan
from gossamer.planning.schedule import ScheduleOptions, learning_rate
from gossamer.simulation.costs import Costs, add_up
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


class ClientPlanner:
    """Builds the plans of a round."""

    section = "clients"

    def __init__(
        self,
        *,
        seed: int,
        num_rounds: int,
        num_samples: NDArray[np.int64],
        per_round: int,
        sampler: Sampler,
        capacities: Capacities,
        costs: Sequence[Costs],
        weighting: str,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        lr: float,
        schedule: ScheduleOptions,
        deadline_seconds: float | None = None,
        over_selection: float = 1.0,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ConfigError(f"train.epochs = {epochs!r} and train.steps = {steps!r}: give exactly one of them")
        self.seed, self.num_rounds, self.per_round, self.sampler = seed, num_rounds, per_round, sampler
        self.num_samples, self.capacities, self.weighting = num_samples, capacities, weighting
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.lr, self.schedule, self.costs = lr, schedule, costs
        self.deadline_seconds = math.inf if deadline_seconds is None else deadline_seconds
        self.over_selection = over_selection

    def plan(self, round: int, now: float = 0.0, phase: int = 0) -> RoundPlan:
        """Return one plan alone, see `phases`."""
        return self.phases(round, now)[phase].plan

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
        steps, variant = self._steps(self.num_samples[clients]), self.capacities.variants(clients, round)
        order = np.lexsort((clients, -steps, variant))
        clients, steps, variant = clients[order], steps[order], variant[order]
        num_expected = len(clients) if self.over_selection == 1 else min(self.per_round, len(clients))
        found, waited = list[TimedPlan](), began - now
        for phase, costs in enumerate(self.costs):
            efforts = costs.efforts(clients, variant, self._samples(clients, steps), round)
            left = min(num_expected, len(clients))
            kept, seconds = first_to_finish(efforts.seconds, clients, left, self.deadline_seconds)
            too_slow = efforts.seconds > self.deadline_seconds
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
                lr=learning_rate(self.lr, self.schedule, round, self.num_rounds),
                dropped=dropped,
            )
            found.append(TimedPlan(plan, add_up(efforts, kept, seconds, waited), num_expected, late))
            waited = 0.0
        return found

    def _weights(self, clients: Ints) -> Floats:
        return self.num_samples[clients].astype(np.float64) if self.weighting == "samples" else np.ones(len(clients))

    def samples_trained(self, plan: RoundPlan) -> NDArray[np.int64]:
        """Return int64 [p]: samples that each participant's local steps go through."""
        return self._samples(plan.client, plan.steps.astype(np.int64))

    def _choose(self, round: int, now: float) -> tuple[float, Ints]:
        """Return when the round begins, and who is asked to take part.

        The sampler chooses among those who are available, numbered in ascending order; where they are fewer than are
        wanted, all take part.
        """
        began, available = self.costs[0].devices.available(round, now)
        wanted = math.ceil(self.over_selection * self.per_round * (1 - 1e-12))  # 1.12 * 25 is a little more than 28
        count = min(wanted, len(available))
        places = np.asarray(self.sampler(self.seed, round, len(available), count), dtype=np.int64)
        known = places.size > 0 and places.min() >= 0 and places.max() < len(available)
        if places.ndim != 1 or not known or len(np.unique(places)) != len(places):
            raise ConfigError(
                f"clients.sampler returned {places.tolist()!r:.80}: it must return one or more distinct clients"
                f" in 0..{len(available) - 1}"
            )
        return began, available[places]

    def _samples(self, clients: Ints, steps: Ints) -> Ints:
        samples = self.num_samples[clients]
        per_epoch = -(-samples // self.batch_size)
        whole, rest = np.divmod(steps, per_epoch)
        trained: NDArray[np.int64] = whole * samples + np.minimum(rest * self.batch_size, samples)
        return trained

    def _steps(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.steps is not None:
            return np.full(len(samples), self.steps, dtype=np.int64)
        assert self.epochs is not None
        return self.epochs * -(-samples // self.batch_size)
