"""What one block is to train, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gossamer.plan import Block, TrainReport


class Job(NamedTuple):
    """One block of a plan, as plain numbers.

    Updates whose norm exceeds `max_norm` are dropped; of peers, those that exceed what their own rows allow, too.
    """

    round: int
    phase: int
    block: Block
    client: NDArray[np.int64]
    weight: NDArray[np.float64]
    steps: NDArray[np.int32]
    lr: float
    max_norm: float | None = None

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> Job:
        """Return the job that `message` described; its block's rows are counted from 0."""
        return cls(
            message["round"],
            message["phase"],
            Block(message["variant"], message["first_tile"], message["tile"], slice(0, len(message["client"]))),
            np.array(message["client"], dtype=np.int64),
            np.array(message["weight"], dtype=np.float64),
            np.array(message["steps"], dtype=np.int32),
            message["lr"],
            message["max_norm"],
        )

    def message(self) -> dict[str, Any]:
        """Describe the job by plain JSON values."""
        return {
            "round": self.round,
            "phase": self.phase,
            "variant": self.block.variant,
            "first_tile": self.block.first_tile,
            "tile": self.block.tile,
            "client": self.client.tolist(),
            "weight": self.weight.tolist(),
            "steps": self.steps.tolist(),
            "lr": self.lr,
            "max_norm": self.max_norm,
        }


@dataclass
class BlockResult:
    """What one block of s participants returns.

    Attributes:
        block: the block.
        payload: ``{name: tensors}``: for each tile its weighted tree sum [d_sub], None if every row was dropped; where
            every participant has a window of its own, the weighted rows, [d_sub] each, instead; where the uplink says
            "rows", the rows as they are. [1] for scalars.
        loss: mean training loss of each row, length s.
        finite: whether each row's update is used, length s; the others are not in the sum.
        norm: Euclidean norm of each row's update, length s; NaN where it is not finite.
        private: ``{name: rows [s, d]}``, new client state of algorithms that keep some.
    """

    block: Block
    payload: dict[str, list[Tensor | None]]
    loss: list[float]
    finite: list[bool]
    norm: list[float]
    private: dict[str, Tensor] = field(default_factory=dict)

    @property
    def report(self) -> TrainReport:
        """What is known of the block outside the engine."""
        return TrainReport(self.block.rows, self.loss, self.finite, norm=self.norm)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return sum(part.nbytes for parts in self.payload.values() for part in parts if part is not None)
