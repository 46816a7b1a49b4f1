"""How well a replay predicts a round with one stage moved to another process, which really does it.

Rounds of a driver and workers, forked processes linked by pipes, are recorded: their work is timed (they sleep), so
that a noisy machine matters less; trials in which workers overslept by 2 % are rejected, and counted. Then the stage is
done by a side-car process, `slowdown` times as slowly, behind a link of stated latency and bandwidth, and the median
round is compared with what was predicted from the record. What the side-car adds to an empty piece is measured once
before, with other sizes. Two naive predictors stand beside: the round without the stage, and the round with the
stage's time scaled. This shows that the model holds, and nothing of a card. Replay keeps the recorded order: a driver
that takes answers as they come (--by-arrival) may take them in another.

Prints one JSON object: `python benchmarks/offload_accuracy.py --trials 60`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from gossamer.profiling import recorder
from gossamer.profiling.graphs import graph_of
from gossamer.profiling.offload import BACKGROUND, PIPELINED, SYNCHRONOUS, Costs, Stage, move, stage_named
from gossamer.profiling.replay import Graph, replay
from gossamer.profiling.trace import read_trace, stage_totals

FORK = multiprocessing.get_context("fork")
NAMES = ("aggregation", "codec", "checkpoint")
WARM_UP = 2  # rounds that do not count
MAX_OVERSLEPT = 0.02  # share of their time by which workers may sleep too long in a trial that counts


@dataclass(frozen=True)
class Trial:
    """One experiment; times in seconds.

    Attributes:
        stage: what is moved.
        train: of each worker's piece, worker by worker.
        compress, aggregate, checkpoint, update: of each piece.
        num_bytes: of a piece of the stage.
        slowdown, latency, bandwidth: of the side-car and its link.
    """

    stage: str
    train: tuple[tuple[float, ...], ...]
    compress: float
    aggregate: float
    checkpoint: float
    update: float
    num_bytes: int
    slowdown: float
    latency: float
    bandwidth: float


def draw(seed: int) -> Trial:
    """Draw a trial."""
    draws = np.random.default_rng(seed)
    pieces, workers = int(draws.integers(1, 4)), int(draws.integers(1, 5))

    def ms(low: float, high: float) -> float:
        """Draw a time between two, in milliseconds."""
        return float(draws.uniform(low, high)) / 1e3

    train = tuple(tuple(ms(8, 40) for _ in range(pieces)) for _ in range(workers))
    times = {"compress": ms(4, 20), "aggregate": ms(4, 20), "checkpoint": ms(10, 60), "update": ms(2, 10)}
    size, bandwidth = int(draws.integers(10_000, 10_000_000)), float(draws.uniform(1e9, 1e10))
    slowdown, latency = float(draws.uniform(0.3, 4)), ms(0.01, 2)
    return Trial(
        NAMES[seed % len(NAMES)],
        train,
        **times,
        num_bytes=size,
        slowdown=slowdown,
        latency=latency,
        bandwidth=bandwidth,
    )


# ---- the side-car


class SideCar:
    """Threads that stand for a link in two directions and for cores, one for each thread of the host."""

    def __init__(self, connections: list[Connection], trial: Trial, stage: Stage) -> None:
        self._trial, self._stage = trial, stage
        self._to_device, self._from_device, self._answers = queue.Queue[Any](), queue.Queue[Any](), queue.Queue[Any]()
        self._cores = [queue.Queue[Any]() for _ in connections]
        jobs: list[Callable[[], None]] = [self._link_to, self._link_from, self._answer]
        jobs += [lambda number=number: self._core(number) for number in range(len(connections))]  # type: ignore[misc]
        jobs += [lambda n=n, one=one: self._read(n, one) for n, one in enumerate(connections)]  # type: ignore[misc]
        self._threads = [threading.Thread(target=job, daemon=True) for job in jobs]

    def run(self) -> None:
        """Serve for ever."""
        for thread in self._threads:
            thread.start()
        self._threads[0].join()

    def _read(self, number: int, connection: Connection) -> None:
        while True:
            seconds, num_bytes = connection.recv()
            self._to_device.put((number, connection, seconds, num_bytes))

    def _link_to(self) -> None:
        while True:
            number, connection, seconds, num_bytes = self._to_device.get()
            time.sleep(num_bytes / self._trial.bandwidth)
            there = time.monotonic() + self._trial.latency
            if self._stage.mode == BACKGROUND:
                self._answers.put((there, connection))  # it is copied, and the host may go on
            self._cores[number].put((there, connection, seconds, num_bytes))

    def _core(self, number: int) -> None:
        while True:
            there, connection, seconds, num_bytes = self._cores[number].get()
            sleep_until(there)
            time.sleep(seconds * self._trial.slowdown)
            self._from_device.put((connection, num_bytes * self._stage.returns))

    def _link_from(self) -> None:
        while True:
            connection, num_bytes = self._from_device.get()
            time.sleep(num_bytes / self._trial.bandwidth)
            self._answers.put((time.monotonic() + self._trial.latency, connection))

    def _answer(self) -> None:
        while True:
            due, connection = self._answers.get()
            sleep_until(due)
            connection.send(None)


def sleep_until(moment: float) -> None:
    """Sleep until a moment of the monotonic clock, if it has not passed."""
    time.sleep(max(0.0, moment - time.monotonic()))


class Device:
    """The host's side: does a stage here, or has the side-car do it."""

    def __init__(self, connection: Connection | None, stage: Stage) -> None:
        self._connection, self._stage, self._pending = connection, stage, 0

    def do(self, kind: str, seconds: float, num_bytes: int) -> None:
        """Do a piece."""
        if self._connection is None or kind not in self._stage.kinds:
            with recorder.span(kind, num_bytes):
                time.sleep(seconds)
            return
        if self._stage.mode == BACKGROUND:  # the last one must be done before the next is copied
            self.join()
        self._connection.send((seconds, num_bytes))
        self._pending += 1
        if self._stage.mode == SYNCHRONOUS:
            self.join()
        elif self._stage.mode == BACKGROUND:
            self._connection.recv()

    @property
    def is_pipelined(self) -> bool:
        """Whether the round waits for the stage at its end."""
        return self._stage.mode == PIPELINED

    def join(self) -> None:
        """Wait for all pieces under way."""
        for _ in range(self._pending):
            assert self._connection is not None
            self._connection.recv()
        self._pending = 0


