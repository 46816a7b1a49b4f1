"""The loop. Data flows one way through a round: plan, train, exchange, update, evaluate, log, commit."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from gossamer.engines.base import Engine
from gossamer.engines.task import WHOLE
from gossamer.errors import Interrupted, QuorumError, RoundAborted, StateLost
from gossamer.plan import STOPPED
from gossamer.planning.base import Planner, TimedPlan
from gossamer.profiling.spans import Spans
from gossamer.round_record import Observer, Progress, Record, round_record
from gossamer.storage.checkpoint import Checkpoint, Checkpoints
from gossamer.storage.client_store import ClientStore
from gossamer.storage.runlog import RunLog
from gossamer.workloads.base import Workload

MAX_LISTED = 100  # clients that one event names
MAX_LOSSES = 3  # of the state in a row, without a commit in between


@dataclass(frozen=True)
class LoopOptions:
    """What the loop itself is told.

    Attributes:
        num_rounds: rounds to run in all.
        quorum: least share of the updates that a round waits for which must be in time and usable.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        evaluate_variants: capacities of the variants to evaluate besides the whole model; () for none.
        evaluate_peers: peers whose own models are evaluated.
        commit_every_seconds: least time between commits; 0 commits after every round.
    """

    num_rounds: int
    quorum: float
    evaluate_every: int
    evaluate_variants: tuple[float, ...]
    commit_every_seconds: float
    evaluate_peers: int = 0


@dataclass
class Loop:
    """One run: its parts, and `run`."""

    engine: Engine
    workload: Workload
    planner: Planner
    log: RunLog
    checkpoints: Checkpoints
    store: ClientStore | None
    options: LoopOptions
    observer: Observer | None = None
    warnings: tuple[str, ...] = ()
    spans: Spans = field(default_factory=Spans)
    progress: Progress = field(default_factory=Progress)
    committed_round: int = -1
    _clock: float = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a commit: state, private rows, counters and logs."""
        arrays = dict(checkpoint.arrays)
        self.engine.write({name.removeprefix("state."): v for name, v in arrays.items() if name.startswith("state.")})
        if self.store is not None:
            self.store.restore({n.removeprefix("store."): v for n, v in arrays.items() if n.startswith("store.")})
        self.progress = Progress(**checkpoint.progress)
        self.log.truncate(checkpoint.log_offsets)
        self.committed_round = checkpoint.round

    def run(self) -> None:
        """Run all rounds that are left; where the engine loses the state, go back to the last commit.

        Raises:
            StateLost: the engine lost the state again and again.
            QuorumError: too few usable updates; the state before that round is committed.
            Interrupted: a stop was requested; the last whole round is committed.
        """
        self._clock = time.perf_counter()
        if self.committed_round < 0:
            for variant in self.planner.costs.variants:
                self.log.log_event("variant", **asdict(variant))
            for message in self.warnings:
                self.log.log_event("warning", message=message)
        if self.progress.round == 0:
            self._commit()
        losses, lost_at = 0, -1
        while True:
            try:
                return self._run_rounds()
            except StateLost as error:
                losses = losses + 1 if self.committed_round == lost_at else 1
                lost_at = self.committed_round
                if losses > MAX_LOSSES:
                    raise
                self._go_back(error, losses)

    def _go_back(self, error: StateLost, times: int) -> None:
        """Take up the last commit, and note why; the time that passed has passed."""
        checkpoint, wall_seconds = self.checkpoints.latest(), self.progress.wall_seconds
        if checkpoint is None:
            raise error
        lost = self.progress.round
        self.restore(checkpoint)
        self.spans.take()
        self.progress.wall_seconds = wall_seconds
        self.log.log_event("state-lost", round=lost, back_to=checkpoint.round, times=times, reason=str(error))

    def _run_rounds(self) -> None:
        committed_at = time.monotonic()
        while self.progress.round < self.options.num_rounds:
            try:
                self._round()
            except (Interrupted, QuorumError, RoundAborted):
                if self.engine.is_whole:
                    self._commit()
                raise
            if time.monotonic() - committed_at >= self.options.commit_every_seconds:
                self._commit()
                committed_at = time.monotonic()
        self._commit()

    def _round(self) -> None:
        began = time.perf_counter()
        if self.engine.hooks.stop_requested():
            raise Interrupted(f"stopped after round {self.progress.round} of {self.options.num_rounds}")
        timed = self.planner.timed_plan(self.progress.round, self.progress.simulated_seconds)
        plan = timed.plan
        losses = self._train(timed)
        with self.spans.span("exchange"):
            self.engine.exchange(plan)
        number = self.progress.round + 1
        metrics: Record = {}
        if number % self.options.evaluate_every == 0 or number == self.options.num_rounds:
            with self.spans.span("evaluate"):
                metrics = self._evaluate(plan.round)
        now = time.perf_counter()
        self.progress.add(timed.costs, now - self._clock)  # training, logging and commits, but no time between runs
        self._clock = now
        for reason, clients in timed.late.items():
            if len(clients):
                listed = clients[:MAX_LISTED].tolist()
                self.log.log_event("dropped", round=number, reason=reason, num_clients=len(clients), clients=listed)
        record = round_record(self.progress, plan, timed.costs, losses, now - began, self.spans.take()) | metrics
        self.log.log_metrics(record)
        if self.observer is not None:
            self.observer.on_round(record)

    def _train(self, timed: TimedPlan) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Train; return the participants' losses, NaN where the update was dropped."""
        plan = timed.plan
        self._check_quorum(timed, len(plan.client), "in time", "raise clients.deadline_seconds")
        losses = np.full(len(plan.client), np.nan)
        done, is_stopped = 0, False
        with self.spans.span("train"):
            for report in self.engine.train(plan):
                is_stopped |= report.missing == STOPPED
                if is_stopped:
                    continue
                # A usable update counts even where the loss itself is not finite.
                losses[report.rows] = np.where(report.finite, np.nan_to_num(report.loss), np.nan)
                dropped, reason = plan.client[report.rows][~np.array(report.finite)], report.missing or "not finite"
                for client in dropped.tolist():
                    self.log.log_event("update-dropped", round=plan.round + 1, client=client, reason=reason)
                done += len(report.finite)
                if self.observer is not None:
                    self.observer.on_block(plan.round, done, len(plan.client))
        if is_stopped or (self.engine.hooks.stop_requested() and self.engine.is_whole):
            raise Interrupted(f"stopped after round {self.progress.round} of {self.options.num_rounds}")
        self._check_quorum(timed, int(np.isfinite(losses).sum()), "usable", "lower train.lr or set train.clip_norm")
        return losses

    def _check_quorum(self, timed: TimedPlan, num_left: int, what: str, remedy: str) -> None:
        needed = max(1, math.ceil(self.options.quorum * timed.num_expected))
        if num_left < needed:
            section = self.planner.section
            committed = self.progress.round if self.engine.is_whole else self.committed_round
            raise QuorumError(
                f"round {timed.plan.round + 1}: only {num_left} of {timed.num_expected} updates are {what} and"
                f" {section}.quorum asks for {needed}: {remedy}, or lower {section}.quorum;"
                f" round {committed} is committed"
            )

    def _evaluate(self, round: int) -> Record:
        whole = self.workload.metrics(self.engine.evaluate(WHOLE, round))
        metrics: Record = dict(whole)
        if self.options.evaluate_variants:
            by_capacity = {
                capacity: whole if capacity == 1.0 else self.workload.metrics(self.engine.evaluate(index, round))
                for index, capacity in enumerate(self.options.evaluate_variants)
            }
            for name in whole:
                metrics[f"{name}_by_capacity"] = {f"{c:g}": m[name] for c, m in by_capacity.items() if name in m}
        return metrics | self.engine.measure(self.options.evaluate_peers)

    def _commit(self) -> None:
        if self.committed_round == self.progress.round:
            return
        with self.spans.span("commit"):
            arrays: dict[str, torch.Tensor] = {f"state.{name}": value for name, value in self.engine.read().items()}
            if self.store is not None:
                arrays |= {f"store.{name}": value for name, value in self.store.index().items()}
            self.log.sync()
            self.checkpoints.commit(self.progress.round, arrays, vars(self.progress), self.log.offsets())
            if self.store is not None:
                self.store.release()
        self.committed_round = self.progress.round
