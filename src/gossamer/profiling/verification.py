"""Compares what moving a stage was predicted to change with rounds in which a side-car did it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from gossamer.profiling.graphs import graph_of
from gossamer.profiling.offload import Offload, move
from gossamer.profiling.replay import Interval, bootstrap_change, replay
from gossamer.profiling.trace import Round

MAX_DELAY = 0.02  # share of a round for which a thread may have waited for a processor
MIN_ROUNDS = 4  # of either kind, or nothing can be told
TOLERANCE = 0.03  # of a round, by which prediction and measurement may differ where their intervals do not meet
NUM_RESAMPLES = 1000
AGREES, DIFFERS, CANNOT_TELL = "agrees", "differs", "cannot tell"


@dataclass(frozen=True)
class Side:
    """Rounds of one kind, with or without a side-car.

    Attributes:
        seconds: of the rounds that count.
        num_rejected: of those in which a thread waited for a processor for more than `MAX_DELAY` of it.
        delay: mean of the largest such share, of all rounds.
    """

    seconds: list[float]
    num_rejected: int
    delay: float


@dataclass(frozen=True)
class Verification:
    """A prediction and a measurement, as shares of the round without a side-car.

    Attributes:
        predicted, measured: change of the round, with its interval; None: too few rounds count.
        plain, moved: the rounds without and with a side-car.
        same_bits: whether all runs ended with the same parameters.
    """

    predicted: Interval | None
    measured: Interval | None
    plain: Side
    moved: Side
    same_bits: bool

    @property
    def error(self) -> float | None:
        """By how much the predicted change is above the measured one, as a share of the round."""
        return None if self.predicted is None or self.measured is None else self.predicted.mean - self.measured.mean

    @property
    def outcome(self) -> str:
        """Whether both agree; "cannot tell" where the noise is larger than either change."""
        if self.predicted is None or self.measured is None or self.error is None:
            return CANNOT_TELL
        width = self.measured.hi - self.measured.lo
        meets = self.predicted.lo <= self.measured.hi and self.measured.lo <= self.predicted.hi
        if width > max(abs(self.predicted.mean), abs(self.measured.mean), TOLERANCE):
            return CANNOT_TELL
        return AGREES if meets or abs(self.error) <= TOLERANCE else DIFFERS


def delay_of(one: Round) -> float:
    """Return the largest share of a round for which one of its threads waited for a processor."""
    return max(sum(segment.delay for segment in own) for own in one.lanes.values()) / one.seconds


def split(rounds: Sequence[Round]) -> tuple[list[Round], Side]:
    """Return the rounds that count, and what is to be told of all."""
    delays = [delay_of(one) for one in rounds]
    kept = [one for one, delay in zip(rounds, delays, strict=True) if delay <= MAX_DELAY]
    return kept, Side([one.seconds for one in kept], len(rounds) - len(kept), fmean(delays) if delays else 0.0)


def verify(plain: Sequence[Round], moved: Sequence[Round], offload: Offload, *, same_bits: bool) -> Verification:
    """Compare rounds.

    Args:
        plain, moved: recorded rounds without and with a side-car.
        offload: what it does, and what that costs, see `Handing.applied`.
        same_bits: see `Verification`.
    """
    (kept, before), (_, after) = split(plain), split(moved)
    if len(before.seconds) < MIN_ROUNDS or len(after.seconds) < MIN_ROUNDS:
        return Verification(None, None, before, after, same_bits)
    costs, graphs = offload.costs._replace(cores=1), [graph_of(one) for one in kept]
    predicted = bootstrap_change(
        [replay(graph).seconds for graph in graphs], [move(graph, offload.stage, costs).seconds for graph in graphs]
    )
    return Verification(predicted, change(before.seconds, after.seconds), before, after, same_bits)


def change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """Return by which share of it the mean of rounds changes, and the interval for 90 % of resampled rounds."""
    source, old, new = np.random.default_rng(seed), np.asarray(before), np.asarray(after)
    means = [values[source.integers(0, len(values), (NUM_RESAMPLES, len(values)))].mean(1) for values in (old, new)]
    lo, hi = np.quantile(means[1] / means[0] - 1, [0.05, 0.95])
    return Interval(float(new.mean() / old.mean() - 1), float(lo), float(hi))
