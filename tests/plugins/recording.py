"""Image classification that writes down how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.workloads.base import Batch, Params
from gossamer.workloads.images import ImageClassification

Ints = NDArray[np.int64]
num_clients: list[int] = []  # of every batch that was assembled, in this process
formats: list[tuple[bool, bool]] = []  # whether channels come last, and whether there is a mask, of every loss
threads: list[int] = []  # with which it was computed


class Recording(ImageClassification):
    """Notes every call."""

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Note the number of clients."""
        num_clients.append(len(clients))
        return super().batch(clients, positions, round, phase)

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Note the order of the images' dimensions, whether some may be padding, and the threads."""
        threads.append(torch.get_num_threads())
        formats.append((batch["x"].stride(1) == 1, "mask" in batch))
        return super().loss(params, batch)
