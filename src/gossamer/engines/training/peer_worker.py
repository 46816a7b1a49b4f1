"""What a worker does with peers: train a block of rows where they lie, mix a panel of columns, measure, evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate.codec_base import Codec, Draws
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import never
from gossamer.engines.task import Task
from gossamer.engines.training.job import Job
from gossamer.engines.training.mixing import Mixer, column_sums, squared_distance
from gossamer.engines.training.rows import row_norms, usable
from gossamer.engines.training.trainer import Trainer
from gossamer.plan import Block
from gossamer.profiling import recorder

Message = dict[str, Any]
STAGES = {"train": "train", "mix": "mix"}  # of messages; what they do besides is to evaluate


@dataclass(frozen=True)
class PeerState:
    """The resident arrays of n peers, or of a block of them.

    Attributes:
        state: the algorithm's state, [n, d] each, [n, 1] of scalars.
        outbox: payloads under names that no state array has; one named like a state array replaces it.
        holders: uint8 [n, d], which coordinates each peer's window of the round holds; None: everybody holds all.
        merged: [1, d], the mean of all peers' models.
        first: number of the peer in row 0.
        codes: uint8 [n, bytes], what travels of payloads that a codec compresses, where it is to be kept.
    """

    state: Arrays
    outbox: Arrays
    holders: Tensor | None
    merged: Tensor
    first: int = 0
    codes: Arrays = field(default_factory=dict)

    @classmethod
    def of(
        cls, task: Task, state: Arrays, zeros: Callable[[int, torch.dtype], Tensor], merged: Tensor, first: int
    ) -> Self:
        """Return the arrays of peers.

        Args:
            task: task that trains them.
            state, merged, first: see the class.
            zeros: callback that returns memory for rows of a width and a dtype.
        """
        d, dtype, outbox = state["x"].shape[1], state["x"].dtype, Arrays()
        for phase in task.phases:
            traits = phase.algorithm.traits
            for name in traits.uplink:
                if name not in state and name not in outbox:
                    outbox[name] = zeros(1 if name in traits.scalars else d, dtype)
        return cls(state, outbox, None if task.is_whole else zeros(d, torch.uint8), merged, first)

    def payload(self, name: str) -> Tensor:
        """Return where the payload of this name lies."""
        return self.outbox[name] if name in self.outbox else self.state[name]


class PeerWorker:
    """Handles messages about peers in one phase; lives in a worker process, or in the driver's where there are none."""

    def __init__(
        self,
        task: Task,
        peers: PeerState,
        stop: Callable[[], bool] = never,
        before_writing: Callable[[], None] = lambda: None,
        of_codec: Callable[[Task, str, Codec], Codec] = lambda task, name, codec: codec,
    ) -> None:
        """Bind the task of the phase to the peers' rows.

        Args:
            task, peers: the task of the phase, and the rows of its peers.
            stop: asked between two local steps; once it is true, `Interrupted` is raised.
            before_writing: callback before a job changes rows: until then it could be done anew.
            of_codec: returns what does the work of a codec, given the task and the payload's name.
        """
        self._task, self._peers, self._before_writing = task, peers, before_writing
        self._scalars, codecs = task.algorithm.traits.scalars, task.algorithm.traits.codecs
        self._codecs = {name: of_codec(task, name, codec) for name, codec in codecs.items()}
        self._trainer, self._mixer = Trainer(task, peers.state, stop=stop), Mixer(task)

    @classmethod
    def handler(cls, task: Task, peers: PeerState, **options: Any) -> Callable[[Message], Message]:
        """Return what handles the messages of all phases; `options` are those of the class."""
        workers = [cls(phase, peers, **options) for phase in task.phases]
        return lambda message: workers[message.get("phase", 0)].handle(message)  # any of them measures and evaluates

    def handle(self, message: Message) -> Message:
        """Do one job and return its reply, both plain JSON values."""
        with recorder.span(STAGES.get(message["kind"], "evaluate")):
            return self._handle(message)

    def _handle(self, message: Message) -> Message:
        if message["kind"] == "train":
            return self.train(message)
        if message["kind"] == "mix":
            return self.mix(message)
        if message["kind"] == "measure":
            return self.measure(message)
        return self.evaluate(message)

    # ---- train

    def train(self, message: Message) -> Message:
        """Train the peers of one block and write what they send and keep to where it belongs.

        Where an update may be too large, the block is to be trained again, with a bound that follows from all norms.
        """
        task, peers = self._task, np.array(message["peers"], dtype=np.int64)
        layout = task.variants[message["variant"]].layout
        job = Job(
            message["round"],
            message["phase"],
            Block(message["variant"], 0, len(peers), slice(0, len(peers))),
            peers,
            np.ones(len(peers)),
            np.array(message["steps"], dtype=np.int32),
            message["lr"],
            message["max_norm"],
        )
        where = _consecutive(peers - self._peers.first)
        before, ratio = self._read(job, where), task.max_update_norm_ratio
        allowed = [math.inf] * len(peers) if ratio is None else [ratio * norm for norm in row_norms(before)]
        bounds = [math.inf if job.max_norm is None else max(job.max_norm, bound) for bound in allowed]
        payload, site, losses, norms = self._trainer.train_peers(job, before, bounds)
        reply = {"first": message["first"], "loss": losses, "finite": usable(norms, bounds), "norm": norms}
        if job.max_norm is None and any(norm > bound for norm, bound in zip(norms, allowed, strict=True)):
            return reply | {"again": True}  # and nothing is written
        codes = self._compress_(job, payload, layout.coordinates)
        self._before_writing()
        for name, rows in codes.items():
            self._peers.codes[name][where] = rows
        for name, rows in payload.items():
            self._write(job, where, self._peers.payload(name), rows)
        for name, rows in site.items():
            self._write(job, where, self._peers.state[name], rows)
        if self._peers.holders is not None:
            self._peers.holders[where] = 0
            held = torch.ones(len(peers), layout.d, dtype=torch.uint8)
            self._write(job, where, self._peers.holders, held)
        return reply | {"again": False}

    def _compress_(self, job: Job, payload: Arrays, real: slice | Tensor) -> Arrays:
        """Overwrite payloads by what receivers decode; return the codes that are to be kept.

        Args:
            real: coordinates of the model; padding takes no part in a codec.
        """
        codes, draws = Arrays(), Draws(seed=self._task.seed, round=job.round, phase=job.phase, peers=job.client)
        for name, codec in self._codecs.items():
            rows = payload[name][:, real]
            with recorder.span("compress", rows.nbytes):
                if name in self._peers.codes:
                    codes[name] = codec.encode(rows, **draws)
                    payload[name][:, real] = codec.decode(codes[name], rows.shape[1], rows.dtype, **draws)
                else:
                    payload[name][:, real] = codec.compress(rows, **draws)
        return codes

    def _read(self, job: Job, where: slice | Tensor) -> Arrays:
        """Return the rows [s, d_sub] of all state arrays."""
        variant = self._task.variants[job.block.variant]
        rows = {name: value[where] for name, value in self._peers.state.items()}
        if variant.is_whole:
            return rows
        cut_rows = {}
        for name, value in rows.items():
            cut_rows[name] = value
            if name not in self._scalars:
                cut_rows[name] = value.new_zeros(len(value), variant.layout.d)
                for peer, row, out in zip(job.client.tolist(), value, cut_rows[name], strict=True):
                    self._task.cut(variant, job.round, peer).read(row, out)
        return cut_rows

    def _write(self, job: Job, where: slice | Tensor, target: Tensor, rows: Tensor) -> None:
        """Write rows [s, d_sub] into their windows of `target` [n, d]."""
        variant = self._task.variants[job.block.variant]
        if variant.is_whole or target.shape[1] == 1:
            target[where] = rows
            return
        for peer, row in zip(job.client.tolist(), rows, strict=True):
            self._task.cut(variant, job.round, peer).write(target[peer - self._peers.first], row)

    # ---- mix

    def mix(self, message: Message) -> Message:
        """Mix one panel of columns of all payloads, and update the state there; an empty panel updates the scalars.

        Scalars come last, in a panel of their own, because every panel reads those that were sent. ``missing`` in the
        message are [peer, those whose rows it does not get].
        """
        columns = slice(*message["columns"])

        def panel(name: str, array: Tensor) -> Tensor:
            """Return the panel of an array, all of it if it is a scalar's."""
            return array if name in self._scalars else array[:, columns]

        sent = {
            name: panel(name, self._peers.payload(name)).contiguous() for name in self._task.algorithm.traits.uplink
        }
        recorder.count_bytes(lambda: sum(value.nbytes for value in sent.values()))
        holders = None if self._peers.holders is None else self._peers.holders[:, columns]
        state = {name: panel(name, value) for name, value in self._peers.state.items()}
        everyone = slice(0, self._task.workload.num_clients)
        updated = self._mixer.update(message, sent, holders, state, everyone, columns)
        for peer, missing in message.get("missing", ()):
            alone = self._mixer.update_without(message, sent, holders, state, (peer, missing), columns)
            for name, row in alone.items():
                updated[name][peer : peer + 1] = row
        self._before_writing()
        for name, value in updated.items():
            if (name in self._scalars) == (columns.start == columns.stop):
                panel(name, self._peers.state[name]).copy_(value)
        return {}

    # ---- measure and evaluate

    def measure(self, message: Message) -> Message:
        """Take the mean of all peers' models over a panel of columns; return the squared distances from it."""
        columns = slice(*message["columns"])
        panel = self._peers.state["x"][:, columns]
        mean = (column_sums(panel) / len(panel)).to(panel.dtype)
        self._peers.merged[0, columns] = mean
        return {"first": columns.start, "squares": float(squared_distance(panel, mean))}

    def evaluate(self, message: Message) -> Message:
        """Return the sums of one chunk of data for several models: those of peers, or the merged one, -1.

        Training data is for BatchNorm's statistics ("statistics"), test data for the metrics ("evaluate").
        """
        workload, chunk = self._task.workload, message["chunk"]
        found: list[dict[str, list[float]]] = []
        with torch.no_grad():
            for number, peer in enumerate(message["peers"]):
                params = self._params(peer, message["variant"], message["round"])
                if message["kind"] == "statistics":
                    sums: Mapping[str, Any] = workload.statistics(params, chunk)
                else:
                    listed = message["statistics"][number].items()
                    statistics = {name: torch.tensor(value, dtype=torch.float64) for name, value in listed}
                    sums = workload.evaluate(params, statistics, chunk)
                found.append({name: value.tolist() for name, value in sums.items()})
        return {"chunk": chunk, "sums": found}

    def _params(self, peer: int, variant: int, round: int) -> Arrays:
        row = self._peers.merged[0] if peer < 0 else self._peers.state["x"][peer]
        cut = self._task.cut(self._task.variant(variant), round)
        if cut.is_full:
            return cut.full.views(row)
        return cut.sub.views(cut.read(row, row.new_zeros(cut.sub.d)))


def _consecutive(peers: NDArray[np.int64]) -> slice | Tensor:
    """Return ascending peers without a gap as a slice, others as an index."""
    if (np.diff(peers) == 1).all():
        return slice(int(peers[0]), int(peers[-1]) + 1)
    return torch.from_numpy(peers)


def initial_rows(task: Task, x: Tensor, low: int, high: int) -> Arrays:
    """Return the state of the peers low, ..., high - 1, who start from x [d] unless the workload has a `peer_init`."""
    if task.workload.traits.has_peer_init:
        return task.algorithm.init(task.workload.peer_init(task.seed)[low:high])
    return {name: row.expand(high - low, -1) for name, row in task.algorithm.init(x[None]).items()}
