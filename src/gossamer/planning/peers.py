"""What peers do in a round, and how long it takes in simulated time: a pure function of (configuration, round)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gossamer.plan import RoundPlan
from gossamer.planning.assignment import Capacities
from gossamer.planning.base import TimedPlan
from gossamer.planning.schedule import ScheduleOptions, learning_rate
from gossamer.profiling.costs import Costs, Efforts, RoundCosts
from gossamer.profiling.devices import Floats, Ints
from gossamer.topology import BlockAverage, Edges, Mixing, Topology

MOST_LINKS = 1_000_000  # that are listed one by one
MOST_REMEMBERED = 64  # rounds of a topology that repeats


@dataclass(frozen=True)
class Traffic:
    """Who sends how many messages to whom in a round.

    Attributes:
        sent, received: int64 [n], messages of each peer.
        links: the single messages, with what is known of the links; None: too many, and nothing is known of them.
    """

    sent: Ints
    received: Ints
    links: Edges | None

    @classmethod
    def of(cls, mixing: Mixing) -> Traffic:
        """Return the traffic of a mixing; the links of large groups that all hear each other are not listed."""
        if isinstance(mixing, BlockAverage) and mixing.n * (mixing.size - 1) > MOST_LINKS:
            messages = np.full(mixing.n, mixing.size - 1, dtype=np.int64)
            return cls(messages, messages, None)
        links = mixing.edges()
        sent, received = (np.bincount(end, minlength=mixing.n) for end in (links.sender, links.receiver))
        return cls(sent, received, links)


class PeerPlanner:
    """Builds the plan of a round, in which all peers train and mix."""

    def __init__(
        self,
        *,
        num_rounds: int,
        num_samples: NDArray[np.int64],
        topology: Topology,
        capacities: Capacities,
        costs: Costs,
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
        remembered = min(topology.schedule.cycle or 1, MOST_REMEMBERED)  # lists of edges are long
        self._traffic = lru_cache(maxsize=remembered)(lambda round: Traffic.of(topology.mixing(round)))

    def plan(self, round: int, now: float = 0.0) -> RoundPlan:
        """Return the plan alone, see `timed_plan`."""
        return self.timed_plan(round, now).plan

    def timed_plan(self, round: int, now: float) -> TimedPlan:
        """Return the plan of a round, rows by variant, steps and peer, and what it costs.

        Args:
            round: counted from 0.
            now: simulated seconds that the rounds before took; peers are always available.
        """
        peers = np.arange(self.topology.n, dtype=np.int64)
        variant = self.capacities.variants(peers, round)
        mixing: Literal["topology", "mean"] = "mean" if self._merges(round) else "topology"
        costs = self._costs(peers, variant, round, None if mixing == "mean" else self._traffic_of(round))
        in_order = (variant[1:] == variant[:-1]).all() and (self.steps[1:] == self.steps[:-1]).all()
        order = peers if in_order else np.lexsort((peers, -self.steps, variant))
        plan = RoundPlan(
            round=round,
            phase=0,
            client=peers[order],
            site=peers[order],
            weight=np.ones(len(peers)),
            steps=self.steps[order],
            variant=variant[order],
            base=np.full(len(peers), round, dtype=np.int64),
            capacities=self.capacities.levels,
            lr=learning_rate(self.lr, self.schedule, round, self.num_rounds),
            mixing=mixing,
        )
        return TimedPlan(plan, costs, len(peers), {})

    def _merges(self, round: int) -> bool:
        """Say whether a round ends with the mean of all peers."""
        periodic = self.merge_every is not None and (round + 1) % self.merge_every == 0
        return periodic or (self.final_merge and round + 1 == self.num_rounds)

    def _traffic_of(self, round: int) -> Traffic:
        cycle = self.topology.schedule.cycle
        return self._traffic(round if cycle is None else round % cycle)

    def _costs(self, peers: Ints, variant: NDArray[np.int16], round: int, traffic: Traffic | None) -> RoundCosts:
        efforts = self.costs.efforts(peers, variant, self.samples_trained, round)
        if traffic is None:
            return reduced(efforts)
        return exchanged(efforts, traffic)


def reduced(efforts: Efforts) -> RoundCosts:
    """Return the costs of a round that ends in a ring all-reduce: every peer sends 2 (n - 1) / n of its payload."""
    share = 2 * (len(efforts.flops) - 1) / len(efforts.flops)
    up, down = efforts.upload_seconds * share, efforts.download_seconds * share
    latency = 2 * (len(efforts.flops) - 1) * float(efforts.latency_seconds.max())
    seconds = float(efforts.compute_seconds.max() + np.maximum(up, down).max()) + latency
    return _add_up(efforts, efforts.bytes_up * share, efforts.bytes_up * share, up, down, seconds)


def exchanged(efforts: Efforts, traffic: Traffic) -> RoundCosts:
    """Return the costs of a round of messages between peers.

    When a peer has finished computing, it sends to its receivers through its own uplink; a message then takes its
    link's latency, and its bytes the link's bandwidth, where the topology knows them. Whoever has received everything
    through its downlink is done, and the round lasts as long as the slowest.

    Args:
        efforts: of all n peers, their bytes, upload and download those of one message.
    """
    if traffic.links is None:  # everybody waits for the slowest, in whatever group it is
        up, down = efforts.upload_seconds * traffic.sent, efforts.download_seconds * traffic.received
        seconds = float((efforts.compute_seconds + efforts.latency_seconds + up).max() + down.max())
        sent_bytes = efforts.bytes_up * traffic.sent
        return _add_up(efforts, sent_bytes, sent_bytes, up, down, seconds)
    receiver, sender, _, latency, bandwidth = traffic.links
    up = efforts.upload_seconds * traffic.sent
    sent = efforts.compute_seconds + efforts.latency_seconds + up
    on_the_way = np.zeros(len(sender)) if latency is None else np.nan_to_num(latency)
    if bandwidth is not None:
        on_the_way = on_the_way + np.nan_to_num(efforts.bytes_up[sender] / bandwidth)
    complete = efforts.compute_seconds.copy()
    np.maximum.at(complete, receiver, sent[sender] + on_the_way)
    bytes_down: Floats = np.bincount(receiver, weights=efforts.bytes_up[sender], minlength=len(up)).astype(np.float64)
    own = np.where(efforts.bytes_up > 0, efforts.bytes_up, 1.0)
    down = bytes_down / own * efforts.download_seconds
    return _add_up(efforts, efforts.bytes_up * traffic.sent, bytes_down, up, down, float((complete + down).max()))


def _add_up(
    efforts: Efforts, bytes_up: Floats, bytes_down: Floats, up: Floats, down: Floats, seconds: float
) -> RoundCosts:
    return RoundCosts(
        bytes_up=int(bytes_up.sum()),
        bytes_down=int(bytes_down.sum()),
        client_flops=float(efforts.flops.sum()),
        simulated_seconds=seconds,
        download_seconds=float(down.sum()),
        compute_seconds=float(efforts.compute_seconds.sum()),
        upload_seconds=float(up.sum()),
    )
