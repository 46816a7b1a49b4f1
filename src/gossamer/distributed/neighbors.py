"""From whom a process hears with which weights, and to whom it sends: its row of a mixing, or weights of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gossamer.errors import ConfigError
from gossamer.topology import Joint, Mixing, Topology

TOLERANCE = 1e-6  # of sums of weights


@dataclass(frozen=True)
class Neighbors:
    """What one process does in an exchange.

    Tensors are seen as [rows, width], of one row, or of the rows x and y of a joint mixing, one of which is sent.

    Attributes:
        self_weights: of its own rows, in each of its new rows.
        sources: ``{rank: weights}`` of what it hears, in each of its new rows, by ascending rank.
        destinations: ``{rank: factor}``, by which what it sends is multiplied.
        sent_row: number of the row that is sent.
    """

    self_weights: tuple[float, ...]
    sources: Mapping[int, tuple[float, ...]]
    destinations: Mapping[int, float]
    sent_row: int = 0


ALONE = Neighbors((1.0,), {}, {})  # what a process does that has no neighbours


@lru_cache(maxsize=256)
def of_mixing(mixing: Mixing, rank: int) -> Neighbors:
    """Return what a process does in a mixing."""
    edges = mixing.edges()
    mine, others = edges.receiver == rank, edges.receiver[edges.sender == rank]
    sources = zip(edges.sender[mine].tolist(), edges.weight[mine].tolist(), strict=True)
    destinations = dict.fromkeys(np.sort(others).tolist(), 1.0)
    if isinstance(mixing, Joint):
        weights = mixing.message_weights
        own = tuple(1.0 - weight for weight in weights)
        return Neighbors(own, {sender: weights for sender, _ in sources}, destinations, 1 - mixing.bit)
    own = (float(mixing.self_weights()[rank]),)
    return Neighbors(own, {sender: (weight,) for sender, weight in sources}, destinations)


def of_round(topology: Topology, round: int | None, rank: int) -> Neighbors:
    """Return what a process does in a round of a topology.

    Raises:
        ConfigError: the round is not given, but rounds differ.
    """
    if round is None and topology.schedule.cycle != 1:
        raise ConfigError(
            f"topology {topology.name!r} changes from round to round: give round=0, 1, 2, ..., the same on all ranks"
        )
    return of_mixing(topology.mixing(round or 0), rank)


def of_weights(
    rank: int,
    size: int,
    self_weight: float,
    src_weights: Mapping[int, float],
    dst_weights: Sequence[int] | Mapping[int, float],
) -> Neighbors:
    """Return what a process does by weights of one call.

    Raises:
        ConfigError: a rank does not exist or is the process's own, or weights do not sum to 1.
    """
    for name, ranks in (("src_weights", src_weights), ("dst_weights", dst_weights)):
        wrong = [other for other in ranks if not 0 <= other < size or other == rank]
        if wrong:
            raise ConfigError(f"rank {rank}: {name} names {wrong[0]}: give ranks of others, 0 to {size - 1}")
    _check_sum(rank, self_weight, src_weights, dst_weights)
    factors = dst_weights if isinstance(dst_weights, Mapping) else dict.fromkeys(dst_weights, 1.0)
    sources = {other: (float(src_weights[other]),) for other in sorted(src_weights)}
    return Neighbors((float(self_weight),), sources, {other: float(factors[other]) for other in sorted(factors)})


def _check_sum(
    rank: int,
    self_weight: float,
    src_weights: Mapping[int, float],
    dst_weights: Sequence[int] | Mapping[int, float],
) -> None:
    """Check what one process can know: that the weights of what it hears sum to 1, or those of what it sends.

    Where senders scale, as in push-sum, and receivers do not, it is what it sends that must; where both do, neither.
    """
    name, weights = "src_weights", src_weights
    if isinstance(dst_weights, Mapping):
        if any(weight != 1.0 for weight in src_weights.values()):
            return
        name, weights = "dst_weights", dst_weights
    total = self_weight + sum(weights.values())
    if not abs(total - 1.0) <= TOLERANCE:
        raise ConfigError(
            f"rank {rank}: self_weight {self_weight:g} and {name} {dict(weights)} sum to {total:.6g}, not 1: correct"
            " them"
        )
