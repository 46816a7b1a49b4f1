"""What a server does between training and its update, here or in a side-car process: add up, and combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.engines.base import EngineSetup
from gossamer.engines.task import Task
from gossamer.engines.training.job import BlockResult
from gossamer.engines.training.worker import named_arrays
from gossamer.engines.updating import Collected, Inbox, combined
from gossamer.plan import Block, RoundPlan
from gossamer.profiling import recorder
from gossamer.profiling.offload import Offload
from gossamer.profiling.sidecar import SideCar

Trees = dict[tuple[int, str], TreeSum]


def trees_of(phase: Task, counts: Mapping[int, int]) -> Trees:
    """Return the trees of a phase, empty; `counts`: ``{variant: participants}``, at least one each."""
    return {(index, name): TreeSum(count) for index, count in counts.items() for name in phase.algorithm.traits.uplink}


def add_(
    phase: Task, trees: Trees, found: Collected, result: BlockResult, owns: Callable[[Tensor | None], bool]
) -> None:
    """Add up what a block returned, and keep in `found` what is not added up.

    Args:
        owns: says of a part of the payload whether it may be overwritten.
    """
    block = result.block
    for name, parts in result.payload.items():
        is_summed = phase.is_summed(block.variant, name)
        for part, value in enumerate(parts):
            if is_summed:
                level = block.tile.bit_length() - 1
                trees[block.variant, name].add(block.first_tile + part, value, level=level, owned=owns(value))
            elif value is not None:
                found.rows[block.rows.start + part, name] = value.clone()


def totals(trees: Trees) -> dict[tuple[int, str], Tensor]:
    """Return the sums of those trees in which anything is."""
    return {key: tree.total for key, tree in trees.items() if tree.total is not None}


def block_result(phase: Task, block: Block, reply: Mapping[str, Any], arrays: Iterable[Tensor]) -> BlockResult:
    """Put together what came of a block: `arrays` are what ``reply["arrays"]`` names, see `named_arrays`."""
    num_rows = block.rows.stop - block.rows.start
    payload: dict[str, list[Tensor | None]] = {
        name: [None] * (num_leaves_of(block) if phase.is_summed(block.variant, name) else num_rows)
        for name in phase.algorithm.traits.uplink
    }
    private: dict[str, Tensor] = {}
    for (key, part), value in zip(reply["arrays"], arrays, strict=True):
        group, name = key.split(".", 1)
        if group == "private":
            private[name] = value
        else:
            payload[name][part] = value
    return BlockResult(block, payload, reply["loss"], reply["finite"], reply["norm"], private)


def num_leaves_of(block: Block) -> int:
    """Return the number of tiles of a block."""
    num_rows: int = block.rows.stop - block.rows.start
    return math.ceil(num_rows / block.tile)


class RemoteAggregation:
    """Has a side-car add up what the blocks of a phase return, and combine it."""

    def __init__(self, task: Task, state: Mapping[str, Tensor], offload: Offload, setup: EngineSetup) -> None:
        """Fork the side-car; of `state` only dtypes matter there."""
        self._task, self._state, self._counts = task, state, dict[int, int]()
        self._car = SideCar(
            offload, lambda: _Aggregator(task, state).handle, setup.hooks.check, num_processes=setup.workers + 1
        )

    def begin(self, phase: int, counts: Mapping[int, int]) -> None:
        """Begin a phase; `counts`: ``{variant: participants}``."""
        self._phase, self._counts = phase, dict(counts)

    def add(self, result: BlockResult) -> None:
        """Hand over what a block returned."""
        block = result.block
        named = [one for one in named_arrays(result) if one[0].startswith("payload.")]
        message = {
            "kind": "add",
            **self._first(),
            "block": [block.variant, block.first_tile, block.tile, block.rows.start, block.rows.stop],
            "arrays": [[name, part] for name, part, _ in named],
        }
        self._car.submit(message, [value for *_, value in named])

    def combine(self, plan: RoundPlan, kept: NDArray[np.bool_], order: Mapping[str, Tensor]) -> Inbox | None:
        """Return what `combined` does.

        Raises:
            EngineError: the side-car has ended.
        """
        message = {
            "kind": "combine",
            **self._first(),
            "plan": [plan.round, plan.phase, plan.lr, *(each.tolist() for each in _columns(plan))],
            "kept": kept.tolist(),
            "order": list(order),
        }
        size = self._task.cutter.layout.d * self._state["x"].itemsize
        size *= len(self._task.phases[plan.phase].algorithm.traits.uplink)
        self._car.submit(message, list(order.values()), num_bytes=0, worked_bytes=size)
        answer = self._car.result()
        arrays = iter(answer.arrays)
        found = {name: next(arrays) if is_there else None for name, is_there in answer.message["inbox"]}
        return found or None

    def close(self) -> None:
        """End the side-car."""
        self._car.close()

    def _first(self) -> dict[str, Any]:
        """Return what the first message of a phase says besides."""
        counts, self._counts = self._counts, {}
        return {"counts": list(counts.items()), "phase": self._phase} if counts else {}


def _columns(plan: RoundPlan) -> tuple[NDArray[Any], ...]:
    return plan.client, plan.weight, plan.steps, plan.variant


class _Aggregator:
    """What the side-car does with the messages of a `RemoteAggregation`."""

    def __init__(self, task: Task, state: Mapping[str, Tensor]) -> None:
        self._task, self._state = task, dict(state)
        self._phase, self._trees, self._found = task.phases[0], Trees(), Collected()

    def handle(self, message: dict[str, Any], arrays: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Do one piece."""
        if "counts" in message:
            self._phase = self._task.phases[message["phase"]]
            self._trees, self._found = trees_of(self._phase, dict(message["counts"])), Collected()
        if message["kind"] == "add":
            variant, first_tile, tile, low, high = message["block"]
            block = Block(variant, first_tile, tile, slice(low, high))
            result = block_result(self._phase, block, message | {"loss": [], "finite": [], "norm": []}, arrays)
            recorder.count_bytes(lambda: result.payload_bytes)
            add_(self._phase, self._trees, self._found, result, lambda value: True)
            return {}, []
        inbox = self._combine(message, arrays) or {}
        named = [[name, value is not None] for name, value in inbox.items()]
        return {"inbox": named}, [value for value in inbox.values() if value is not None]

    def _combine(self, message: dict[str, Any], arrays: list[Tensor]) -> Inbox | None:
        round, phase, lr, client, weight, steps, variant = message["plan"]
        plan = RoundPlan(
            round,
            phase,
            np.array(client, dtype=np.int64),
            np.array(weight, dtype=np.float64),
            np.array(steps, dtype=np.int32),
            np.array(variant, dtype=np.int16),
            lr,
        )
        self._found.sums = totals(self._trees)
        kept, order = np.array(message["kept"], dtype=bool), dict(zip(message["order"], arrays, strict=True))
        return combined(self._task, self._state, order, plan, kept, self._found)
