"""The records that pass between the loop and an engine: the plan of a phase, and what a block returns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Block(NamedTuple):
    """Participants of one variant that are trained together.

    Their payloads are added up leaf by leaf: a leaf is an aligned run of `leaf` rows (a power of two) of the variant,
    so the tree over all leaves, and with it every bit, does not depend on how many of them make a block.

    Attributes:
        variant: number of the variant.
        first_leaf: number of the block's first leaf among those of its variant.
        leaf: rows of a leaf; the variant's last one may be shorter.
        rows: slice of the plan's rows.
    """

    variant: int
    first_leaf: int
    leaf: int
    rows: slice


@dataclass(frozen=True)
class RoundPlan:
    """Who trains what in one phase of one round; rows are sorted by variant, most steps first, then client.

    Attributes:
        round, phase: address of the phase.
        client: int64 [p], participants.
        site: int64 [p], row of the resident state that each participant starts from (0 for a server).
        weight: float64 [p], aggregation weights.
        steps: int32 [p], local steps.
        variant: int16 [p], number of each one's variant, see `gossamer.engines.task.Variant`.
        base: int64 [p], model version that each starts from; equal to `round` unless asynchronous.
        lr: local learning rate.
        dropped: int64 [q], clients that were chosen but do not take part.
        mixing: how peers exchange: by the "topology" of the round, or by the "mean" of all; "none": there is a server.
    """

    round: int
    phase: int
    client: NDArray[np.int64]
    site: NDArray[np.int64]
    weight: NDArray[np.float64]
    steps: NDArray[np.int32]
    variant: NDArray[np.int16]
    base: NDArray[np.int64]
    lr: float
    dropped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    mixing: Literal["none", "topology", "mean"] = "none"

    def digest(self) -> str:
        """Return a SHA-256 over every field, to compare plans between processes."""
        digest = hashlib.sha256()
        for item in fields(self):
            value = getattr(self, item.name)
            digest.update(item.name.encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        return digest.hexdigest()

    def variant_rows(self, variant: int) -> slice:
        """Return the rows of one variant; they are contiguous."""
        low, high = np.searchsorted(self.variant, [variant, variant + 1])
        return slice(int(low), int(high))

    def blocks(self, variant: int, leaf: int, leaves_per_block: int = 1) -> Iterator[Block]:
        """Cut a variant's rows into blocks of whole leaves; `leaf` is a power of two."""
        rows, size = self.variant_rows(variant), leaf * leaves_per_block
        for number, low in enumerate(range(rows.start, rows.stop, size)):
            yield Block(variant, number * leaves_per_block, leaf, slice(low, min(low + size, rows.stop)))


@dataclass
class BlockResult:
    """What one block of s participants returns.

    Attributes:
        block: which block.
        payload: ``{name: tensors}``: for each leaf its weighted tree sum [d_sub], None if every row was dropped; where
            every participant has a window of its own, the weighted rows, [d_sub] each, instead. [1] for scalars.
        loss: mean training loss of each row, length s.
        finite: whether each row's update was finite, length s; the others are not in the sum.
        private: ``{name: rows [s, d]}``, new client state of algorithms that keep some.
    """

    block: Block
    payload: dict[str, list[Tensor | None]]
    loss: list[float]
    finite: list[bool]
    private: dict[str, Tensor] = field(default_factory=dict)
