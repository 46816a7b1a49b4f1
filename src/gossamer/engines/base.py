"""What an engine is, and the options that every engine shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.plan import BlockResult, RoundPlan
from gossamer.workloads.base import Sums

Record = dict[str, Any]


class Engine(Protocol):
    """Carries out the two verbs of a phase where the state lives.

    Attributes:
        is_whole: whether the state is that of a whole round. Peers train in place, so between `train` and the end of
            `exchange` theirs is not, and cannot be committed.
    """

    @property
    def is_whole(self) -> bool:
        """See the class."""
        ...

    def train(self, plan: RoundPlan) -> Iterator[BlockResult]:
        """Train the plan's participants; yields blocks as they come in, in any order."""
        ...

    def exchange(self, plan: RoundPlan) -> None:
        """Combine what `train` returned, update the state and keep the survivors' private state."""
        ...

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the model (`WHOLE`), or its sub-model of a variant, on the test data; of peers: their mean."""
        ...

    def measure(self, num_peers: int) -> Record:
        """Return what else there is to log of the state: of peers, how far apart they are and how each one does.

        Args:
            num_peers: of how many peers the own model is evaluated.
        """
        ...

    def read(self) -> Arrays:
        """Return the state arrays, [1, d] at a server, [n, d] of peers; valid until the next `train` or `write`."""
        ...

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays."""
        ...

    def close(self) -> None:
        """Stop workers and free memory."""
        ...
