"""The records that pass between the loop and an engine: the plan of a phase, and what came of its participants."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray


class Block(NamedTuple):
    """Participants of one variant that are trained together.

    Their payloads are added up tile by tile: a tile is an aligned run of `tile` rows (a power of two) of the variant,
    so the tree over all tiles, and with it every bit, does not depend on how many of them make a block.

    Attributes:
        variant: number of the variant.
        first_tile: number of the block's first tile among those of its variant.
        tile: rows of a tile; the variant's last one may be shorter.
        rows: slice of the plan's rows.
    """

    variant: int
    first_tile: int
    tile: int
    rows: slice


@dataclass(frozen=True)
class RoundPlan:
    """Who trains what in one phase of one round; rows are sorted by variant, most steps first, then client.

    A phase is one plan and two verbs: its participants train, then there is an exchange. Most algorithms have one phase
    a round. (round, phase), both counted from 0, addresses random numbers, messages and commits.

    Attributes:
        round, phase: address of the phase.
        client: int64 [p], participants.
        weight: float64 [p], aggregation weights.
        steps: int32 [p], local steps.
        variant: int16 [p], number of each one's variant, see `gossamer.engines.task.Variant`.
        lr: local learning rate.
        dropped: int64 [q], clients that were chosen but do not take part.
        variants: int16 [n], number of each peer's variant, where the plan is for one of them alone; else empty.
        mixing: exchange of peers: by the "topology" of the round, or by the "mean" of all; "none": there is a server.
    """

    round: int
    phase: int
    client: NDArray[np.int64]
    weight: NDArray[np.float64]
    steps: NDArray[np.int32]
    variant: NDArray[np.int16]
    lr: float
    dropped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    variants: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, dtype=np.int16))
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

    def blocks(self, variant: int, tile: int, tiles_per_block: int = 1) -> Iterator[Block]:
        """Cut a variant's rows into blocks of whole tiles; `tile` is a power of two."""
        rows, size = self.variant_rows(variant), tile * tiles_per_block
        for number, low in enumerate(range(rows.start, rows.stop, size)):
            yield Block(variant, number * tiles_per_block, tile, slice(low, min(low + size, rows.stop)))


class TrainReport(NamedTuple):
    """What is known outside an engine of participants that were to train.

    Attributes:
        rows: slice of the plan's rows.
        loss: mean training loss of each.
        finite: whether each one's update is used; the others are dropped, because they are not finite or too large.
        missing: why these participants return nothing; None: they have returned.
        norm: Euclidean norm of each one's update, NaN where that is not finite.
    """

    rows: slice
    loss: Sequence[float]
    finite: Sequence[bool]
    missing: str | None = None
    norm: Sequence[float] = ()

    def reason(self, number: int) -> str:
        """Return why the update of the report's participant `number` is dropped."""
        return self.missing or ("too large" if math.isfinite(self.norm[number]) else "not finite")

    @classmethod
    def of_missing(cls, rows: slice, reason: str) -> Self:
        """Return the report of participants that return nothing."""
        number = rows.stop - rows.start
        return cls(rows, [math.nan] * number, [False] * number, reason, [math.nan] * number)


STOPPED = "stopped"  # why participants are missing where a stop was requested
