"""Finds a process that is slower than its like in one stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gossamer.profiling.replay import Interval, bootstrap
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, Round

MIN_RATIO = 1.15  # of the lower bound, below which nobody is named
MIN_SHARE = 0.01  # of a round that is lost
MIN_PIECES = 4
IGNORED = (WAIT, UNATTRIBUTED, ABSENT, "send", "receive")  # how long these take is up to others


@dataclass(frozen=True)
class Outlier:
    """A process that is slow in a stage.

    Attributes:
        process, stage: which.
        ratio: of its time for a piece to that of the other processes of its kind.
        seconds: that it loses in a round.
    """

    process: str
    stage: str
    ratio: Interval
    seconds: float


def find_outliers(rounds: Sequence[Round]) -> list[Outlier]:
    """Return the processes that are slower than the others of their kind, the largest loss first; all their threads.

    The time of a piece is that of a stage in a round, divided by the number of its segments; without the time of
    waiting for a processor, which others take, so that nobody is called slow for it. Pieces of different sizes
    look like slow processes where these are shared out unevenly.
    """
    pieces: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for lane, segments in ((lane, own) for one in rounds for lane, own in one.lanes.items()):
        found: dict[str, list[float]] = defaultdict(list)
        for segment in segments:
            if segment.kind not in IGNORED:
                found[segment.kind].append(segment.quiet_seconds)
        process = lane.name.partition(".")[0]
        for kind, seconds in found.items():
            pieces[lane.process, kind][process].append(fmean(seconds))
            counts[process, kind] += len(seconds)
    length, outliers = fmean(one.seconds for one in rounds), []
    for (_, kind), by_process in pieces.items():
        for name, own in by_process.items():
            others = [value for other, values in by_process.items() if other != name for value in values]
            if len(own) < MIN_PIECES or len(others) < MIN_PIECES:
                continue
            usual = fmean(others)
            ratio = Interval(*(value / usual for value in bootstrap(own))) if usual else Interval(1.0, 1.0, 1.0)
            lost = (fmean(own) - usual) * counts[name, kind] / len(rounds)
            if ratio.lo > MIN_RATIO and lost > MIN_SHARE * length:
                outliers.append(Outlier(name, kind, ratio, lost))
    return sorted(outliers, key=lambda one: -one.seconds)
