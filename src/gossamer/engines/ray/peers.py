"""Peers on a cluster: blocks of rows in the object store, trained and mixed by actors that keep nothing.

Only the rows that cross blocks are exchanged. The driver holds references, and rows only to commit them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import NO_HOOKS, EngineHooks, Record
from gossamer.engines.collective.group import Backend, has_nccl
from gossamer.engines.peers import distance_record, job_message, peers_record, rows_of_block
from gossamer.engines.ray.actor_pool import ActorPool, Call
from gossamer.engines.ray.cluster import make_actor, num_cpus, num_gpus, put_data, start_ray
from gossamer.engines.ray.collective import CollectiveExchange
from gossamer.engines.ray.peer_actor import PeerActor
from gossamer.engines.task import WHOLE, Task
from gossamer.engines.training.batches import sample_bytes
from gossamer.errors import ConfigError, StateLost
from gossamer.plan import STOPPED, Block, RoundPlan, TrainReport
from gossamer.topology.streaming import panels
from gossamer.workloads.base import Sums, add_sums

BLOCKS_PER_ACTOR = 2
READ_SECONDS = 600.0  # in which all rows must have come to the driver


class RayPeerEngine:
    """Trains peers on Ray actors, with the bits of the local engine."""

    def __init__(
        self,
        task: Task,
        x: Tensor,
        *,
        workers: int,
        block_size: int | None = None,
        hooks: EngineHooks = NO_HOOKS,
        recipe: Mapping[str, Any],
        address: str | None = None,
        straggler_seconds: float | None = None,
        collective: Backend | None = None,
    ) -> None:
        """Start Ray or join a cluster, start actors, and let them make the peers' initial rows.

        Args:
            task: what trains; it has a topology.
            x: [d], the initial model, of which actors make their own.
            workers, hooks, recipe, address, straggler_seconds: as of `RayEngine`.
            block_size: peers that are trained stacked together, or None for a size that suits. Changes no bits.
            collective: backend by which actors, whose number is then fixed, exchange rows; None: the object store.

        Raises:
            ConfigError: modes name a GPU, or collective is nccl and there are too few; see also
                `CollectiveExchange`.
        """
        assert task.topology is not None
        if any(variant.mode.is_on_gpu for variant in task.variants):
            raise ConfigError(
                "engine.modes trains peers on another device than cpu, which engine ray does not: use cpu"
            )
        self._leave = start_ray(address, workers or None)
        self._adapts = not workers and collective is None
        self._task, self._block_size, self._num_peers = task, block_size, task.topology.n
        self.is_whole = True  # what is in the object store stays until the round is over
        self.hooks = hooks
        num_actors = workers or num_cpus()
        self._bounds = bounds_of_blocks(self._num_peers, num_actors)
        self._collective: CollectiveExchange | None = None
        if collective is not None:
            self._collective = CollectiveExchange(
                collective,
                self._bounds,
                num_actors,
                max_bytes=self._num_peers * x.nbytes * len(task.algorithm.traits.uplink),
                straggler_seconds=straggler_seconds,
            )
            require_gpus(collective, self._collective.size)
        make = make_actor(PeerActor, json.dumps(recipe), put_data(task.workload), num_gpus=int(collective == "nccl"))
        self._actors = ActorPool(
            make,
            num_actors if self._collective is None else 0,
            straggler_seconds=straggler_seconds,
            on_event=hooks.report,
            others=dict.fromkeys(self._collective.kinds, (make, 1)) if self._collective is not None else None,
        )
        self._columns = [[one.start, one.stop] for one in panels(self._num_peers, len(x), x.dtype.itemsize)]
        self._dtype, self._sample_bytes = x.dtype, sample_bytes(task.workload)
        self._state: list[Any] = []
        self._trained: dict[int, tuple[Any, ...]] = {}
        self._merged: tuple[Tensor, float] | None = None

    # ---- the two verbs

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train all peers; what they send goes into the object store."""
        if self._adapts:
            self._actors.resize(num_cpus())
        self._require_state()
        self._trained, has_pieces = {}, self._collective is None
        jobs = [self._jobs(plan, number) for number in range(len(self._bounds))]
        blocks = {block.rows.start: block for of_block in jobs for block, _ in of_block}
        calls = (
            Call(
                number,
                "train",
                (
                    self._message(plan, block=number, jobs=[message for _, message in jobs[number]], pieces=has_pieces),
                    self._state[number],
                ),
                num_returns=2 + has_pieces * len(self._bounds),
            )
            for number in range(len(self._bounds))
        )
        for number, (replies, *kept) in self._map(calls, self.hooks.stop_requested):
            self._trained[number] = tuple(kept)
            for reply in json.loads(replies):
                yield TrainReport(blocks.pop(reply["first"]).rows, reply["loss"], reply["finite"])
        yield from (TrainReport.of_missing(block.rows, STOPPED) for block in blocks.values())

    def exchange(self, plan: RoundPlan) -> None:
        """Mix and update, block by block."""
        if self._collective is not None:
            trained = [self._trained[number][0] for number in range(len(self._bounds))]
            described = self._describe(plan, lr=plan.lr)
            self._state = self._collective.mix(self._actors, described, trained, self.hooks.report)
        else:
            calls = (
                Call(
                    number,
                    "mix",
                    (
                        self._message(plan, block=number, lr=plan.lr),
                        self._trained[number][0],
                        *(self._trained[source][1 + number] for source in range(len(self._bounds))),
                    ),
                    num_returns=2,
                )
                for number in range(len(self._bounds))
            )
            done = dict(self._map(calls))
            self._state = [done[number][1] for number in range(len(self._bounds))]
        self._trained, self._merged = {}, None

    # ---- evaluation and state

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the merged model, the mean of all peers', or its sub-model of a variant at `round`."""
        merged, _ = self._merge()
        return self._evaluate(merged[None], variant, round)[0]

    def measure(self, num_peers: int) -> Record:
        """Return how far peers are from their mean, and what they reach by themselves, as the local engine does."""
        _, squares = self._merge()
        own = getattr(self._task.workload, "peer_metrics", None)
        record = distance_record(squares, self._num_peers)
        if own is not None:
            record |= own(self.read()["x"])
        count = min(num_peers, self._num_peers)
        if not count:
            return record
        models = self._rows((np.arange(count) * self._num_peers // count).tolist())
        found = [self._task.workload.metrics(sums) for sums in self._evaluate(models, WHOLE, 0)]
        return record | peers_record(found)

    def read(self) -> Arrays:
        """Return copies of the state arrays [n, d]: what a commit writes."""
        import ray

        self._require_state()
        try:
            blocks = ray.get(self._state, timeout=READ_SECONDS)
        except ray.exceptions.RayError as error:
            raise StateLost(
                f"the cluster lost rows of peers, as with a node ({type(error).__name__}): resume from the last commit"
            ) from None
        return {name: torch.from_numpy(np.concatenate([block[name] for block in blocks])) for name in blocks[0]}

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state."""
        import ray

        arrays = {name: value.numpy() for name, value in state.items()}
        self._state = [ray.put({name: rows[low:high] for name, rows in arrays.items()}) for low, high in self._bounds]
        self._merged = None

    def close(self) -> None:
        """Stop the actors, and the Ray that was started for them."""
        self._actors.stop()
        if self._collective is not None:
            self._collective.close()
        self._state, self._trained = [], {}
        self._leave()

    # ---- inside

    def _require_state(self) -> None:
        """Let the actors make the initial rows, unless there are some."""
        if not self._state:
            calls = (Call(number, "init", tuple(bounds), num_returns=2) for number, bounds in enumerate(self._bounds))
            made = dict(self._map(calls))
            self._state = [made[number][1] for number in range(len(self._bounds))]

    def _map(self, calls: Iterable[Call], stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Any, Any]]:
        """Have calls done, by the actors that have the blocks if each has its own."""
        return self._actors.map(calls if self._collective is None else self._collective.spread(calls), stop)

    def _describe(self, plan: RoundPlan, **more: Any) -> Record:
        return {"round": plan.round, "mixing": plan.mixing, "bounds": self._bounds} | more

    def _message(self, plan: RoundPlan, **more: Any) -> str:
        return json.dumps(self._describe(plan, **more))

    def _jobs(self, plan: RoundPlan, number: int) -> list[tuple[Block, dict[str, Any]]]:
        """Return what is trained together within one block, and how it is described."""
        low, high = self._bounds[number]
        found = []
        for variant in self._task.variants:
            rows = plan.variant_rows(variant.index)
            size = self._block_size or rows_of_block(self._task, variant, self._dtype.itemsize, self._sample_bytes)
            for first, last in _runs(plan.client[rows], low, high, size):
                block = Block(variant.index, 0, size, slice(rows.start + first, rows.start + last))
                found.append((block, job_message(plan, block)))
        return found

    def _rows(self, peers: list[int]) -> Tensor:
        """Return the models of some peers, [k, d]."""
        places = {
            number: [peer - low for peer in peers if low <= peer < high]
            for number, (low, high) in enumerate(self._bounds)
        }
        calls = (Call(number, "rows", (self._state[number], wanted)) for number, wanted in places.items() if wanted)
        found = dict(self._map(calls))
        return torch.from_numpy(np.concatenate([found[number] for number, wanted in places.items() if wanted]))

    def _merge(self) -> tuple[Tensor, float]:
        """Return the mean of all peers' models and the sum of squared distances from it, once after each exchange."""
        if self._merged is None:
            self._require_state()
            sums = self._add_up("sums", ())
            mean = (sums / self._num_peers).to(self._dtype)
            self._merged = mean, float(self._add_up("squares", (mean.numpy(), self._columns)).sum())
        return self._merged

    def _add_up(self, method: str, arguments: tuple[Any, ...]) -> Tensor:
        """Add up what the blocks return, by a tree over blocks."""
        tree = TreeSum(len(self._bounds))
        calls = (Call(number, method, (block, *arguments)) for number, block in enumerate(self._state))
        for number, found in self._map(calls):
            tree.add(number, torch.from_numpy(found.copy()))
        assert tree.total is not None
        return tree.total

    def _evaluate(self, models: Tensor, variant: int, round: int) -> list[Sums]:
        """Return the sums over all chunks of the test data of each of several models [k, d]."""
        workload = self._task.workload
        where = {"peers": list(range(len(models))), "variant": variant, "round": round}
        statistics = self._over_chunks({"kind": "statistics"} | where, models, workload.num_statistics_chunks)
        listed = [{name: value.tolist() for name, value in one.items()} for one in statistics]
        message = {"kind": "evaluate", "statistics": listed} | where
        return self._over_chunks(message, models, workload.num_evaluation_chunks)

    def _over_chunks(self, message: dict[str, Any], models: Tensor, num_chunks: int) -> list[Sums]:
        calls = (
            Call(chunk, "evaluate", (json.dumps({**message, "chunk": chunk}), models.numpy()))
            for chunk in range(num_chunks)
        )
        replies = {key: json.loads(reply)["sums"] for key, reply in self._map(calls)}
        sums = [
            [{name: np.array(value, dtype=np.float64) for name, value in one.items()} for one in replies[chunk]]
            for chunk in range(num_chunks)
        ]
        return [add_sums([chunk[number] for chunk in sums]) for number in range(len(models))]


def _runs(clients: NDArray[np.int64], low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the places of consecutive runs of clients in low, ..., high - 1, at most `size` long."""
    inside = np.concatenate([[False], (clients >= low) & (clients < high), [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        for start in range(first, last, size):
            yield start, min(start + size, last)


def bounds_of_blocks(num_peers: int, num_actors: int) -> list[list[int]]:
    """Return [low, high] of blocks, aligned to powers of two: then sums over them have the bits of sums over rows."""
    size = 1
    while size * BLOCKS_PER_ACTOR * num_actors < num_peers:
        size *= 2
    return [[low, min(low + size, num_peers)] for low in range(0, num_peers, size)]


def require_gpus(collective: Backend, num_actors: int) -> None:
    """Raise a `ConfigError` if actors shall send by NCCL and not each can have a GPU."""
    if collective != "nccl":
        return
    if num_gpus() < num_actors:
        raise ConfigError(
            f"engine.collective = 'nccl' takes a GPU for each of {num_actors} actors, but the cluster has {num_gpus()}:"
            " set engine.workers to as many, or engine.collective to gloo"
        )
    if not has_nccl():
        raise ConfigError(
            "engine.collective = 'nccl', but this torch is built without NCCL: use gloo, or another torch"
        )
