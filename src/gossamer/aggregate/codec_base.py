"""What a codec of payloads is, what codecs share, and which one a federation uses in either direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, Self, TypedDict, Unpack, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from torch import Tensor

from gossamer import rng
from gossamer.options import Options

Shapes = tuple[tuple[int, ...], ...]


class Draws(TypedDict):
    """Whose random numbers rows have: see `Codec.compress`."""

    seed: int
    round: int
    phase: NotRequired[int]
    peers: NDArray[np.int64]


@runtime_checkable
class Codec(Protocol):
    """Compresses rows before they are sent; contracts: ``E ||Q(v) - v||^2 <= (1 - contraction) ||v||^2``."""

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return what receivers decode, a new tensor; row i depends on rows[i], seed, round, phase and peers[i] alone.

        Args:
            rows: float32 or float64 [s, d], finite.
            seed, round, phase: seed of the run, and numbers of the round and the phase.
            peers: int64 [s], sender of each row.
        """
        ...

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return what travels of rows, uint8 [s, bytes of a row]; arguments as of `compress`."""
        ...

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Return what `compress` makes of the rows [s, d] of a dtype that were encoded, bit for bit but for signs of 0.

        Args:
            codes: what `encode` returned, or some of its rows, with their senders.
        """
        ...

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the bytes on the wire of a row of d numbers that take `bytes_per_number` uncompressed."""
        ...

    def contraction(self, d: int) -> float:
        """Return what is guaranteed for every row of d numbers, in [0, 1]; 1: nothing is lost; 0: no guarantee."""
        ...


class BaseCodec(Options):
    """Options of a codec; it sees a row as one vector, unless it is bound to the shapes of the tensors in a row."""

    _shapes: Shapes = PrivateAttr(default=())

    def of_shapes(self, shapes: Shapes) -> Self:
        """Return the codec for rows that consist of tensors of these shapes, one after another."""
        bound = self.model_copy()
        bound._shapes = shapes
        return bound

    @property
    def is_unbiased(self) -> bool:
        """Whether ``E Q(v) = v`` although something is lost; then it need not contract."""
        return False

    def omega(self, d: int) -> float:
        """Return the bound of ``E ||Q(v) - v||^2 / ||v||^2`` where the codec is unbiased."""
        return 0.0

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """See `Codec`."""
        raise NotImplementedError

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """See `Codec`; here all numbers of the rows."""
        return as_bytes(self.compress(rows, **draws))

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """See `Codec`."""
        return numbers(codes, dtype)

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """See `Codec`."""
        raise NotImplementedError

    def contraction(self, d: int) -> float:
        """See `Codec`; of unbiased codecs ``1 - omega``, where that is positive."""
        return max(0.0, 1.0 - self.omega(d))

    def parts(self, d: int) -> Sequence[tuple[slice, tuple[int, ...]]]:
        """Return where the tensors of a row of d numbers lie, and their shapes."""
        found, end = [], 0
        for shape in self._shapes or ((d,),):
            found.append((slice(end, end + math.prod(shape)), shape))
            end += math.prod(shape)
        assert end == d, f"the codec is bound to {end} numbers, not {d}"
        return found


@dataclass(frozen=True)
class Communication:
    """How a server's clients compress what they send, and the server what they receive; by default not at all.

    Attributes:
        uplink: codec of payloads that are averaged.
        error_feedback: whether clients add what was lost to the next payload (Karimireddy et al., arXiv 1901.09847;
            Stich et al., arXiv 1809.07599).
        downlink: codec of what is received: of the server's arrays if it is unbiased, otherwise of their changes since
            what clients know.
    """

    uplink: BaseCodec | None = None
    error_feedback: bool = False
    downlink: BaseCodec | None = None

    @property
    def sends_changes(self) -> bool:
        """Whether the server sends changes to what its clients know."""
        return self.downlink is not None and not self.downlink.is_unbiased


def uniform(rows: Tensor, purpose: str, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
    """Return uniform numbers in [0, 1) for each entry of `rows`; those of a row belong to its sender."""
    drawn = np.empty(tuple(rows.shape), dtype=np.float64 if rows.dtype == torch.float64 else np.float32)
    for i, peer in enumerate(peers.tolist()):
        rng.generator(seed, purpose, round, phase, participant=peer).random(dtype=drawn.dtype.type, out=drawn[i])
    return torch.from_numpy(drawn).to(rows.device)


def as_bytes(*columns: Tensor) -> Tensor:
    """Return rows of several arrays [s, k] of any dtypes as uint8, those of one row side by side."""
    return torch.cat([each.contiguous().view(torch.uint8) for each in columns], dim=1)


def numbers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers [s, k] of a dtype that have these bytes."""
    return codes.clone(memory_format=torch.contiguous_format).view(dtype)  # of aligned memory


def pack_bits(values: Tensor, num_bits: int) -> Tensor:
    """Pack whole numbers from 0 to 2 ** num_bits - 1, [s, d], into uint8 [s, ceil(num_bits d / 8)]."""
    if num_bits == 8:
        return values.to(torch.uint8)
    whole = values.to(torch.int64)
    bits = torch.stack([((whole >> place) & 1).to(torch.uint8) for place in range(num_bits)], dim=2)
    return torch.from_numpy(np.packbits(bits.flatten(1).cpu().numpy(), axis=1)).to(values.device)


def unpack_bits(packed: Tensor, d: int, num_bits: int) -> Tensor:
    """Return the d whole numbers in each row of what `pack_bits` returned, int64 [s, d]."""
    if num_bits == 8:
        return packed.to(torch.int64)
    bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=num_bits * d)).to(packed.device)
    places = bits.view(len(packed), d, num_bits).unbind(2)
    return torch.stack([bit.to(torch.int64) << place for place, bit in enumerate(places)]).sum(0)
