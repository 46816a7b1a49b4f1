"""Image classification during which somebody sends a signal, and which is slow from then on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gossamer.workloads.base import Batch, Params, Sums
from gossamer.workloads.images import ImageClassification

Ints = NDArray[np.int64]
waits: list[str] = []  # of this process


class Stopping(ImageClassification):
    """Sends a signal once, and takes its time as long as a file exists.

    Further options:
        flag: the file; None: it never does anything.
        amid: ``"load"``, ``"train"`` or ``"evaluate"``.
        round: of training, counted from 0.
        signal: number of the signal; 0: none.
        process: who gets it; 0: whoever trains.
        seconds: of each local step, or each chunk of test data.
    """

    def __init__(self, options: Mapping[str, Any], **given: Any) -> None:
        own = {"flag": None, "amid": "train", "round": 1, "signal": 0, "process": 0, "seconds": 1.0} | dict(options)
        self.own = {key: own.pop(key) for key in ("flag", "amid", "round", "signal", "process", "seconds")}
        self.is_slow = False
        super().__init__(own, **given)
        if self.own["amid"] == "load":
            self._wait()

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Be slow from now on, if that is the round."""
        self.is_slow = self.is_slow or (self.own["amid"] == "train" and round == self.own["round"])
        return super().batch(clients, positions, round, phase)

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Take one step's time."""
        if self.is_slow:
            self._wait()
        return super().loss(params, batch)

    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Take one chunk's time."""
        if self.own["amid"] == "evaluate":
            self._wait()
        return super().evaluate(params, statistics, chunk)

    def _wait(self) -> None:
        if self.own["flag"] is None or not Path(self.own["flag"]).exists():
            return
        waits.append(self.own["amid"])
        try:  # whoever makes the file is the first one
            Path(self.own["flag"] + ".sent").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(self.own["process"] or os.getpid(), self.own["signal"])
        time.sleep(self.own["seconds"])
