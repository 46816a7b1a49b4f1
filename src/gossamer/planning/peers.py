"""What peers do in a round, and how long it takes in simulated time: a pure function of (configuration, round)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from gossamer.plan import RoundPlan
from gossamer.planning.base import Planner, TimedPlan
from gossamer.simulation.traffic import Traffic, averaged, exchanged
from gossamer.topology import Edges, Topology

MAX_CACHED_ROUNDS = 64  # rounds of a topology that repeats


@dataclass(kw_only=True)
class PeerPlanner(Planner):
    """Builds the plans of a round, in which all peers train and mix.

    Attributes:
        overlaps: whether messages travel while peers train, in each phase.
        own: number of the only peer that plans are for, though costs are those of all; None: they are for all.
    """

    section = "peers"
    topology: Topology
    merge_every: int | None = None
    final_merge: bool = False
    overlaps: Sequence[bool] = (False,)
    own: int | None = None

    def __post_init__(self) -> None:
        self.peers = np.arange(self.topology.n, dtype=np.int64)
        steps = self.num_steps(self.peers)
        self.steps_of_peers, self.trained = steps.astype(np.int32), self.samples_trained(self.peers, steps)
        remembered = min(self.topology.schedule.cycle or 1, MAX_CACHED_ROUNDS)  # lists of edges are long
        self._traffic = lru_cache(maxsize=remembered)(lambda round: Traffic.of(self.topology.mixing(round)))

    def phases(self, round: int, now: float) -> list[TimedPlan]:
        """Return the plan of each phase of a round, rows by variant, steps and peer, and what it costs.

        All phases mix in the same way.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took; peers are always available.
        """
        peers, steps = self.peers, self.steps_of_peers
        variant = self.capacities.variants(peers, round)
        mixing: Literal["topology", "mean"] = "mean" if self._merges(round) else "topology"
        in_order = (variant[1:] == variant[:-1]).all() and (steps[1:] == steps[:-1]).all()
        order = peers if in_order else np.lexsort((peers, -steps, variant))
        if self.own is not None:
            order = order[order == self.own]
        plan = RoundPlan(
            round=round,
            phase=0,
            client=peers[order],
            weight=np.ones(len(order)),
            steps=steps[order],
            variant=variant[order],
            lr=self.learning_rate(round),
            variants=variant if self.own is not None else variant[:0],
            mixing=mixing,
        )
        efforts = [costs.efforts(peers, variant, self.trained, round) for costs in self.costs]
        costs = [
            averaged(one, self._links_of(round), overlaps)
            if mixing == "mean"
            else exchanged(one, self._traffic_of(round), overlaps)
            for one, overlaps in zip(efforts, self.overlaps, strict=True)
        ]
        return [TimedPlan(replace(plan, phase=phase), one, len(order), {}) for phase, one in enumerate(costs)]

    def _merges(self, round: int) -> bool:
        """Say whether a round ends with the mean of all peers."""
        periodic = self.merge_every is not None and (round + 1) % self.merge_every == 0
        return periodic or (self.final_merge and round + 1 == self.num_rounds)

    def _links_of(self, round: int) -> Edges | None:
        mixing = self.topology.mixing(round)
        return mixing.edges() if mixing.has_links else None

    def _traffic_of(self, round: int) -> Traffic:
        cycle = self.topology.schedule.cycle
        return self._traffic(round if cycle is None else round % cycle)
