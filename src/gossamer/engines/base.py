"""What an engine is, and the options that every engine shares."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.errors import Interrupted
from gossamer.plan import RoundPlan, TrainReport
from gossamer.profiling.offload import Offload
from gossamer.storage.checkpoint import Files
from gossamer.workloads.base import Sums

Record = dict[str, Any]
Absent = Callable[[int, int], Mapping[int, str]]  # (round, phase) -> {client: reason}
DEADLINE, OVER_SELECTION, GONE, REFUSED = "deadline", "over-selection", "gone", "refused"
BY_THE_CLOCK = (DEADLINE, OVER_SELECTION, GONE, REFUSED)  # why real clients are dropped that have not answered
STOP_SIGNALS = tuple(  # that end a process unless it handles them, and ask a run to stop
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if name in signal.Signals.__members__
)


@dataclass(frozen=True)
class AbsentNeighbours:
    """Peers that were away for some of the others. Rounds and phases are counted from 0.

    Attributes:
        missing: (round, phase) -> {peer: those whose rows it did not get}.
        taken: (round, phase) -> {peer: whose state it began the phase with, because it had fallen behind}.
    """

    missing: Mapping[tuple[int, int], Mapping[int, Sequence[int]]]
    taken: Mapping[tuple[int, int], Mapping[int, int]]


def never() -> bool:
    """Return false."""
    return False


def nobody(round: int, phase: int) -> Mapping[int, str]:
    """Return that nobody is absent."""
    return {}


def _ignore(kind: str, **fields: Any) -> None:
    pass


@dataclass(frozen=True)
class EngineHooks:
    """Callbacks of an engine to the run that it works for.

    Attributes:
        stop_requested: asked between blocks and steps; once it is true, the participants left are reported as missing.
        report: callback for what goes wrong and is repaired: ``report(kind, **fields)``.
        must_stop: asked where to stop would lose work; true a few seconds after `stop_requested`.
        absent: asked who does not train in a phase, because it was dropped in the run that is replayed, and why.
        neighbours: whose rows peers did not get in the run that is replayed; None: all got all.
        tell: gets lines that whoever watches the run should see.
        show: gets what there is to see of real clients, again and again, see `gossamer.engines.network.state`.
    """

    stop_requested: Callable[[], bool] = never
    report: Callable[..., None] = _ignore
    must_stop: Callable[[], bool] = never
    absent: Absent = nobody
    neighbours: AbsentNeighbours | None = None
    tell: Callable[[str], None] = lambda line: None
    show: Callable[[Sequence[Mapping[str, Any]]], None] = lambda clients: None

    def check(self) -> None:
        """Raise `Interrupted` if what is under way must be given up."""
        if self.must_stop():
            raise Interrupted("stopped")


NO_HOOKS = EngineHooks()


@dataclass(frozen=True)
class WallClock:
    """When a phase of real clients goes on without those who have not answered.

    Attributes:
        deadline_seconds: after it began; None: it waits for them.
        num_awaited: number of answers after which it goes on; None: all.
    """

    deadline_seconds: float | None = None
    num_awaited: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """By how many processes a task is run, and where. Nothing of it changes bits.

    Attributes:
        workers: number of processes that train (0: this one), or of Ray actors (0: one for each CPU, counted every
            round).
        block_size: number of participants that are trained together, a power of two; None: a suitable one.
        hooks: see `EngineHooks`.
        straggler_seconds: see `gossamer.config.schema.EngineOptions`.
        address: address of a Ray cluster, or "auto"; None: Ray is started here. Of engine network, host:port to listen
            on; None: on loopback, for processes that are started here.
        kit: folder of the start-up kit of a server of engine network; None: there is none.
        recipe: recipe by which actors rebuild the task, see `gossamer.task.task_of`.
        directory: run directory, into which other processes may write what they hold; None: nobody does.
        clock: see `WallClock`; None: nobody is dropped by the clock.
        offload: stage that a side-car process does, see `gossamer.profiling.sidecar`; None: no stage of the engine's.
    """

    workers: int
    block_size: int | None = None
    hooks: EngineHooks = NO_HOOKS
    straggler_seconds: float | None = None
    address: str | None = None
    kit: Path | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    clock: WallClock | None = None
    offload: Offload | None = None


class Engine(Protocol):
    """Carries out the two verbs of a phase where the state lives.

    Attributes:
        hooks: see `EngineHooks`.
        is_whole: whether the state is that of whole phases. Peers train in place, so between `train` and the end of
            `exchange` theirs is not, and cannot be committed.
    """

    hooks: EngineHooks

    @property
    def is_whole(self) -> bool:
        """See the class."""
        ...

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train the plan's participants, and keep what they return for `exchange`.

        Yields reports as participants return, in any order, and at last those of the missing: every row of the plan is
        in one report.
        """
        ...

    def exchange(self, plan: RoundPlan) -> None:
        """Combine what was trained, update the state and keep the survivors' private state."""
        ...

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the model (`WHOLE`), or its sub-model of a variant, on the test data; of peers: their mean."""
        ...

    def measure(self, plan: RoundPlan) -> Record:
        """Return what else there is to log of the state: how participants do by themselves; how far apart peers are.

        Args:
            plan: participants whose own models are evaluated; `steps` are those of another evaluation, after local
                steps, 0 for none.
        """
        ...

    def read(self) -> Arrays:
        """Return the state arrays, [1, d] at a server, [n, d] of peers; valid until the next `train` or `write`."""
        ...

    def model(self) -> Tensor:
        """Return the model, [d]: the server's, or the mean of all peers'."""
        ...

    def held(self) -> Arrays:
        """Return those of `read` that this process holds, for a commit; `save_rows` writes the others."""
        ...

    def save_rows(self, directory: Path) -> Files:
        """Have other processes write the state that they hold, see `gossamer.storage.checkpoint.Checkpoints.commit`."""
        ...

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays; of a `StoredArrays` each process reads what it holds."""
        ...

    def close(self) -> None:
        """Stop workers and free memory."""
        ...


def spread(found: Sequence[Mapping[str, float]], suffix: str) -> Record:
    """Return mean, min and max of each metric over those that have it, under its name and a suffix."""
    record: Record = {}
    for name in dict.fromkeys(name for metrics in found for name in metrics):
        values = [metrics[name] for metrics in found if name in metrics]
        record[f"{name}{suffix}"] = {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
    return record