# ---- the host


def work(connection: Connection, device: Device, trial: Trial, number: int) -> None:
    """Train and compress whenever the driver says so."""
    name, count = f"w{number}", 0
    while True:
        with recorder.span("wait"):
            piece = connection.recv()
        count += 1
        with recorder.span("receive", message=f"{name}<{count}"):
            pass
        with recorder.span("train"):
            time.sleep(trial.train[number][piece])
        device.do("compress", trial.compress, trial.num_bytes)
        with recorder.span("send", message=f"{name}>{count}"):
            connection.send(piece)
        recorder.flush()


def awaited(connections: list[Connection], left: list[int], *, by_arrival: bool) -> list[int]:
    """Wait for answers, of the worker whose turn it is or of any; return the numbers of the workers."""
    if not by_arrival:
        number = left.index(max(left))
        wait([connections[number]])
        return [number]
    ready = wait([connections[number] for number in range(len(left)) if left[number]])
    return sorted(connections.index(connection) for connection in ready)  # type: ignore[arg-type]


def drive(
    connections: list[Connection], device: Device, trial: Trial, num_rounds: int, *, by_arrival: bool
) -> list[float]:
    """Run rounds; return their lengths."""
    lengths, sent, received = [], [0] * len(connections), [0] * len(connections)

    def send(number: int, piece: int) -> None:
        """Send one piece to a worker."""
        sent[number] += 1
        with recorder.span("send", message=f"w{number}<{sent[number]}"):
            connections[number].send(piece)

    for one in range(num_rounds):
        began, left = time.monotonic(), [len(pieces) for pieces in trial.train]
        with recorder.round_span(one + 1):
            for number in range(len(connections)):
                send(number, 0)
            while any(left):
                with recorder.span("wait"):
                    ready = awaited(connections, left, by_arrival=by_arrival)
                for number in ready:
                    received[number] += 1
                    with recorder.span("receive", message=f"w{number}>{received[number]}"):
                        piece = connections[number].recv()
                    left[number] -= 1
                    if left[number]:
                        send(number, piece + 1)
                    device.do("aggregate", trial.aggregate, trial.num_bytes)
            if device.is_pipelined:
                device.join()
            with recorder.span("update"):
                time.sleep(trial.update)
            device.do("checkpoint", trial.checkpoint, trial.num_bytes)
        lengths.append(time.monotonic() - began)
    return lengths


@contextmanager
def processes(trial: Trial, stage: Stage, *, moved: bool) -> Iterator[tuple[list[Connection], Device]]:
    """Start the workers, and the side-car if the stage is moved; yield what the driver needs."""
    started, pairs = [], [FORK.Pipe() for _ in range(len(trial.train) + 1)] if moved else []
    devices = [Device(pair[0], stage) for pair in pairs] or [Device(None, stage)] * (len(trial.train) + 1)
    if moved:
        served = [pair[1] for pair in pairs]
        started.append(FORK.Process(target=lambda: SideCar(served, trial, stage).run(), daemon=True))
    connections = []
    for number in range(len(trial.train)):
        ours, theirs = FORK.Pipe()
        connections.append(ours)
        started.append(FORK.Process(target=work, args=(theirs, devices[number + 1], trial, number), daemon=True))
    for process in started:
        process.start()
    try:
        yield connections, devices[0]
    finally:
        for process in started:
            process.kill()
            process.join()


