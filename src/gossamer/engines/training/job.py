"""What one block is to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.plan import Block


class Job(NamedTuple):
    """One block of a plan, as plain numbers."""

    round: int
    phase: int
    block: Block
    client: NDArray[np.int64]
    weight: NDArray[np.float64]
    steps: NDArray[np.int32]
    lr: float

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> Job:
        """Return the job that `message` described; its block's rows are counted from 0."""
        return cls(
            message["round"],
            message["phase"],
            Block(message["variant"], message["first_leaf"], message["leaf"], slice(0, len(message["client"]))),
            np.array(message["client"], dtype=np.int64),
            np.array(message["weight"], dtype=np.float64),
            np.array(message["steps"], dtype=np.int32),
            message["lr"],
        )

    def message(self) -> dict[str, Any]:
        """Describe the job by plain JSON values."""
        return {
            "round": self.round,
            "phase": self.phase,
            "variant": self.block.variant,
            "first_leaf": self.block.first_leaf,
            "leaf": self.block.leaf,
            "client": self.client.tolist(),
            "weight": self.weight.tolist(),
            "steps": self.steps.tolist(),
            "lr": self.lr,
        }
