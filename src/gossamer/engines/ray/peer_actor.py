"""What runs inside a Ray actor that trains and mixes blocks of peers.

The rows of peers live in the object store and never change there: a call reads some and returns new ones, so whoever
repeats it gets the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.ray.client_actor import prepare, tensors
from gossamer.engines.ray.cluster import arrays_of
from gossamer.engines.ray.recording import recorded
from gossamer.engines.training.mixing import HOLDERS, SENT, STATE, Mixer, column_sums, squared_distance
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows

Rows = Mapping[str, NDArray[Any]]


class PeerActor:
    """Trains and mixes blocks of peers; one torch thread."""

    def __init__(self, recipe: str, data: list[Any]) -> None:
        """Rebuild the task, see `prepare`."""
        self._task = prepare(recipe, data)
        self._mixers = [Mixer(phase) for phase in self._task.phases]

    @recorded("start")
    def ready(self) -> bool:
        """Answer, once the task is built."""
        return True

    @recorded("start")
    def init(self, low: int, high: int) -> Any:
        """Return "" and the initial state of the peers low, ..., high - 1."""
        rows = initial_rows(self._task, self._task.workload.init(self._task.seed), low, high)
        return "", {name: value.numpy().copy() for name, value in rows.items()}

    @recorded("train")
    def train(self, message: str, state: Rows) -> Any:
        """Train one block of peers.

        Args:
            message: JSON: ``jobs``, as `PeerWorker.train` takes them, of all peers low, ..., high - 1; ``bounds``, of
                all blocks; ``block``, the number of this one; what `mix_message` holds.
            state: rows of the block.

        Returns:
            JSON of the jobs' replies; the block's rows of payloads and state, see `Mixer.laid_out`; and for each block
            of the others, what it needs to hear: its payloads' rows and their numbers.
        """
        described = json.loads(message)
        task, mixer = self._task.phases[described["phase"]], self._mixers[described["phase"]]
        low, high = described["bounds"][described["block"]]
        arrays = {name: torch.from_numpy(rows.copy()) for name, rows in state.items()}

        def zeros(d: int, dtype: torch.dtype) -> Tensor:
            """Return zeros for all peers of the block."""
            return torch.zeros(high - low, d, dtype=dtype)

        peers = PeerState.of(task, arrays, zeros, arrays["x"][:1], low)
        worker = PeerWorker(task, peers)
        replies = [worker.train(job) for job in described["jobs"]]
        sent = {name: peers.payload(name) for name in task.algorithm.traits.uplink}
        if peers.holders is not None:
            sent[HOLDERS] = peers.holders
        block = {f"{SENT}{name}": value for name, value in sent.items()}
        block |= {f"{STATE}{name}": value for name, value in arrays.items() if name not in sent}
        pieces: list[dict[str, NDArray[Any]] | None] = []
        for number, (first, last) in enumerate(described["bounds"]):
            wanted = mixer.heard(described, first, last, low, high) if number != described["block"] else None
            pieces.append(None if wanted is None else _piece(sent, wanted, low))
        return json.dumps(replies), arrays_of(block), *pieces

    @recorded("mix")
    def mix(self, message: str, block: Rows, *pieces: Rows | None) -> Any:
        """Return "" and the new rows of a block's state.

        Args:
            message: see `train`, without jobs.
            block: result of `train` for the block.
            pieces: payloads of other blocks' peers for this one.
        """
        described, trained = json.loads(message), tensors(block)
        bounds, mixer = described["bounds"][described["block"]], self._mixers[described["phase"]]
        everyone = mixer.laid_out([bounds], [trained])
        for piece in pieces:
            if piece is not None:
                for name, rows in everyone.items():
                    rows[torch.from_numpy(piece["peers"])] = torch.from_numpy(piece[name])
        return "", arrays_of(mixer.update_block(described, everyone, trained, bounds))

    @recorded("evaluate")
    def sums(self, block: Rows) -> NDArray[np.float64]:
        """Return the sum of a block's models, float64 [d], see `column_sums`."""
        return column_sums(torch.from_numpy(block["x"])).numpy()

    @recorded("evaluate")
    def squares(self, block: Rows, mean: NDArray[Any], columns: list[list[int]]) -> NDArray[np.float64]:
        """Return the squared distances of a block's models from their mean, float64 [panels of columns, 1]."""
        x, center = torch.from_numpy(block["x"]), torch.from_numpy(mean)
        found = [squared_distance(x[:, slice(*one)], center[slice(*one)]) for one in columns]
        return torch.stack(found).numpy()

    @recorded("evaluate")
    def rows(self, block: Rows, numbers: list[int]) -> NDArray[Any]:
        """Return some of a block's models."""
        return block["x"][numbers]

    @recorded("evaluate")
    def evaluate(self, message: str, models: NDArray[Any]) -> str:
        """Return the sums of one chunk of data for several models [k, d], see `PeerWorker.evaluate`."""
        x = torch.from_numpy(models)
        worker = PeerWorker(self._task, PeerState({"x": x}, {}, None, x[:1]))
        return json.dumps(worker.evaluate(json.loads(message) | {"peers": range(len(x))}))


def _piece(sent: Arrays, peers: NDArray[np.int64], low: int) -> dict[str, NDArray[Any]]:
    """Return the rows of some peers of a block that begins with peer `low`."""
    rows = torch.from_numpy(peers - low)
    return {"peers": peers} | {name: value[rows].numpy() for name, value in sent.items()}