def measure(trial: Trial, num_rounds: int, directory: Path, *, moved: bool, by_arrival: bool) -> tuple[float, float]:
    """Record rounds, with the stage moved or not.

    Returns:
        the median round; and by which share of its time the workers overslept, which a busy machine makes them do.
    """
    stage = stage_named(trial.stage)
    with recorder.recording(directory / "trace"), processes(trial, stage, moved=moved) as (connections, device):
        lengths = drive(connections, device, trial, num_rounds + WARM_UP, by_arrival=by_arrival)[WARM_UP:]
    trained = stage_totals(read_trace(directory).rounds[WARM_UP:])["train"].seconds
    return median(lengths), trained / (num_rounds * sum(map(sum, trial.train))) - 1


def timed(graph: Graph, stage: Stage) -> Graph:
    """Return a graph in which sleep stands for processor time."""
    return Graph([n._replace(cpu=n.seconds) if n.kind in stage.kinds else n for n in graph.nodes], graph.edges)


def calibrate() -> float:
    """Return what a piece takes longer than it should, from pieces that take no time."""
    trial = Trial("codec", ((0.01,),), 0.0, 0.0, 0.0, 0.0, 0, 1.0, 0.0, 1e9)
    with processes(trial, stage_named("codec"), moved=True) as (_, device):
        found = []
        for _ in range(60):
            began = time.monotonic()
            device.do("compress", 0.0, 0)
            found.append(time.monotonic() - began)
    return median(found)


def predict(trial: Trial, directory: Path, extra: float) -> tuple[float, float, float]:
    """Return the median round: as replayed, as predicted, and the stage's time in it."""
    stage = stage_named(trial.stage)
    costs = Costs(trial.slowdown, 64, 0.0, 1 / trial.bandwidth, trial.latency + extra / 2, 0.0)
    graphs = [timed(graph_of(one), stage) for one in read_trace(directory).rounds[WARM_UP:]]
    spent = median(sum(node.seconds for node in graph.nodes if node.kind in stage.kinds) for graph in graphs)
    before = median(replay(graph).seconds for graph in graphs)
    return before, median(move(graph, stage, costs).seconds for graph in graphs), spent


def attempt(seed: int, num_rounds: int, extra: float, *, by_arrival: bool) -> dict[str, Any]:
    """Do one trial."""
    trial = draw(seed)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        recorded, slept = measure(trial, num_rounds, Path(first), moved=False, by_arrival=by_arrival)
        before, predicted, spent = predict(trial, Path(first), extra)
        measured, slept_moved = measure(trial, num_rounds, Path(second), moved=True, by_arrival=by_arrival)
    crossing = 2 * (trial.num_bytes / trial.bandwidth + trial.latency)
    pieces = sum(map(len, trial.train)) if trial.stage != "checkpoint" else 1
    naive = {"subtract": before - spent, "scale": before - spent + trial.slowdown * spent + pieces * crossing}
    return {
        "seed": seed,
        "stage": trial.stage,
        "recorded": recorded,
        "measured": measured,
        "predicted": predicted,
        "overslept": max(slept, slept_moved),
        "identity_error": abs(before / recorded - 1),
        "error": abs(predicted / measured - 1),
        "effect": measured / recorded - 1,
        "effect_error": abs((predicted / before - 1) - (measured / recorded - 1)),
        "naive_errors": {name: abs(value / measured - 1) for name, value in naive.items()},
    }


def summary(all_trials: list[dict[str, Any]], extra: float) -> dict[str, Any]:
    """Return means and maxima over the trials that count."""
    trials = [one for one in all_trials if one["overslept"] < MAX_OVERSLEPT]
    if not trials:
        raise SystemExit("all trials were rejected: the machine is too busy")
    large = [one for one in trials if abs(one["effect"]) > 0.1]
    return {
        "trials": len(trials),
        "rejected": len(all_trials) - len(trials),
        "mean_error_with_rejected": fmean(one["error"] for one in all_trials),
        "max_error_with_rejected": max(one["error"] for one in all_trials),
        "mean_error": fmean(one["error"] for one in trials),
        "max_error": max(one["error"] for one in trials),
        "mean_identity_error": fmean(one["identity_error"] for one in trials),
        "median_effect_error": median(one["effect_error"] for one in trials),
        "large_effects": len(large),
        "wrong_signs": sum((one["predicted"] > one["recorded"]) != (one["effect"] > 0) for one in large),
        "naive_mean_errors": {
            name: fmean(one["naive_errors"][name] for one in trials) for name in ("subtract", "scale")
        },
        "calibrated_seconds": extra,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a trial")
    parser.add_argument("--by-arrival", action="store_true", help="the driver takes answers as they come")
    parser.add_argument("--all", action="store_true", help="print each trial, too")
    given = parser.parse_args()
    extra = calibrate()
    trials = [attempt(seed, given.rounds, extra, by_arrival=given.by_arrival) for seed in range(given.trials)]
    report = summary(trials, extra)
    print(json.dumps(report | ({"each": trials} if given.all else {})))
    return 0 if report["mean_error"] <= 0.03 and report["max_error"] <= 0.06 and not report["wrong_signs"] else 1


if __name__ == "__main__":
    sys.exit(main())
