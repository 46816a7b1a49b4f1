"""A rank's share of a federation: blocks are trained where they are sent, and added up before they leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.algorithms.base import Arrays
from gossamer.engines.collective.environment import use_own_device
from gossamer.engines.collective.group import DTYPES, Group, Message
from gossamer.engines.collective.world import Letter
from gossamer.engines.private_rows import PrivateRows
from gossamer.engines.task import Task
from gossamer.engines.training.job import BlockResult, Job
from gossamer.engines.training.worker import Worker, named_arrays
from gossamer.engines.updating import Collected, update_
from gossamer.plan import RoundPlan
from gossamer.profiling import recorder
from gossamer.storage.row_files import Address, SharedRows, Work, settle
from gossamer.threads import one_thread

STAGES = {"state": "receive", "train": "train", "sums": "aggregate", "finish": "update", "settle": "store"}
Key = tuple[int, str]  # number of a variant, name of a payload


class ClientRank:
    """Trains and evaluates for a federation, with a copy of the server's state; on every rank alike."""

    def __init__(self, task: Task, group: Group, state: Arrays, order: Arrays, store: Message | None) -> None:
        """Bind a task.

        Args:
            task: task that trains the clients.
            group: the group of all ranks.
            state, order: the arrays of the state and the order of channels, changed in place.
            store: ``directory`` of the store of private client state, and ``dtype``; None: the clients keep none.
        """
        use_own_device(variant.mode.device for variant in task.variants)
        self._task, self._group, self._state, self._order = task, group, state, order
        self._shared, dtype = None, torch.float32
        if store is not None:
            dtype = DTYPES[store["dtype"]]
            self._shared = SharedRows(Path(store["directory"]), task.stored_arrays, dtype)
        self._rows = PrivateRows(self._shared, dtype)
        self._private: list[tuple[Task, Job, BlockResult]] = []  # of the phase, until it is known what is used
        self._counts: dict[int, int] = {}
        self._summed: dict[Key, Tensor] = {}
        self._worker = Worker(task, state, order, torch.zeros(0, 0))
        self._trees: dict[Key, TreeSum] = {}

    def handle(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Do one job, see `World.ask`."""
        with recorder.span(STAGES.get(message["kind"], "evaluate")):
            return self._handle(message, arrays)

    def _handle(self, message: Message, arrays: list[Tensor]) -> Letter:
        kind = message["kind"]
        if kind == "state":
            return self._replace(message, arrays)
        if kind == "train":
            return self._train(message, arrays)
        if kind == "sums":
            return self._all_sums() if message["on_all_ranks"] else self._sums()
        if kind == "finish":
            return self._finish(message, arrays)
        if kind == "settle":
            return self._settle(message, arrays)
        with one_thread():
            jobs = [{**message["job"], "chunk": chunk} for chunk in message["chunks"]]
            return Letter({"replies": [self._worker.handle(job) for job in jobs]})

    def _replace(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Replace arrays of the state, and of the order of channels."""
        given = zip(message["names"], arrays, strict=True)
        for (group, name), value in given:
            target = self._state if group == "state" else self._order
            if target.get(name) is not value:  # the leader's own are in place
                target[name] = value
        return Letter({})

    def _train(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Train blocks, and add up what may be used of them; what is not added up is returned.

        Args:
            message: ``jobs``; ``counts``, the rows of each variant in the phase where these are added up, or null where
                blocks are trained again; ``bound``, of an update's norm, beyond which a block is not used, or null;
                ``known``, namespace, client and address of each private row of the jobs' clients.
            arrays: none.
        """
        jobs = [Job.of_message(one) for one in message["jobs"]]
        trainer = self._worker.trainers[message["phase"]]
        uplink = trainer.task.algorithm.traits.uplink
        known = {(name, client): Address(*rest) for name, client, *rest in message["known"]}
        if self._shared is not None:
            self._shared.known = known if message["counts"] is not None else self._shared.known | known
        if message["counts"] is not None:
            self._private = []
            self._counts = {int(variant): count for variant, count in message["counts"].items()}
            self._trees = {(v, name): TreeSum(n) for v, n in self._counts.items() if n for name in uplink}
        bound = math.inf if message["bound"] is None else message["bound"]
        replies, returned = list[dict[str, Any]](), list[Tensor]()
        for job in jobs:
            with one_thread():
                result = trainer.train(job, self._rows.of_job(trainer.task, job, self._order))
            again = any(norm > bound for norm in result.norm)
            kept = [] if again else self._keep(result, trainer.task, job)
            replies.append({"loss": result.loss, "finite": result.finite, "norm": result.norm})
            replies[-1]["arrays"] = [[name, part] for name, part, _ in kept]
            returned += [value.clone() for *_, value in kept]
        return Letter({"blocks": replies}, returned)

    def _keep(self, result: BlockResult, task: Task, job: Job) -> list[tuple[str, int, Tensor]]:
        """Add up what a block returns; return what is not added up, see `named_arrays`; private rows stay here."""
        block = result.block
        private = {name: rows.clone() for name, rows in result.private.items()}
        self._private.append((task, job, replace(result, payload={}, private=private)))
        result.private = {}
        for name in [name for name in result.payload if task.is_summed(block.variant, name)]:
            for part, value in enumerate(result.payload.pop(name)):
                self._trees[block.variant, name].add(block.first_tile + part, value, level=block.tile.bit_length() - 1)
        return named_arrays(result)

    def _sums(self) -> Letter:
        """Return the partial sums: where each stands in the tree of its variant, and the tensors."""
        found = [(key, *one) for key, tree in self._trees.items() for one in tree.partial_sums()]
        self._trees = {}
        where = [[*key, level, index, value is not None] for key, level, index, value in found]
        return Letter({"sums": where}, [value for *_, value in found if value is not None])

    def _all_sums(self) -> Letter:
        """Complete the sums of all ranks, and keep them for the update here; rank 0 gets them as a reply."""
        self._summed, self._trees = sums_of_all(self._group, self._trees), {}
        if self._group.rank:
            return Letter({"sums": []})
        levels = {key: (self._counts[key[0]] - 1).bit_length() for key in self._summed}
        return Letter({"sums": [[*key, levels[key], 0, True] for key in self._summed]}, [*self._summed.values()])

    def _finish(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Do at this rank the update that rank 0 does at its own; the state stays the same on all. Keep private rows.

        Args:
            message: ``round``, ``phase`` and ``lr`` of the plan; whether the sums ``on_all_ranks`` are to update with;
                ``places`` where private rows are appended, see `SharedRows`.
            arrays: the plan's participants, weights, steps and variants, and whose update is used.

        Returns:
            ``kept``: namespaces; arrays: clients and checksums of each, int64.
        """
        if self._group.rank and message["on_all_ranks"]:
            client, weight, steps, variant, kept = (value.numpy() for value in arrays)
            plan = RoundPlan(message["round"], message["phase"], client, weight, steps, variant, message["lr"])
            update_(self._task, self._state, self._order, plan, kept, Collected(self._summed))
        self._summed = {}
        if self._shared is None:
            return Letter({"kept": []})
        self._shared.places = {name: (file, num_rows) for name, (file, num_rows) in message["places"].items()}
        for task, job, result in self._private:
            used = torch.tensor(result.finite)
            rows = {name: value[used] for name, value in result.private.items()}
            with one_thread():
                self._rows.keep(task, job.block.variant, job.round, job.client[used.numpy()], rows, self._order)
        self._private, found = [], self._shared.take()
        return Letter({"kept": [*found]}, [array for pair in found.values() for array in pair])

    def _settle(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Copy and sync files of rows, see `gossamer.storage.row_files.settle`."""
        assert self._shared is not None
        work = [
            Work(part, source, target, slots.numpy(), row_bytes)
            for (part, source, target, row_bytes), slots in zip(message["work"], arrays, strict=True)
        ]
        settle(self._shared.directory, work)
        return Letter({})


def sums_of_all(group: Group, trees: dict[Key, TreeSum]) -> dict[Key, Tensor]:
    """Complete the sums of all ranks: each does it for a shard of the coordinates, in the order of the tree.

    Each rank sends its partial sums once, a shard to each rank, and gets the shards of the others.

    Args:
        group: group of all ranks, which all call it with trees of the same keys and numbers of slots.
        trees: those of this rank, with its own slots.

    Raises:
        GroupBroken: a rank is gone, or did not answer in time.
    """
    mine = [(key, *one) for key, tree in trees.items() for one in tree.partial_sums()]
    values = [value for *_, value in mine if value is not None]
    told = [[*key, level, index, 0 if value is None else len(value)] for key, level, index, value in mine]
    dtypes = {str(value.dtype) for value in values}
    tables = group.tell_all({"sums": told, "dtypes": sorted(dtypes)})
    dtype = DTYPES[next((name for table in tables for name in table["dtypes"]), str(torch.float32))]
    sizes = [[one[-1] for one in table["sums"] if one[-1]] for table in tables]
    outgoing = [(rank, value[_shard(len(value), rank, group.size)]) for rank in group.others for value in values]
    incoming = [
        (rank, _length(_shard(size, group.rank, group.size)), dtype) for rank in group.others for size in sizes[rank]
    ]
    widths = {(variant, name): size for table in tables for variant, name, _, _, size in table["sums"] if size}
    own = {key: TreeSum(tree.count) for key, tree in trees.items()}
    with group.exchange(outgoing, incoming) as received:
        came, letters = iter(received), list[Letter]()
        for rank, table in enumerate(tables):
            mine_of = [value[_shard(len(value), rank, group.size)] for value in values]
            parts = mine_of if rank == group.rank else [next(came) for _ in sizes[rank]]
            letters.append(Letter({"sums": [[*one[:-1], one[-1] > 0] for one in table["sums"]]}, parts))
        take_sums(own, letters)
        totals = {key: own[key].total for key in widths}
        return _gathered(group, {key: value for key, value in totals.items() if value is not None}, widths)


def _gathered(group: Group, totals: dict[Key, Tensor], widths: dict[Key, int]) -> dict[Key, Tensor]:
    """Send a rank's shards of rows to all others, and return the whole rows, of these widths."""
    outgoing = [(rank, value) for rank in group.others for value in totals.values()]
    incoming = [
        (rank, _length(_shard(widths[key], rank, group.size)), value.dtype)
        for rank in group.others
        for key, value in totals.items()
    ]
    with group.exchange(outgoing, incoming) as received:
        came = iter(received)
        parts = [
            [*totals.values()] if rank == group.rank else [next(came) for _ in totals] for rank in range(group.size)
        ]
        return {key: torch.cat([of_rank[number] for of_rank in parts]) for number, key in enumerate(totals)}


def _shard(length: int, rank: int, size: int) -> slice:
    """Return a rank's part of a row."""
    return slice(length * rank // size, length * (rank + 1) // size)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def take_sums(trees: dict[Key, TreeSum], letters: Sequence[Letter]) -> None:
    """Add the partial sums of all ranks to the trees of the server."""
    for message, arrays in letters:
        values = iter(arrays)
        for variant, name, level, index, is_there in message["sums"]:
            trees[variant, name].add(index, next(values) if is_there else None, level=level)
