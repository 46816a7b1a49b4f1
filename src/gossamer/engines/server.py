"""What every engine of a federation does at the server: cut plans into blocks, add up, combine, update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import others_median
from gossamer.algorithms.base import Arrays
from gossamer.engines.aggregation import RemoteAggregation, Trees, add_, block_result, totals, trees_of
from gossamer.engines.base import EngineSetup, Record
from gossamer.engines.client_models import ClientModels
from gossamer.engines.private_rows import PrivateRows
from gossamer.engines.statistics import Statistics, name_of
from gossamer.engines.task import WHOLE, Task, Variant
from gossamer.engines.training.job import BlockResult, Job
from gossamer.engines.training.rows import row_norms
from gossamer.engines.updating import Collected, apply_, combined
from gossamer.errors import ConfigError
from gossamer.plan import STOPPED, Block, RoundPlan, TrainReport
from gossamer.profiling import recorder
from gossamer.storage.checkpoint import Files
from gossamer.storage.client_store import ClientStore
from gossamer.submodel.layout import ALIGNMENT
from gossamer.threads import one_thread
from gossamer.workloads.base import Sums, add_sums

STACKED_BLOCK_FLOATS = 1 << 20  # weights of one stacked block: a few MB, to stay in cache
ORDER = "order."
KEPT = "private.kept"  # state array of runs whose clients keep their private state themselves, see engine network
MAX_BLOCK_ROWS = 64
MAX_BLOCK_ROWS_ONE_BY_ONE = 8
BLOCKS_PER_WORKER = 8
MAX_PARTICIPANTS = 1 << 40  # participants: more only make more blocks, not larger ones
SMALL_BLOCK_FLOATS = 1 << 18  # weights of a block of participants trained one by one, below which it is made larger


class FederatedEngine(ABC):
    """A server's side; where blocks are trained is up to the engines that derive from it.

    Attributes:
        num_workers: processes that train, by which the size of blocks is chosen. Changes no bits.
        hooks: see `EngineHooks`.
    """

    is_whole = True
    is_remote = False

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        store: ClientStore | None,
        setup: EngineSetup,
        num_workers: int,
    ) -> None:
        """Bind a task to the resident arrays `state`, [1, d] each, which are changed in place from now on."""
        self._task, self._block_size = task, setup.block_size
        self._phase = task.phases[0]  # the task of the phase that is under way
        self._max_norm: float | None = None  # of an update, while blocks are trained again
        self.num_workers, self.hooks = num_workers, setup.hooks
        self._state: Arrays = dict(state)
        self._order = task.cutter.order(self._state["x"][0])
        self._results: list[tuple[Block, list[bool]]] = []
        self._trees = Trees()
        self._collected = Collected()
        self._private: dict[int, dict[str, Tensor]] = {}
        self._reasons: dict[int, str] = {}  # why rows of the plan return nothing; without one: a stop was requested
        self._rows = PrivateRows(store, self._state["x"].dtype)
        self._statistics = Statistics()
        self._elsewhere: RemoteAggregation | None = None  # which does what is done here otherwise
        if setup.offload is not None and "aggregate" in setup.offload.stage.kinds:
            self._elsewhere = RemoteAggregation(task, self._state, setup.offload, setup)

    @abstractmethod
    def _begin(self) -> None:
        """Prepare for the blocks of a phase, whose partial sums will be in `_trees`."""

    @abstractmethod
    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        """Train blocks somewhere, and yield their results in any order; after a request to stop not all of them."""

    def _end(self) -> None:  # noqa: B027
        """Complete the partial sums of a phase in `_trees`, where blocks are added up elsewhere."""

    def _owns(self, value: Tensor | None) -> bool:
        """Say whether a part of a payload may be overwritten."""
        return True

    @abstractmethod
    def _map_chunks(self, message: dict[str, Any], num_chunks: int) -> list[Sums]:
        """Handle one message per chunk of data, and return the sums in the order of the chunks."""

    def close(self) -> None:
        """Stop workers and free memory."""
        if self._elsewhere is not None:
            self._elsewhere.close()

    # ---- the two verbs

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train the plan's participants, and keep sums for `exchange`."""
        self._phase = self._task.phases[plan.phase]
        self._results, self._collected, self._private = [], Collected(), {}
        for axis, order in self._task.cutter.order(self._state["x"][0]).items():
            self._order[axis].copy_(order)
        blocks = [block for variant in self._task.variants for block in self._blocks_of(plan, variant)]
        counts = {variant.index: plan.variant_rows(variant.index) for variant in self._task.variants}
        present = {index: rows.stop - rows.start for index, rows in counts.items() if rows.stop > rows.start}
        self._trees = trees_of(self._phase, present)
        if self._elsewhere is not None:
            self._elsewhere.begin(plan.phase, present)
        missing = {block.rows.start: block for block in blocks}
        absent = self.hooks.absent(plan.round, plan.phase)
        clients = enumerate(plan.client.tolist() if absent else ())
        lost = {row: absent[client] for row, client in clients if client in absent}
        self._reasons = lost
        self._begin()
        for result in self._results_of(plan, [block for block in blocks if block.rows.start not in lost]):
            del missing[result.block.rows.start]
            self._keep(result)
            yield result.report
        for block in missing.values():  # sums do without them
            report = TrainReport.of_missing(block.rows, self._reasons.get(block.rows.start, STOPPED))
            described = {"arrays": [], "loss": report.loss, "finite": report.finite, "norm": report.norm}
            self._keep(self._block_result(block, described, []))
            yield report
        self._end()
        self._collected.sums |= totals(self._trees)

    def exchange(self, plan: RoundPlan) -> None:
        """Combine, update the state in place and keep the survivors' private state."""
        kept = self.survivors(plan)
        if self._elsewhere is not None:
            inbox = self._elsewhere.combine(plan, kept, self._order)
        else:
            inbox = combined(self._task, self._state, self._order, plan, kept, self._collected)
        self.is_whole = False
        apply_(self._task, self._state, plan, inbox)
        with recorder.span("store"):
            self._keep_private(plan)
        self.is_whole = True

    def survivors(self, plan: RoundPlan) -> NDArray[np.bool_]:
        """Return bool [p]: whose update is in the sums."""
        kept = np.zeros(len(plan.client), dtype=bool)
        for block, finite in self._results:
            kept[block.rows] = finite
        return kept

    # ---- evaluation and state

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the model, or its sub-model of a variant at `round`, over all chunks of the test data."""
        workload, where = self._task.workload, {"variant": variant, "round": round}
        collected = self._map_chunks({"kind": "statistics"} | where, workload.num_statistics_chunks)
        statistics = add_sums(collected)
        if variant == WHOLE:
            self._statistics.begin(round)
        if variant < 0 or self._task.variants[variant].has_all_modules:
            self._statistics.keep(name_of(self._task.capacity(variant)), statistics)
        listed = {name: value.tolist() for name, value in statistics.items()}
        return add_sums(
            self._map_chunks({"kind": "evaluate", "statistics": listed} | where, workload.num_evaluation_chunks)
        )

    def measure(self, plan: RoundPlan) -> Record:
        """Return what clients reach by themselves, see `ClientModels`; nothing where they have nothing of their own."""
        if not self._task.personal and not plan.steps.any():
            return {}
        self._phase = self._task.phases[-1]
        clients = ClientModels(self._phase, self._state, self._order)
        return clients.measure(plan, self._client_state, self._statistics.keep)

    def read(self) -> Arrays:
        """Return copies of the state arrays [1, d], of the last round's order of channels as ``order.<axis>``, and
        of the last `Statistics`.
        """
        order = {ORDER + axis: value for axis, value in self._order.items()}
        return {name: value.clone() for name, value in (self._state | order).items()} | self._statistics.read()

    def model(self) -> Tensor:
        """Return the server's model, [d]."""
        return self._state["x"][0].clone()

    def held(self) -> Arrays:
        """Return what this process commits, which is everything."""
        arrays = self.read()
        recorder.count_bytes(lambda: sum(value.nbytes for value in arrays.values()))
        return arrays

    def save_rows(self, directory: Path) -> Files:
        """Have other processes write what they hold of the state, which is nothing."""
        return {}

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace state arrays; those that are already in place cost nothing.

        Raises:
            ConfigError: the private state of clients is with these, where this engine does not find it.
        """
        if KEPT in state:
            raise ConfigError("the clients keep their private state themselves: resume with --engine network")
        for name, value in self._statistics.take(state).items():
            target = self._order[name.removeprefix(ORDER)] if name.startswith(ORDER) else self._state[name]
            if value is not target:
                target.copy_(value)

    # ---- inside

    def _results_of(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        """Train blocks; those in which an update may be too large are trained again once all norms are known."""
        bound, ratio = self._largest_norm(), self._task.max_update_norm_ratio
        norms, again = list[float](), list[Block]()
        for result in self._train_blocks(plan, blocks):
            norms += result.norm
            if any(norm > bound for norm in result.norm):
                again.append(result.block)
            else:
                yield result
        if again:
            assert ratio is not None
            self._max_norm = max(bound, ratio * others_median(norms))
            try:
                yield from self._train_blocks(plan, again)
            finally:
                self._max_norm = None

    def _largest_norm(self) -> float:
        """Return the norm of an update beyond which it is first compared with all the others."""
        ratio, downlink = self._task.max_update_norm_ratio, self._phase.algorithm.traits.downlink or ()
        if ratio is None:
            return math.inf
        with one_thread():
            return ratio * row_norms({name: self._state[name] for name in downlink})[0]

    def _keep(self, result: BlockResult) -> None:
        """Add up what a block returned, and keep the rest of it, for `exchange`."""
        block = result.block
        self._results.append((block, result.finite))
        if self._elsewhere is not None:
            self._elsewhere.add(result)
        else:
            with one_thread(), recorder.span("aggregate"):
                recorder.count_bytes(lambda: result.payload_bytes)
                add_(self._phase, self._trees, self._collected, result, self._owns)
        if result.private:
            self._private[block.rows.start] = {name: rows.clone() for name, rows in result.private.items()}

    def _block_result(self, block: Block, reply: Mapping[str, Any], arrays: Iterable[Tensor]) -> BlockResult:
        """Put together what came of a block: `arrays` are what ``reply["arrays"]`` names, see `named_arrays`."""
        return block_result(self._phase, block, reply, arrays)

    def _floats_of_a_slot(self) -> int:
        """Return how large a slot for the results of any block must be, client state included."""
        largest = 0
        for variant, phase in product(self._task.variants, self._task.phases):
            traits = phase.algorithm.traits
            tile, tiles = self._block_shape(variant, MAX_PARTICIPANTS)
            is_summed = variant.shares_window and "rows" not in traits.uplink.values()
            num_sums = tiles if is_summed else tile * tiles
            num_scalars = len({*traits.scalars} & {*traits.uplink})
            num_rows = (len(traits.uplink) - num_scalars) * num_sums + 2 * len(phase.client_arrays) * tile * tiles
            largest = max(largest, num_rows * variant.layout.d + num_scalars * num_sums * ALIGNMENT)
        return largest

    def _blocks_of(self, plan: RoundPlan, variant: Variant) -> list[Block]:
        rows = plan.variant_rows(variant.index)
        tile, tiles = self._block_shape(variant, rows.stop - rows.start)
        return list(plan.blocks(variant.index, tile, tiles))

    def _block_shape(self, variant: Variant, num_rows: int) -> tuple[int, int]:
        """Return the rows of a tile, a power of two, and the tiles of a block."""
        if self._block_size is not None:
            return self._block_size, 1
        per_worker = math.ceil(num_rows / max(1, self.num_workers))
        if not variant.mode.stacked:
            # Several blocks a worker even out the load, but a block of next to no work costs more than it evens out.
            parts = BLOCKS_PER_WORKER if self.num_workers > 1 else 1
            small = SMALL_BLOCK_FLOATS // variant.layout.d
            rows = max(1, per_worker // parts, min(per_worker, small))
            return min(1 << (rows.bit_length() - 1), MAX_BLOCK_ROWS_ONE_BY_ONE), 1
        fitting = min(max(2, STACKED_BLOCK_FLOATS // variant.layout.d), MAX_BLOCK_ROWS)  # stay in cache
        num_blocks = max(1, math.ceil(per_worker / fitting))  # no row of this variant may be in the round
        tile = min(4, 1 << (fitting.bit_length() - 1))
        return tile, max(1, math.ceil(per_worker / num_blocks / tile))

    def _client_state(self, job: Job) -> Arrays:
        """Return the private rows of a job's clients, see `PrivateRows`."""
        return self._rows.of_job(self._phase, job, self._order)

    def _keep_private(self, plan: RoundPlan) -> None:
        """Store the private rows of the survivors."""
        for block, finite in self._results:
            if not (private := self._private.get(block.rows.start)):
                continue
            survivors = torch.tensor(finite)
            kept = {name: rows[survivors] for name, rows in private.items()}
            clients = plan.client[block.rows][survivors.numpy()]
            self._rows.keep(self._phase, block.variant, plan.round, clients, kept, self._order)

    def _job(self, plan: RoundPlan, block: Block) -> Job:
        rows = block.rows
        return Job(
            plan.round,
            plan.phase,
            block,
            plan.client[rows],
            plan.weight[rows],
            plan.steps[rows],
            plan.lr,
            self._max_norm,
        )
