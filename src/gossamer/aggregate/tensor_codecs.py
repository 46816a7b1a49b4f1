"""Codecs that look at the tensors of a row one by one: whole numbers with a scale for each, and low rank."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.aggregate.codec_base import BaseCodec, Draws, as_bytes, numbers, pack_bits, uniform, unpack_bits


class _Integers(BaseCodec):
    """Whole numbers times a scale, one a tensor: its largest absolute value is kept as it is.

    Attributes:
        rounding: "stochastic" is unbiased, its relative variance bounded by `omega`; "nearest" is biased, and
            contracts.
    """

    bits: ClassVar[int]

    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def is_unbiased(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding == "stochastic"

    @property
    def levels(self) -> int:
        """Steps between 0 and the largest absolute value."""
        return (1 << (self.bits - 1)) - 1

    def omega(self, d: int) -> float:
        """Return the relative variance of the worst row: n others beside the largest number of a tensor.

        An entry of t steps of the grid, 0 <= t <= 1, has the variance t (1 - t); the largest of ``n t (1 - t) /
        (levels^2 + n t^2)`` is ``(sqrt(1 + n / levels^2) - 1) / 2``.
        """
        return (math.sqrt(1 + self._num_others(d) / self.levels**2) - 1) / 2 if self.is_unbiased else 0.0

    def contraction(self, d: int) -> float:
        """Return 1 - omega; where rounding is to the nearest, errors are half a step at most, and no larger than v."""
        return super().contraction(d) if self.is_unbiased else 1 / (1 + self._num_others(d) / (4 * self.levels**2))

    def _num_others(self, d: int) -> int:
        largest: int = max(part.stop - part.start for part, _ in self.parts(d))
        return largest - 1

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows on a grid."""
        return self._scaled_(*self._rounded(rows, seed=seed, round=round, phase=phase, peers=peers))

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return whole numbers, packed, and the largest absolute value of each tensor."""
        level, largest = self._rounded(rows, **draws)
        return as_bytes(pack_bits(level + self.levels, self.bits), largest)

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Return rows on a grid."""
        size = -(-d * self.bits // 8)
        level = (unpack_bits(codes[:, :size], d, self.bits) - self.levels).to(dtype)
        return self._scaled_(level, numbers(codes[:, size:], dtype))

    def _rounded(self, rows: Tensor, **draws: Unpack[Draws]) -> tuple[Tensor, Tensor]:
        """Return whole numbers [s, d], and the largest absolute value of each tensor, [s, tensors]."""
        parts = self.parts(rows.shape[1])
        largest = torch.cat([rows[:, part].abs().amax(dim=1, keepdim=True) for part, _ in parts], dim=1)
        level = uniform(rows, f"codec-int{self.bits}", **draws) if self.is_unbiased else torch.full_like(rows, 0.5)
        for number, (part, _) in enumerate(parts):
            scale = largest[:, number, None]
            level[:, part] += (rows[:, part] / torch.where(scale > 0, scale, 1.0)).mul_(self.levels)
        return level.floor_().clamp_(-self.levels, self.levels), largest

    def _scaled_(self, level: Tensor, largest: Tensor) -> Tensor:
        level.div_(self.levels)
        for number, (part, _) in enumerate(self.parts(level.shape[1])):
            level[:, part] *= largest[:, number, None]
        return level

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of d whole numbers, packed, and of one number a tensor."""
        return -(-d * self.bits // 8) + len(self.parts(d)) * bytes_per_number


class Int8(_Integers):
    """Whole numbers from -127 to 127."""

    bits: ClassVar[int] = 8


class Int4(_Integers):
    """Whole numbers from -7 to 7."""

    bits: ClassVar[int] = 4


class LowRank(BaseCodec):
    """A matrix as the product of two of a low rank; other tensors, and matrices that would not shrink, as they are.

    As PowerSGD (Vogels et al., arXiv 1905.13727), but each sender alone, and from a fresh random start in the place of
    the last round's factor: with M [m, n] (a convolution's weight: by its outputs) and Q [n, r] random, P becomes an
    orthonormal basis of the columns of ``M Q``, and P and ``M^T P`` are sent. Decoded is ``P P^T M``, a projection:
    what is lost is orthogonal to what is sent.

    Attributes:
        rank: r.
        power_iterations: times that P is replaced by a basis of ``M M^T P``, which comes closer to the best projection.
    """

    rank: int = Field(ge=1)
    power_iterations: int = Field(default=1, ge=0)

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows whose matrices have rank r."""
        sent = self._sent(rows, seed=seed, round=round, phase=phase, peers=peers)
        return self._read(sent, rows.shape[1])

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return two factors of each matrix that shrinks, and the rest."""
        return as_bytes(self._sent(rows, **draws))

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Multiply the factors."""
        return self._read(numbers(codes, dtype), d)

    def _sent(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return the numbers that are sent, tensor after tensor: P and ``M^T P``, or the tensor itself."""
        found = []
        for number, (part, shape) in enumerate(self.parts(rows.shape[1])):
            if not self._shrinks(shape):
                found.append(rows[:, part])
                continue
            found.append(rows.new_empty(len(rows), self._num_sent(shape)))
            for row, out, peer in zip(rows[:, part], found[-1], peers.tolist(), strict=True):
                source = rng.generator(seed, "codec-low-rank", round, phase, participant=peer, extra=number)
                matrix = row.view(shape[0], -1)
                drawn = torch.from_numpy(source.standard_normal((matrix.shape[1], self.rank))).to(matrix)
                torch.cat([factor.flatten() for factor in self._factors(matrix, drawn)], out=out)
        return torch.cat(found, dim=1)

    def _read(self, sent: Tensor, d: int) -> Tensor:
        """Return rows [s, d] of what is sent."""
        parts = self.parts(d)
        found = list(torch.split(sent, [self._num_sent(shape) for _, shape in parts], dim=1))
        for number, (part, shape) in enumerate(parts):
            if self._shrinks(shape):
                whole = sent.new_empty(len(sent), part.stop - part.start)
                for row, out in zip(found[number], whole, strict=True):
                    left, right = row.clone().tensor_split([self.rank * shape[0]])  # in memory of its own, for its bits
                    torch.mm(left.view(-1, self.rank), right.clone().view(self.rank, -1), out=out.view(shape[0], -1))
                found[number] = whole
        return torch.cat(found, dim=1)

    def _factors(self, matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        largest = matrix.abs().max()
        scaled = matrix / torch.where(largest > 0, largest, 1.0)  # so that no square vanishes
        basis = torch.linalg.qr(scaled @ start).Q
        for _ in range(self.power_iterations):
            basis = torch.linalg.qr(scaled @ (scaled.T @ basis)).Q
        return basis, (basis.T @ scaled).mul_(largest)

    def _num_sent(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers are sent of a tensor."""
        size = math.prod(shape)
        return self.rank * (shape[0] + size // shape[0]) if self._shrinks(shape) else size

    def _shrinks(self, shape: tuple[int, ...]) -> bool:
        size = math.prod(shape)
        return len(shape) > 1 and size > 0 and self.rank * (shape[0] + size // shape[0]) < size

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of two factors of each matrix that shrinks, and of the rest."""
        return bytes_per_number * sum(self._num_sent(shape) for _, shape in self.parts(d))

    def contraction(self, d: int) -> float:
        """Return the least r / min(m, n), in expectation, reached by equal singular values.

        The larger a singular value, the larger its expected share in a random subspace of r dimensions, and the shares
        add up to r: by Chebyshev's sum inequality at least r / min(m, n) of the squared norm is kept.
        """
        shares = [
            self.rank / min(shape[0], math.prod(shape) // shape[0])
            for _, shape in self.parts(d)
            if self._shrinks(shape)
        ]
        return min(shares, default=1.0)
