"""The loop. Data flows one way through a round: plan, train, exchange, update, evaluate, log, commit.

A round may have several phases: each is planned, trained and exchanged, and may be committed, before the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from gossamer import round_record
from gossamer.engines.base import Engine, Record
from gossamer.engines.task import WHOLE
from gossamer.errors import EngineError, GossamerError, Interrupted, QuorumError, StateLost
from gossamer.plan import STOPPED
from gossamer.planning.base import Planner, TimedPlan
from gossamer.planning.stopping import StopOptions, watch
from gossamer.profiling.spans import Spans
from gossamer.profiling.storing import Commits
from gossamer.registry import errors_of_plug_ins
from gossamer.round_record import Observer, Outcome, Progress
from gossamer.storage.checkpoint import STATE, STORE, Checkpoint
from gossamer.storage.client_store import ClientStore
from gossamer.storage.runlog import RunLog
from gossamer.workloads.base import Workload

MAX_LISTED = 100  # clients that one event names
MAX_LOSSES = 3  # of the state in a row, without a commit in between


@dataclass(frozen=True)
class LoopOptions:
    """Options of the loop itself.

    Attributes:
        num_rounds: rounds to run in all.
        quorum: least share of the updates that a round waits for which must be in time and usable; None: none need be.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        evaluate_variants: ``{capacity: number of its variant}`` of what to evaluate besides the whole model.
        evaluate_held: ``{modules and capacity: number of the variant}``, likewise, of what kinds of clients hold.
        evaluate_own: participants whose own models are evaluated, and local steps, see `Planner.own_models`.
        stop: when to end before the last round.
        commit_every_seconds: least time between commits; 0 commits after every phase.
    """

    num_rounds: int
    quorum: float | None
    evaluate_every: int
    evaluate_variants: Mapping[float, int]
    commit_every_seconds: float
    evaluate_held: Mapping[str, int] = field(default_factory=dict)
    evaluate_own: tuple[int, int] = (0, 0)
    stop: StopOptions | None = None


@dataclass
class Loop:
    """One run: its parts, and `run`.

    Attributes:
        progress: rounds and phases that are done.
        committed: round and phase of the last commit.
        advice: asked what to do where updates are not usable.
    """

    engine: Engine
    workload: Workload
    planner: Planner
    log: RunLog
    checkpoints: Commits
    store: ClientStore | None
    options: LoopOptions
    observer: Observer | None = None
    warnings: tuple[str, ...] = ()
    spans: Spans = field(default_factory=Spans)
    progress: Progress = field(default_factory=Progress)
    committed: tuple[int, int] = (-1, 0)
    advice: Callable[[], str] = lambda: "lower train.lr or set train.clip_norm"
    _clock: float = 0.0
    _committed_at: float = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a commit: state, private rows, counters and logs."""
        self.engine.write(checkpoint.below(STATE))
        if self.store is not None:
            self.store.restore(checkpoint.below(STORE))
        self.progress = Progress(**checkpoint.progress)
        self.log.truncate(checkpoint.logs)
        self.committed = checkpoint.round, checkpoint.phase

    def run(self) -> None:
        """Run all rounds that are left; where the engine loses the state, go back to the last commit.

        Raises:
            StateLost: the engine lost the state again and again.
            QuorumError: too few usable updates; the state before that phase is committed.
            Interrupted: a stop was requested; the last whole phase is committed.
        """
        self._clock = time.perf_counter()
        if self.committed[0] < 0:
            for phase, costs in enumerate(self.planner.costs):
                for variant in costs.variants:
                    self.log.log_event("variant", **asdict(variant), **self._address(None, phase))
            for message in self.warnings:
                self.log.log_event("warning", message=message)
        if self.progress.round == 0:
            self._commit()
        losses, lost_at = 0, (-1, 0)
        while True:
            try:
                return self._run_rounds()
            except StateLost as error:
                if self.engine.hooks.stop_requested():
                    raise self._stopped() from None
                losses, lost_at = (losses + 1 if self.committed == lost_at else 1), self.committed
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
        told = {"back_to": checkpoint.round, "times": times, "reason": str(error), **error.told}
        self.log.log_event("state-lost", round=lost, **told)

    def _run_rounds(self) -> None:
        self._committed_at = time.monotonic()
        while self.progress.round < self.options.num_rounds and not self.progress.stop_reason:
            try:
                with errors_of_plug_ins(), self.spans.round(self.progress.round + 1):
                    self._round()
            except StateLost:
                raise
            except GossamerError:
                if self.engine.is_whole:
                    with suppress(EngineError):
                        self._commit()
                if self.engine.hooks.stop_requested():
                    raise self._stopped() from None
                raise
        self._commit()

    def _round(self) -> None:
        round = self.progress.round
        with self.spans.stage("plan"):
            phases = self.planner.phases(round, self.progress.simulated_seconds)[self.progress.phase :]
        for timed in phases:
            self._phase(timed)
        began, metrics = time.perf_counter(), Record()
        if (round + 1) % self.options.evaluate_every == 0 or round + 1 == self.options.num_rounds:
            with self.spans.span("evaluate"):
                metrics = self._evaluate(round)
        self._count_time()
        done, seconds = self.progress.end_round(), time.perf_counter() - began
        tokens, spent = self.workload.traits.tokens_per_sample, self.spans.take()
        record = round_record.round_record(self.progress, done, seconds, spent, metrics, tokens)
        with self.spans.stage("log"):
            self.log.log_metrics(record)
        watch(self.options.stop, self.options.evaluate_every, self.progress, record, self.log.log_event)
        if self.observer is not None:
            self.observer.on_round(record)

    def _phase(self, timed: TimedPlan) -> None:
        self._commit(if_due=True)  # what was done before
        began, plan = time.perf_counter(), timed.plan
        if self.engine.hooks.stop_requested():
            raise Interrupted("stopped")
        outcome = self._train(timed)
        with self.spans.span("exchange"):
            self.engine.exchange(plan)
        for reason, clients in timed.late.items():
            if len(clients):
                where, listed = self._address(plan.round, plan.phase), clients[:MAX_LISTED].tolist()
                self.log.log_event("dropped", **where, reason=reason, num_clients=len(clients), clients=listed)
        self._count_time()
        seconds = time.perf_counter() - began
        self.progress.end_phase(round_record.phase_record(plan, timed.costs, outcome, seconds))

    def _count_time(self) -> None:
        """Count the time of training, logging and commits, but none between runs."""
        now = time.perf_counter()
        self.progress.wall_seconds += now - self._clock
        self._clock = now

    def _address(self, round: int | None, phase: int) -> Record:
        """Return what events say of round and phase, counted from 1 there; a single phase is not named."""
        named = {} if round is None else {"round": round + 1}
        return named if len(self.planner.costs) == 1 else named | {"phase": phase + 1}

    def _stopped(self) -> Interrupted:
        done, num_rounds = self.progress.address, self.options.num_rounds
        return Interrupted(round_record.describe_stop(done, self.committed, len(self.planner.costs), num_rounds))

    def _train(self, timed: TimedPlan) -> Outcome:
        """Train; return what came of it."""
        plan = timed.plan
        self._check_quorum(timed, len(plan.client), "in time", lambda: "raise clients.deadline_seconds")
        outcome, number = Outcome.of(plan, timed.dropped), len(plan.client)
        done, total = plan.phase * number, len(self.planner.costs) * number
        with self.spans.span("train"):
            for report in self.engine.train(plan):
                if report.missing == STOPPED:
                    raise Interrupted("stopped")
                where = self._address(plan.round, plan.phase)
                for row, reason in outcome.add(report):
                    self.log.log_event("update-dropped", **where, client=int(plan.client[row]), reason=reason)
                done += len(report.finite)
                if self.observer is not None:
                    self.observer.on_block(plan.round, done, total)
        if self.engine.hooks.stop_requested() and self.engine.is_whole:
            raise Interrupted("stopped")
        self._check_quorum(timed, int(outcome.usable.sum()), "usable", self.advice)
        return outcome

    def _check_quorum(self, timed: TimedPlan, num_left: int, what: str, remedy: Callable[[], str]) -> None:
        if self.options.quorum is None:
            return
        needed = max(1, math.ceil(self.options.quorum * timed.num_expected))
        if num_left < needed:
            committed = self.progress.address if self.engine.is_whole else self.committed
            where, counts = self._address(timed.plan.round, timed.plan.phase), (num_left, timed.num_expected, needed)
            parts = where, counts, what, self.planner.section, remedy(), committed
            raise QuorumError(round_record.describe_quorum(*parts))

    def _evaluate(self, round: int) -> Record:
        whole = self.workload.metrics(self.engine.evaluate(WHOLE, round))
        by_capacity = {
            capacity: whole if capacity == 1.0 else self.workload.metrics(self.engine.evaluate(index, round))
            for capacity, index in self.options.evaluate_variants.items()
        }
        held = {
            name: self.workload.metrics(self.engine.evaluate(index, round))
            for name, index in self.options.evaluate_held.items()
        }
        own = self.engine.measure(self.planner.own_models(round, *self.options.evaluate_own))
        named = {f"{capacity:g}": metrics for capacity, metrics in by_capacity.items()}
        parts = round_record.divided(whole, named), round_record.divided(whole, held, "holding")
        return round_record.merged(whole, *parts, own)

    def _commit(self, *, if_due: bool = False) -> None:
        is_due = time.monotonic() - self._committed_at >= self.options.commit_every_seconds
        if self.committed == self.progress.address or (if_due and not is_due):
            return
        with self.spans.span("commit"):
            arrays = {STATE + name: value for name, value in self.engine.held().items()}
            if self.store is not None:
                arrays |= {STORE + name: value for name, value in self.store.index().items()}
            self.log.sync()
            (round, phase), rows, logs = self.progress.address, self.engine.save_rows, self.log.positions()
            with self.spans.stage("checkpoint", sum(value.nbytes for value in arrays.values())):
                self.checkpoints.commit(round, arrays, vars(self.progress), logs, phase=phase, save_rows=rows)
            if self.store is not None:
                self.store.release()
        self.committed, self._committed_at = self.progress.address, time.monotonic()
