"""What peers do in a round, and how long it takes in simulated time: a pure function of (configuration, round)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gossamer.plan import RoundPlan
from gossamer.planning.assignment import Capacities
from gossamer.planning.base import TimedPlan
from gossamer.planning.schedule import ScheduleOptions, learning_rate
from gossamer.simulation.costs import Costs
from gossamer.simulation.devices import Ints
from gossamer.simulation.traffic import Traffic, exchanged, reduced
from gossamer.topology import Topology

MAX_CACHED_ROUNDS = 64  # rounds of a topology that repeats


class PeerPlanner:
    """Builds the plans of a round, in which all peers train and mix."""

    section = "peers"

    def __init__(
        self,
        *,
        num_rounds: int,
        num_samples: NDArray[np.int64],
        topology: Topology,
        capacities: Capacities,
        costs: Sequence[Costs],
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        lr: float,
        schedule: ScheduleOptions,
        merge_every: int | None = None,
        final_merge: bool = False,
    ) -> None:
        self.num_rounds, self.num_samples, self.topology = num_rounds, num_samples, topology
        self.capacities, self.costs = capacities, costs
        self.lr, self.schedule = lr, schedule
        self.merge_every, self.final_merge = merge_every, final_merge
        per_epoch = -(-num_samples // batch_size)
        self.steps = (per_epoch * epochs if epochs is not None else np.full(len(num_samples), steps)).astype(np.int32)
        whole, rest = np.divmod(self.steps, per_epoch)
        self.samples_trained: Ints = whole * num_samples + np.minimum(rest * batch_size, num_samples)
        remembered = min(topology.schedule.cycle or 1, MAX_CACHED_ROUNDS)  # lists of edges are long
        self._traffic = lru_cache(maxsize=remembered)(lambda round: Traffic.of(topology.mixing(round)))

    def plan(self, round: int, now: float = 0.0, phase: int = 0) -> RoundPlan:
        """Return one plan alone, see `phases`."""
        return self.phases(round, now)[phase].plan

    def phases(self, round: int, now: float) -> list[TimedPlan]:
        """Return the plan of each phase of a round, rows by variant, steps and peer, and what it costs.

        All phases mix in the same way.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took; peers are always available.
        """
        peers = np.arange(self.topology.n, dtype=np.int64)
        variant = self.capacities.variants(peers, round)
        mixing: Literal["topology", "mean"] = "mean" if self._merges(round) else "topology"
        traffic = None if mixing == "mean" else self._traffic_of(round)
        in_order = (variant[1:] == variant[:-1]).all() and (self.steps[1:] == self.steps[:-1]).all()
        order = peers if in_order else np.lexsort((peers, -self.steps, variant))
        plan = RoundPlan(
            round=round,
            phase=0,
            client=peers[order],
            weight=np.ones(len(peers)),
            steps=self.steps[order],
            variant=variant[order],
            lr=learning_rate(self.lr, self.schedule, round, self.num_rounds),
            mixing=mixing,
        )
        efforts = [costs.efforts(peers, variant, self.samples_trained, round) for costs in self.costs]
        costs = [reduced(one) if traffic is None else exchanged(one, traffic) for one in efforts]
        return [TimedPlan(replace(plan, phase=phase), one, len(peers), {}) for phase, one in enumerate(costs)]

    def _merges(self, round: int) -> bool:
        """Say whether a round ends with the mean of all peers."""
        periodic = self.merge_every is not None and (round + 1) % self.merge_every == 0
        return periodic or (self.final_merge and round + 1 == self.num_rounds)

    def _traffic_of(self, round: int) -> Traffic:
        cycle = self.topology.schedule.cycle
        return self._traffic(round if cycle is None else round % cycle)
