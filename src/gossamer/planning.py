"""Who trains what in a round: a pure function of (configuration, round)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.records import RoundPlan

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
    """The capacity level of every client: fixed once, or drawn anew each round."""

    def __init__(
        self, levels: Sequence[float], shares: Sequence[float], assignment: str, num_clients: int, seed: int
    ) -> None:
        self.levels, self._shares, self._seed = tuple(levels), np.asarray(shares) / np.sum(shares), seed
        self._fixed: NDArray[np.int16] | None = None
        if assignment == "fixed":
            variants = np.repeat(np.arange(len(levels), dtype=np.int16), apportion(shares, num_clients))
            order = rng.generator(seed, "assign-capacities").permutation(num_clients)
            self._fixed = np.empty(num_clients, dtype=np.int16)
            self._fixed[order] = variants

    def variants(self, clients: NDArray[np.int64], round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the index into `levels` of each client in a round."""
        if self._fixed is not None:
            return self._fixed[clients]
        words = rng.bits(self._seed, "draw-capacity", round, 0, clients, 1)[:, 0]
        uniform_draw = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.searchsorted(np.cumsum(self._shares)[:-1], uniform_draw, side="right").astype(np.int16)


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
        weighting: str,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        lr: float,
        schedule: ScheduleOptions,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ConfigError(f"train.epochs = {epochs!r} and train.steps = {steps!r}: give exactly one of them")
        self.seed, self.num_rounds, self.per_round, self.sampler = seed, num_rounds, per_round, sampler
        self.num_samples, self.capacities, self.weighting = num_samples, capacities, weighting
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.lr, self.schedule = lr, schedule

    def plan(self, round: int) -> RoundPlan:
        """Return the plan of a round (counted from 0), rows in canonical order.

        Raises:
            ConfigError: a sampler of the user's returned something else than distinct registered clients.
        """
        clients = np.asarray(self.sampler(self.seed, round, len(self.num_samples), self.per_round), dtype=np.int64)
        known = clients.size > 0 and clients.min() >= 0 and clients.max() < len(self.num_samples)
        if clients.ndim != 1 or not known or len(np.unique(clients)) != len(clients):
            raise ConfigError(
                f"clients.sampler returned {clients.tolist()!r:.80}: it must return one or more distinct clients"
                f" in 0..{len(self.num_samples) - 1}"
            )
        samples = self.num_samples[clients]
        steps = self._steps(samples)
        variant = self.capacities.variants(clients, round)
        order = np.lexsort((clients, -steps, variant))
        weight = samples.astype(np.float64) if self.weighting == "samples" else np.ones(len(clients))
        return RoundPlan(
            round=round,
            phase=0,
            client=clients[order],
            site=np.zeros(len(clients), dtype=np.int64),
            weight=weight[order],
            steps=steps[order].astype(np.int32),
            variant=variant[order],
            base=np.full(len(clients), round, dtype=np.int64),
            capacities=self.capacities.levels,
            lr=learning_rate(self.lr, self.schedule, round, self.num_rounds),
        )

    def samples_trained(self, plan: RoundPlan) -> NDArray[np.int64]:
        """Return int64 [p]: samples that each participant's local steps go through."""
        samples = self.num_samples[plan.client]
        per_epoch = -(-samples // self.batch_size)
        whole, rest = np.divmod(plan.steps.astype(np.int64), per_epoch)
        trained: NDArray[np.int64] = whole * samples + np.minimum(rest * self.batch_size, samples)
        return trained

    def _steps(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.steps is not None:
            return np.full(len(samples), self.steps, dtype=np.int64)
        assert self.epochs is not None
        return self.epochs * -(-samples // self.batch_size)
