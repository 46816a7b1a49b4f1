"""Extrapolates a recorded run of a federation on workers to other numbers of participants and workers.

The jobs of a round are drawn again from those that were recorded; the driver hands them out as it did, two ahead, and
takes their answers one by one. What a round does besides training takes as long as it did. So models, blocks, data and
machine must be those of the record, and workers must not share processors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from gossamer.errors import DataError
from gossamer.profiling.replay import Interval
from gossamer.profiling.trace import DRIVER, UNATTRIBUTED, WAIT, Round, Segment

HANDLING = ("send", "receive", "aggregate", "coordinate")  # what the driver does for each job
JOBS_AHEAD = 2
NUM_DRAWS = 20
WORKERS, REST = "workers", "all but training"


@dataclass(frozen=True)
class Scaled:
    """A round of another size.

    Attributes:
        participants: its size.
        workers: of this machine, that train; None: each participant has a machine of its own.
        seconds: how long it takes.
        bottleneck: what is busy for most of it: workers, driver, or what a round does besides training; or, of
            participants on machines of their own, what it would be shortest without.
        shares: share of the round in which each of these is busy, or by which it would be shorter without it.
    """

    participants: int
    workers: int | None
    seconds: Interval
    bottleneck: str
    shares: dict[str, float]


@dataclass(frozen=True)
class Jobs:
    """What a record tells of the jobs of a round.

    Attributes:
        seconds: of each job at a worker.
        per_round: jobs of a round, on average.
        handling: seconds of the driver for each job.
        rest: seconds of a round besides training, of each round.
        workers: that did them.
    """

    seconds: list[float]
    per_round: float
    handling: float
    rest: list[float]
    workers: int


def jobs_of(rounds: Sequence[Round]) -> Jobs:
    """Take jobs out of recorded rounds.

    Raises:
        DataError: no worker has trained in them.
    """
    seconds, handling, rest, workers = list[float](), 0.0, list[float](), set[str]()
    for one in rounds:
        phase = _training(next(own for lane, own in one.lanes.items() if lane.leads))
        begin, end = (phase[0].begin, phase[-1].end) if phase else (0.0, 0.0)
        rest.append(one.seconds - (end - begin))
        handling += sum(segment.seconds for segment in phase if segment.kind in HANDLING)
        for lane, segments in one.lanes.items():
            found = _jobs(segments) if lane.is_main and not lane.leads else []
            workers |= {lane.name} if found else set()
            seconds += found
    if not seconds:
        raise DataError("no worker has trained in this run: record one with engine.workers >= 1")
    return Jobs(seconds, len(seconds) / len(rounds), handling / len(seconds), rest, len(workers))


def _training(segments: Sequence[Segment]) -> Sequence[Segment]:
    """Return a driver's segments from the first to the last in which it coordinates training."""
    places = [place for place, segment in enumerate(segments) if segment.kind == "coordinate"]
    return segments[places[0] : places[-1] + 1] if places else []


def _jobs(segments: Sequence[Segment]) -> list[float]:
    """Return how long a worker took for each job in which it trained, from one wait to the next."""
    found, seconds, trained = [], 0.0, False
    for segment in [*segments, Segment(WAIT, 0.0, 0.0)]:
        if segment.kind == WAIT:
            if trained:
                found.append(seconds)
            seconds, trained = 0.0, False
        elif segment.kind != UNATTRIBUTED or seconds:
            seconds, trained = seconds + segment.seconds, trained or segment.kind == "train"
    return found


def extrapolate(jobs: Jobs, recorded: int, participants: int, workers: int, seed: int = 0) -> Scaled:
    """Return a round of another size.

    Args:
        jobs: of a round.
        recorded: participants of a recorded round.
        participants, workers: of the round that is asked for.
        seed: of the jobs that are drawn.
    """
    draws = np.random.default_rng(seed)
    number = max(1, round(jobs.per_round * participants / recorded))
    found, busy = [], 0.0
    for _ in range(NUM_DRAWS):
        drawn = draws.choice(jobs.seconds, number)
        found.append(train_seconds(list(drawn), workers, jobs.handling) + float(draws.choice(jobs.rest)))
        busy += float(drawn.sum()) / NUM_DRAWS
    total = fmean(found)
    used = {WORKERS: busy / workers, DRIVER: number * jobs.handling, REST: fmean(jobs.rest)}
    shares = {name: seconds / total for name, seconds in sorted(used.items(), key=lambda item: -item[1])}
    lo, hi = np.quantile(found, [0.05, 0.95])
    return Scaled(participants, workers, Interval(total, float(lo), float(hi)), next(iter(shares)), shares)


def train_seconds(seconds: Sequence[float], workers: int, handling: float) -> float:
    """Return how long a driver and its workers take for jobs in their order.

    Each worker has up to two jobs, and gets another when the driver has taken an answer.
    """
    free = [(0.0, worker) for worker in range(workers)]  # when each has done what it was given
    answers: list[tuple[float, int]] = []
    queue = list(seconds)[::-1]
    for _ in range(JOBS_AHEAD):
        for worker in range(min(workers, len(queue))):
            at, _ = free[worker]
            free[worker] = at + queue.pop(), worker
            heapq.heappush(answers, (free[worker][0], worker))
    now = 0.0
    while answers:
        at, worker = heapq.heappop(answers)
        now = max(now, at) + handling
        if queue:
            free[worker] = max(now, free[worker][0]) + queue.pop(), worker
            heapq.heappush(answers, (free[worker][0], worker))
    return now
