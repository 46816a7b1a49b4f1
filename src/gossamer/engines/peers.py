"""What every engine of peers does: cut plans into blocks, report what came of them, evaluate and measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import others_median
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineSetup, Record, spread
from gossamer.engines.statistics import Statistics, name_of
from gossamer.engines.task import WHOLE, Task, Variant
from gossamer.engines.training.batches import sample_bytes
from gossamer.plan import STOPPED, RoundPlan, TrainReport
from gossamer.profiling import recorder
from gossamer.round_record import merged
from gossamer.storage.checkpoint import Files
from gossamer.topology.streaming import panels
from gossamer.workloads.base import Sums, add_sums

BLOCK_BYTES = 4 << 20  # of models, and of samples, that are trained at once: to stay in cache
MAX_ROWS = 1 << 12
ROWS_ONE_BY_ONE = 16
MERGED = -1  # number of the mean of all peers' models among the models that are evaluated
Message = dict[str, Any]


class PeerEngine(ABC):
    """Trains peers; where their rows live and how messages travel is up to the engines that derive from it.

    Attributes:
        hooks, is_whole: see `Engine`.
    """

    is_whole = True
    trains_in_place = False  # whether the state is not whole from training to the end of the exchange
    _mean: Tensor  # [d], that `_take_mean` keeps

    def __init__(self, task: Task, x: Tensor, bounds: list[list[int]], setup: EngineSetup) -> None:
        """Bind a task with a topology.

        Args:
            x: [d], the initial model.
            bounds: [low, high] of the peers whose rows lie together.
        """
        assert task.topology is not None
        self._task, self._bounds, self._block_size, self.hooks = task, bounds, setup.block_size, setup.hooks
        self._num_peers, self._dtype = task.topology.n, x.dtype
        self._columns = [[one.start, one.stop] for one in panels(self._num_peers, len(x), x.dtype.itemsize)]
        self._sample_bytes = sample_bytes(task.workload)
        self._squares: float | None = None
        self._statistics = Statistics()

    @abstractmethod
    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        """Have jobs done that are listed by `bounds`; yield the replies in any order, see `PeerWorker.train`."""

    @abstractmethod
    def _mix(self, plan: RoundPlan) -> None:
        """Mix and update."""

    @abstractmethod
    def _take_mean(self) -> float:
        """Take the mean of all peers' models, and keep it; return the sum of squared distances from it."""

    @abstractmethod
    def _models(self, peers: list[int]) -> Any:
        """Return what `_map_chunks` is to be given of the models of some peers, or of `MERGED`."""

    @abstractmethod
    def _map_chunks(self, message: Message, models: Any, num_chunks: int) -> list[list[Any]]:
        """Handle one message per chunk; return the sums of each model, chunk by chunk, see `PeerWorker.evaluate`."""

    @abstractmethod
    def read(self) -> Arrays:
        """Return the state arrays [n, d]."""

    def held(self) -> Arrays:
        """Return what this process commits: all arrays, unless an engine says otherwise."""
        arrays = self.read()
        recorder.count_bytes(lambda: sum(value.nbytes for value in arrays.values()))
        return arrays

    def save_rows(self, directory: Path) -> Files:
        """Have other processes write what they hold: nothing, unless an engine says otherwise."""
        return {}

    # ---- the two verbs

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train all peers."""
        self.is_whole = not self.trains_in_place
        jobs = [self._jobs(plan, low, high) for low, high in self._bounds]
        missing = {job["first"]: len(job["peers"]) for block in jobs for job in block}
        for reply in self._replies(plan, jobs):
            first = reply["first"]
            rows = slice(first, first + missing.pop(first))
            yield TrainReport(rows, reply["loss"], reply["finite"], norm=reply["norm"])
        for first, number in missing.items():
            yield TrainReport.of_missing(slice(first, first + number), STOPPED)

    def exchange(self, plan: RoundPlan) -> None:
        """Mix and update."""
        self._mix(plan)
        self._squares, self.is_whole = None, True

    # ---- evaluation

    def model(self) -> Tensor:
        """Return the mean of all peers' models, [d]."""
        self._distance()
        return self._mean.clone()

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the merged model, the mean of all peers', or its sub-model of a variant at `round`."""
        self._distance()
        if variant == WHOLE:
            self._statistics.begin(round)
        return self._evaluate([MERGED], variant, round)[0]

    def measure(self, plan: RoundPlan) -> Record:
        """Return how far peers are from their mean, and what they reach by themselves.

        ``consensus_distance`` is the root mean square distance from the mean, ``sqrt(1/n sum_i |x_i - mean|^2)``;
        ``<metric>_peers`` holds mean, min and max over the plan's peers.
        """
        workload = self._task.workload
        record: Record = {"consensus_distance": float(np.sqrt(self._distance() / self._num_peers))}
        if workload.traits.has_peer_metrics:
            record = merged(record, workload.peer_metrics(self.read()["x"]))
        chosen = np.sort(plan.client).tolist()
        if not chosen:
            return record
        return merged(record, spread([workload.metrics(sums) for sums in self._evaluate(chosen, WHOLE, 0)], "_peers"))

    def _distance(self) -> float:
        """Take the mean of all peers' models, once after each exchange; return the squared distances from it."""
        if self._squares is None:
            self._squares = self._take_mean()
        return self._squares

    def _evaluate(self, peers: list[int], variant: int, round: int) -> list[Sums]:
        """Return the sums over all chunks of the test data of each of `peers`."""
        workload, models = self._task.workload, self._models(peers)
        where = {"peers": peers, "variant": variant, "round": round}
        collected = self._map_chunks({"kind": "statistics"} | where, models, workload.num_statistics_chunks)
        sums = _added_up(collected, len(peers))
        capacity = self._task.capacity(variant)
        if variant < 0 or self._task.variants[variant].has_all_modules:
            for peer, one in zip(peers, sums, strict=True):
                self._statistics.keep(name_of(capacity, None if peer == MERGED else peer), one)
        statistics = [{name: value.tolist() for name, value in one.items()} for one in sums]
        message = {"kind": "evaluate", "statistics": statistics} | where
        return _added_up(self._map_chunks(message, models, workload.num_evaluation_chunks), len(peers))

    # ---- inside

    def _replies(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        """Have jobs done; those in which an update may be too large are done again once all norms are known."""
        norms, again = list[float](), set[int]()
        for reply in self._train_jobs(plan, jobs):
            norms += reply["norm"]
            if reply["again"]:
                again.add(reply["first"])
            else:
                yield reply
        if again:
            assert self._task.max_update_norm_ratio is not None
            bound = {"max_norm": self._task.max_update_norm_ratio * others_median(norms)}
            repeated = [[job | bound for job in self._repeated(block, again)] for block in jobs]
            yield from (reply for reply in self._train_jobs(plan, repeated) if reply["first"] in again)

    def _repeated(self, block: list[Message], again: set[int]) -> list[Message]:
        """Return which jobs of a block must be done so that those whose first rows are in `again` are."""
        return [job for job in block if job["first"] in again]

    def _jobs(self, plan: RoundPlan, low: int, high: int) -> list[Message]:
        """Describe what those of the peers low, ..., high - 1 train, as `PeerWorker.train` takes it."""
        found = []
        for variant in self._task.variants:
            rows = plan.variant_rows(variant.index)
            for first, last in _runs(plan.client[rows], low, high, self._rows_of_block(variant)):
                block = slice(rows.start + first, rows.start + last)
                found.append(
                    {
                        "kind": "train",
                        "round": plan.round,
                        "phase": plan.phase,
                        "variant": variant.index,
                        "first": block.start,
                        "peers": plan.client[block].tolist(),
                        "steps": plan.steps[block].tolist(),
                        "lr": plan.lr,
                        "max_norm": None,
                    }
                )
        return found

    def _rows_of_block(self, variant: Variant) -> int:
        """Return how many peers of a variant to train together, so that their models and samples stay in cache."""
        if self._block_size is not None:
            return self._block_size
        if not variant.mode.stacked:
            return ROWS_ONE_BY_ONE
        model_bytes = variant.layout.d * self._dtype.itemsize
        batch_bytes = self._sample_bytes * self._task.batch_size
        return max(2, min(BLOCK_BYTES // model_bytes, 4 * BLOCK_BYTES // batch_bytes, MAX_ROWS))


def mix_message(plan: RoundPlan) -> Message:
    """Describe how peers mix, as `Mixer.update` takes it."""
    return {"kind": "mix", "round": plan.round, "phase": plan.phase, "mixing": plan.mixing, "lr": plan.lr}


def _runs(clients: NDArray[np.int64], low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive runs of clients in low, ..., high - 1, at most `size` long."""
    inside = np.concatenate([[False], (clients >= low) & (clients < high), [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        for start in range(first, last, size):
            yield start, min(start + size, last)


def _added_up(chunks: list[list[Mapping[str, Any]]], num_models: int) -> list[Sums]:
    """Add up the sums of each model, in the order of the chunks."""
    arrays = [[{name: np.array(v, dtype=np.float64) for name, v in one.items()} for one in chunk] for chunk in chunks]
    return [add_sums([chunk[number] for chunk in arrays]) for number in range(num_models)]
