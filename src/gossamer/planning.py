"""Who trains what in a round: a pure function of (configuration, round, simulated time)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.plan import RoundPlan
from gossamer.profiling.costs import Costs, RoundCosts, add_up
from gossamer.profiling.devices import Devices, DeviceShare, Floats, Ints, uniform_draws

Sampler = Callable[[int, int, int, int], NDArray[np.int64]]


class ScheduleOptions(Options):
    """Learning rate over rounds: constant, multistep (times `factor` at each milestone) or cosine; linear warm-up."""

    name: Literal["constant", "multistep", "cosine"] = "constant"
    milestones: list[int] = []
    factor: float = Field(default=0.1, gt=0)
    warmup_rounds: int = Field(default=0, ge=0)


def uniform(seed: int, round: int, num_clients: int, count: int) -> NDArray[np.int64]:
    """Sample `count` of `num_clients` clients without replacement; int64 [count], ascending."""
    return rng.choose(seed, "sample-clients", round, num_clients, count)


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


def apportion(shares: Sequence[float], count: int) -> NDArray[np.int64]:
    """Split `count` clients in proportion to `shares` by largest remainders; int64, sums to `count`."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * count
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    for index in np.argsort(whole - exact, kind="stable")[: count - int(whole.sum())]:
        whole[index] += 1
    return whole


class Capacities:
    """The capacity level of every client: fixed once, or drawn anew each round.

    Attributes:
        levels: the levels.
        is_fixed: whether a client's level never changes.
    """

    def __init__(
        self,
        levels: Sequence[float],
        shares: Sequence[float],
        assignment: str,
        num_clients: int,
        seed: int,
        purpose: str = "assign-capacities",
    ) -> None:
        """Assign levels.

        Args:
            shares: relative number of clients at each level.
            assignment: "fixed" (largest remainders, shuffled) or "dynamic".
            purpose: of the shuffle; two assignments with the same one and the same shares agree.
        """
        self.levels, self._shares, self._seed = tuple(levels), np.asarray(shares) / np.sum(shares), seed
        self.is_fixed = assignment == "fixed"
        self._fixed = np.empty(num_clients, dtype=np.int16)
        if self.is_fixed:
            variants = np.repeat(np.arange(len(levels), dtype=np.int16), apportion(shares, num_clients))
            self._fixed[rng.generator(seed, purpose).permutation(num_clients)] = variants

    def variants(self, clients: NDArray[np.int64], round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the index into `levels` of each client in a round."""
        if self.is_fixed:
            return self._fixed[clients]
        drawn = uniform_draws(self._seed, "draw-capacity", round, clients)
        return np.searchsorted(np.cumsum(self._shares)[:-1], drawn, side="right").astype(np.int16)


def assign_devices(entries: Sequence[DeviceShare], assignment: str, num_clients: int, seed: int) -> Devices:
    """Give every client a device: by shares, or as capacities are assigned where the entries name them.

    Args:
        entries: those with capacities have the shares of these, see `settle`.
        assignment: how capacities are assigned, "fixed" or "dynamic".
    """
    if entries[0].capacity is not None:
        entries = sorted(entries, key=lambda entry: entry.capacity or 0.0)
        levels, purpose = [entry.capacity or 0.0 for entry in entries], "assign-capacities"
    else:
        levels, purpose, assignment = [float(index) for index in range(len(entries))], "assign-devices", "fixed"
    shares = [1.0 if entry.share is None else entry.share for entry in entries]
    profiles = [entry.profile for entry in entries]
    if len(profiles) == 1:
        return Devices(profiles, None, num_clients, seed)
    return Devices(profiles, Capacities(levels, shares, assignment, num_clients, seed, purpose), num_clients, seed)


def devices_of_capacities(devices: Devices, capacities: Capacities, num_clients: int) -> list[tuple[int, int]]:
    """Return the pairs (device, capacity), as indices, that some client may have."""
    everybody, assignment = np.arange(num_clients, dtype=np.int64), devices.assignment
    both_fixed = capacities.is_fixed and getattr(assignment, "is_fixed", True)
    if both_fixed:
        together = np.stack([devices.of(everybody, 0), capacities.variants(everybody, 0)], axis=1)
        return [(int(device), int(variant)) for device, variant in np.unique(together, axis=0)]
    if getattr(assignment, "levels", None) == capacities.levels:  # drawn anew each round, but together
        return [(level, level) for level in range(len(capacities.levels))]
    return [(device, level) for device in range(len(devices.profiles)) for level in range(len(capacities.levels))]


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


class Planner:
    """Builds the plan of a round."""

    def __init__(
        self,
        *,
        seed: int,
        num_rounds: int,
        num_samples: NDArray[np.int64],
        per_round: int,
        sampler: Sampler,
        capacities: Capacities,
        costs: Costs,
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

    def plan(self, round: int, now: float = 0.0) -> RoundPlan:
        """Return the plan alone, see `timed_plan`."""
        return self.timed_plan(round, now).plan

    def timed_plan(self, round: int, now: float) -> TimedPlan:
        """Return the plan of a round, rows in canonical order, and how it goes in simulated time.

        Late participants are found here, before anybody trains, so neither wall-clock time nor workers matter.

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
        efforts = self.costs.efforts(clients, variant, self._samples(clients, steps), round)
        num_expected = len(clients) if self.over_selection == 1 else min(self.per_round, len(clients))
        kept, round_seconds = first_to_finish(efforts.seconds, clients, num_expected, self.deadline_seconds)
        weight = self.num_samples[clients].astype(np.float64) if self.weighting == "samples" else np.ones(len(clients))
        too_slow = efforts.seconds > self.deadline_seconds
        plan = RoundPlan(
            round=round,
            phase=0,
            client=clients[kept],
            site=np.zeros(int(kept.sum()), dtype=np.int64),
            weight=weight[kept],
            steps=steps[kept].astype(np.int32),
            variant=variant[kept],
            base=np.full(int(kept.sum()), round, dtype=np.int64),
            capacities=self.capacities.levels,
            lr=learning_rate(self.lr, self.schedule, round, self.num_rounds),
            dropped=np.sort(clients[~kept]),
        )
        late = {
            "deadline": np.sort(clients[too_slow]),
            "over-selection": np.sort(clients[~kept & ~too_slow]),
        }
        return TimedPlan(plan, add_up(efforts, kept, round_seconds, began - now), num_expected, late)

    def samples_trained(self, plan: RoundPlan) -> NDArray[np.int64]:
        """Return int64 [p]: samples that each participant's local steps go through."""
        return self._samples(plan.client, plan.steps.astype(np.int64))

    def _choose(self, round: int, now: float) -> tuple[float, Ints]:
        """Return when the round begins, and who is asked to take part.

        The sampler chooses among those who are available, numbered in ascending order; where they are fewer than are
        wanted, all take part.
        """
        began, available = self.costs.devices.available(round, now)
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
