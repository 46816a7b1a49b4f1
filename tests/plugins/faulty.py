"""Image classification with clients on which something goes wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads.base import Batch, Params
from gossamer.workloads.images import ImageClassification

Ints = NDArray[np.int64]


class Faulty(ImageClassification):
    """Goes wrong on some clients, in rounds from one on, as long as a file exists.

    Further options:
        clients: which ones.
        fault: ``"nan"`` (loss and gradients), ``"huge"`` (both 1e30 times as large), ``"infinite"`` (the loss alone),
            ``"raise"``, ``"refuse"`` (an error of gossamer's own), ``"exit"`` or
            ``"kill"`` (both in worker processes only).
        first_round: counted from 0.
        flag: the file; None: always.
    """

    def __init__(
        self, options: Mapping[str, Any], *, num_clients: int, partition: Mapping[str, Any] | str, seed: int
    ) -> None:
        own = {"clients": (), "fault": "nan", "first_round": 0, "flag": None} | dict(options)
        self.bad = np.asarray(own.pop("clients"), dtype=np.int64)
        self.fault, self.first_round, self.flag = own.pop("fault"), own.pop("first_round"), own.pop("flag")
        self.home = os.getpid()
        super().__init__(own, num_clients=num_clients, partition=partition, seed=seed)

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Add to each client's constants a factor and a term of its loss, mostly 1 and 0; or go wrong at once."""
        samples, constants = super().batch(clients, positions, round, phase)
        on = round >= self.first_round and (self.flag is None or Path(self.flag).exists())
        bad = np.isin(clients, self.bad) & on
        if bad.any():
            self._fail(int(clients[bad][0]))
        factor = np.where(bad, {"nan": np.nan, "huge": 1e30}.get(self.fault, 1.0), 1.0)
        term = np.where(bad & (self.fault == "infinite"), np.inf, 0.0)
        own = {"factor": torch.from_numpy(factor).float(), "term": torch.from_numpy(term).float()}
        return Batch(samples, constants | own)

    def _fail(self, client: int) -> None:
        if self.fault == "raise":
            raise ArithmeticError(f"client {client} cannot count")
        if self.fault == "refuse":
            raise DataError(f"client {client} has no data: give it some")
        if self.fault == "exit" and os.getpid() != self.home:
            os._exit(7)
        if self.fault == "kill" and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Multiply the loss by the client's factor and add its term; 1 and 0 change no bit."""
        return super().loss(params, batch) * batch["factor"] + batch["term"]


def without_first(seed: int, round: int, num_clients: int, count: int) -> Ints:
    """Sample every client but client 0."""
    return np.arange(1, num_clients)


def without_last(seed: int, round: int, num_clients: int, count: int) -> Ints:
    """Sample every client but the last one."""
    return np.arange(num_clients - 1)
