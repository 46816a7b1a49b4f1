"""Peers on a cluster: blocks of rows in the object store, trained and mixed by actors that keep nothing.

Only the rows that cross blocks are exchanged. The driver holds references, and rows only to commit them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineSetup
from gossamer.engines.peers import MERGED, Message, PeerEngine, mix_message
from gossamer.engines.ray.actor_pool import ActorPool, Call
from gossamer.engines.ray.cluster import make_actor, num_cpus, put_data, start_ray, watch_daemons
from gossamer.engines.ray.peer_actor import PeerActor
from gossamer.engines.ray.recording import recipe_entry
from gossamer.engines.task import Task
from gossamer.errors import ConfigError, StateLost
from gossamer.plan import RoundPlan, TrainReport

BLOCKS_PER_ACTOR = 2
READ_SECONDS = 600.0  # in which all rows must have come to the driver


class RayPeerEngine(PeerEngine):
    """Trains peers on Ray actors, with the bits of the local engine."""

    def __init__(self, task: Task, x: Tensor, setup: EngineSetup) -> None:
        """Start Ray or join a cluster, start actors, and let them make the peers' initial rows.

        Args:
            x: [d], the initial model, of which actors make their own.

        Raises:
            ConfigError: modes name a GPU.
        """
        if any(variant.mode.is_on_gpu for variant in task.variants):
            raise ConfigError(
                "engine.modes trains peers on another device than cpu, which engine ray does not: use cpu"
            )
        self._leave = start_ray(setup.address, setup.workers or None)
        self._adapts = not setup.workers
        num_actors = setup.workers or num_cpus()
        bounds = bounds_of_blocks(task.workload.num_clients, num_actors)
        super().__init__(task, x, bounds, setup)
        make = make_actor(PeerActor, json.dumps({**setup.recipe, **recipe_entry()}), put_data(task.workload))
        self._actors = ActorPool(
            make,
            num_actors,
            straggler_seconds=setup.straggler_seconds,
            on_event=setup.hooks.report,
            check=watch_daemons(),
        )
        self._state: list[Any] = []
        self._trained: dict[int, tuple[Any, ...]] = {}
        self._mean = torch.zeros(len(x), dtype=x.dtype)

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train on as many actors as there are CPUs by now, unless their number is fixed."""
        if self._adapts:
            self._actors.resize(num_cpus())
        self._require_state()
        self._trained = {}
        return super().train(plan)

    def read(self) -> Arrays:
        """Return copies of the state arrays [n, d]: what a commit writes."""
        import ray

        self._require_state()
        self._actors.check()
        try:
            blocks = ray.get(self._state, timeout=READ_SECONDS)
        except ray.exceptions.RayError as error:
            raise StateLost(
                f"the cluster lost rows of peers, as with a node ({type(error).__name__}): resume from the last commit"
            ) from None
        state = {name: torch.from_numpy(np.concatenate([block[name] for block in blocks])) for name in blocks[0]}
        return state | self._statistics.read()

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state."""
        import ray

        arrays = {name: value.numpy() for name, value in self._statistics.take(state).items()}
        self._state = [ray.put({name: rows[low:high] for name, rows in arrays.items()}) for low, high in self._bounds]
        self._squares = None

    def close(self) -> None:
        """Stop the actors, and the Ray that was started for them."""
        self._actors.stop()
        self._state, self._trained = [], {}
        self._leave()

    # ---- inside

    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        """Have blocks trained; what their peers send, and keep, goes into the object store."""
        message = mix_message(plan) | {"bounds": self._bounds}
        calls = (
            Call(
                number,
                "train",
                (json.dumps(message | {"block": number, "jobs": jobs[number]}), self._state[number]),
                num_returns=2 + len(self._bounds),
            )
            for number in range(len(self._bounds))
            if jobs[number]
        )
        for number, (replies, *kept) in self._actors.map(calls, self.hooks.stop_requested):
            self._trained[number] = tuple(kept)
            yield from json.loads(replies)

    def _repeated(self, block: list[Message], again: set[int]) -> list[Message]:
        """Return all jobs, if any is to be repeated: they make one block of rows together."""
        return block if any(job["first"] in again for job in block) else []

    def _mix(self, plan: RoundPlan) -> None:
        """Mix and update, block by block."""
        message, numbers = mix_message(plan) | {"bounds": self._bounds}, range(len(self._bounds))
        calls = (
            Call(
                number,
                "mix",
                (
                    json.dumps(message | {"block": number}),
                    self._trained[number][0],
                    *(self._trained[source][1 + number] for source in numbers),
                ),
                num_returns=2,
            )
            for number in numbers
        )
        done = self._all(calls)
        self._state = [done[number][1] for number in numbers]
        self._trained = {}

    def _require_state(self) -> None:
        """Let the actors make the initial rows, unless there are some."""
        if not self._state:
            calls = (Call(number, "init", tuple(bounds), num_returns=2) for number, bounds in enumerate(self._bounds))
            made = self._all(calls)
            self._state = [made[number][1] for number in range(len(self._bounds))]

    def _models(self, peers: list[int]) -> NDArray[Any]:
        """Return models, [k, d]."""
        if peers == [MERGED]:
            return self._mean[None].numpy()
        wanted = {
            number: [peer - low for peer in peers if low <= peer < high]
            for number, (low, high) in enumerate(self._bounds)
        }
        calls = (Call(number, "rows", (self._state[number], rows)) for number, rows in wanted.items() if rows)
        found = self._all(calls)
        return np.concatenate([found[number] for number, rows in wanted.items() if rows])

    def _take_mean(self) -> float:
        self._require_state()
        self._mean = (self._add_up("sums", ()) / self._num_peers).to(self._dtype)
        return float(self._add_up("squares", (self._mean.numpy(), self._columns)).sum())

    def _add_up(self, method: str, arguments: tuple[Any, ...]) -> Tensor:
        """Add up what the blocks return, by a tree over blocks."""
        tree = TreeSum(len(self._bounds))
        calls = (Call(number, method, (block, *arguments)) for number, block in enumerate(self._state))
        for number, found in self._all(calls).items():
            tree.add(number, torch.from_numpy(found.copy()))
        assert tree.total is not None
        return tree.total

    def _map_chunks(self, message: Message, models: NDArray[Any], num_chunks: int) -> list[list[Any]]:
        calls = (
            Call(chunk, "evaluate", (json.dumps({**message, "chunk": chunk}), models)) for chunk in range(num_chunks)
        )
        sums = {key: json.loads(reply)["sums"] for key, reply in self._all(calls).items()}
        return [sums[chunk] for chunk in range(num_chunks)]

    def _all(self, calls: Iterator[Call]) -> dict[Any, Any]:
        """Return what all calls return, by their keys; nothing is lost where they are given up."""
        found = dict(self._actors.map(calls, self.hooks.must_stop))
        self.hooks.check()
        return found


def bounds_of_blocks(num_peers: int, num_actors: int) -> list[list[int]]:
    """Return [low, high] of blocks, aligned to powers of two: then sums over them have the bits of sums over rows."""
    size = 1
    while size * BLOCKS_PER_ACTOR * num_actors < num_peers:
        size *= 2
    return [[low, min(low + size, num_peers)] for low in range(0, num_peers, size)]
