"""Lossy codecs of payloads: what a receiver decodes, and how many bytes travel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from gossamer import rng
from gossamer.aggregate.codec_base import BaseCodec, Codec, Draws, as_bytes, numbers, pack_bits, uniform, unpack_bits
from gossamer.aggregate.tensor_codecs import Int4, Int8, LowRank
from gossamer.errors import ConfigError, nearest
from gossamer.options import parse_options

__all__ = ["BaseCodec", "Bitmap", "CODECS", "Codec", "Identity", "Quantise", "RandomK", "Sign", "TopK", "make_codec"]

INDEX_BYTES = 4


class Identity(BaseCodec):
    """No compression."""

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return a copy."""
        return rows.clone()

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of the row itself."""
        return d * bytes_per_number

    def contraction(self, d: int) -> float:
        """Return 1."""
        return 1.0


class Bitmap(Identity):
    """Numbers that are 0 or 1, a bit each."""

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return d bits."""
        return pack_bits(rows, 1)

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Return zeros and ones."""
        return unpack_bits(codes, d, 1).to(dtype)

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the bytes that d bits fill."""
        return math.ceil(d / 8)


class _Sparse(BaseCodec):
    """Options of codecs that keep some entries of a row, and set the others to 0.

    Attributes:
        share: share of the entries, rounded up; or
        k: number of entries.
    """

    share: float | None = Field(default=None, gt=0, le=1)
    k: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> _Sparse:
        if (self.share is None) == (self.k is None):
            raise ValueError("give either share or k")
        return self

    def count(self, d: int) -> int:
        """Return how many of d entries are kept."""
        return min(self.k or math.ceil((self.share or 0.0) * d - 1e-9), d)

    def contraction(self, d: int) -> float:
        """Return k / d (Stich et al., arXiv 1809.07599, Lemma A.1)."""
        return self.count(d) / d


class TopK(_Sparse):
    """Keeps the k entries of largest absolute value; sends them and their places (Stich et al., arXiv 1809.07599)."""

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows with k entries other than 0."""
        kept = self._kept(rows)
        return torch.zeros_like(rows).scatter_(1, kept, rows.gather(1, kept))

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return k places and k numbers."""
        kept = self._kept(rows)
        return as_bytes(kept.to(torch.int32), rows.gather(1, kept))

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Put the numbers at their places, and 0 elsewhere."""
        size = self.count(d) * INDEX_BYTES
        kept, values = numbers(codes[:, :size], torch.int32).long(), numbers(codes[:, size:], dtype)
        return values.new_zeros(len(codes), d).scatter_(1, kept, values)

    def _kept(self, rows: Tensor) -> Tensor:
        return rows.abs().topk(self.count(rows.shape[1]), dim=1, sorted=False).indices

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of k numbers and k indices of 32 bits."""
        return self.count(d) * (bytes_per_number + INDEX_BYTES)


class RandomK(_Sparse):
    """Keeps k random entries; receivers draw their places themselves, so that only values travel.

    Attributes:
        unbiased: whether they are multiplied by d / k; then nothing is lost in the mean, but rows do not contract.
    """

    unbiased: bool = False

    @property
    def is_unbiased(self) -> bool:
        """Whether entries are scaled up."""
        return self.unbiased

    def omega(self, d: int) -> float:
        """Return d / k - 1, the relative variance of every row."""
        return d / self.count(d) - 1.0

    def contraction(self, d: int) -> float:
        """Return k / d, or what is left of 1 - omega."""
        return max(0.0, 1.0 - self.omega(d)) if self.unbiased else super().contraction(d)

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows with k entries other than 0."""
        kept = self._places(rows.shape[1], seed=seed, round=round, phase=phase, peers=peers).to(rows.device)
        return torch.zeros_like(rows).scatter_(1, kept, self._values(rows, kept))

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return k numbers."""
        return as_bytes(self._values(rows, self._places(rows.shape[1], **draws).to(rows.device)))

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Put the numbers at their places, which are drawn again, and 0 elsewhere."""
        values = numbers(codes, dtype)
        return values.new_zeros(len(codes), d).scatter_(1, self._places(d, **draws).to(codes.device), values)

    def _values(self, rows: Tensor, kept: Tensor) -> Tensor:
        values = rows.gather(1, kept)
        return values.mul_(rows.shape[1] / kept.shape[1]) if self.unbiased else values

    def _places(self, d: int, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return which of d entries are kept, int64 [s, k]."""
        kept = np.empty((len(peers), self.count(d)), dtype=np.int64)
        for i, peer in enumerate(peers.tolist()):
            source = rng.generator(seed, "codec-random-k", round, phase, participant=peer)
            kept[i] = source.choice(d, kept.shape[1], replace=False, shuffle=False)
        return torch.from_numpy(kept)

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of k numbers."""
        return self.count(d) * bytes_per_number


class Sign(BaseCodec):
    """One bit an entry, and the mean absolute value (Karimireddy et al., arXiv 1901.09847): ``|v|_1 / d * sign(v)``.

    As a bit cannot say 0, the sign of 0 is 1.
    """

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows of two values each."""
        scale = rows.abs().mean(dim=1, keepdim=True)
        return torch.where(rows >= 0, scale, -scale)

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return d bits, and the mean absolute value."""
        return as_bytes(pack_bits(rows >= 0, 1), rows.abs().mean(dim=1, keepdim=True))

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Give the mean absolute value the signs."""
        size = -(-d // 8)
        scale = numbers(codes[:, size:], dtype)
        return torch.where(unpack_bits(codes[:, :size], d, 1) == 1, scale, -scale)

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of d bits and one number."""
        return -(-d // 8) + bytes_per_number

    def contraction(self, d: int) -> float:
        """Return 1 / d, reached by rows with a single entry; a row has ``|v|_1^2 / (d |v|^2)``, mostly about 2 / pi."""
        return 1.0 / d


class Quantise(BaseCodec):
    """QSGD (Alistarh et al., arXiv 1610.02132), scaled to contract (Koloskova et al., arXiv 1902.00340).

    Entries are rounded at random, without bias, to one of ``levels`` parts of the row's norm, and divided by 1 + omega
    with omega = min(d / levels^2, sqrt(d) / levels), the relative variance.

    Attributes:
        levels: steps between 0 and the norm.
        unbiased: whether they are not divided, as in QSGD; then they need not contract.
    """

    levels: int = Field(ge=1)
    unbiased: bool = False

    @property
    def is_unbiased(self) -> bool:
        """Whether entries are not scaled down."""
        return self.unbiased

    def omega(self, d: int) -> float:
        """Return the bound of the variance relative to ``||v||^2``."""
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """Return rows on a grid."""
        return self._scaled_(*self._rounded(rows, seed=seed, round=round, phase=phase, peers=peers))

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """Return d whole numbers, packed, and the norm."""
        level, norm = self._rounded(rows, **draws)
        return as_bytes(pack_bits(level + self.levels, self._num_bits), norm)

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """Return rows on a grid."""
        norm = numbers(codes[:, -dtype.itemsize :], dtype)
        level = unpack_bits(codes[:, : -dtype.itemsize], d, self._num_bits) - self.levels
        return self._scaled_(level.to(dtype), norm)

    @property
    def _num_bits(self) -> int:
        return math.ceil(math.log2(2 * self.levels + 1))

    def _rounded(self, rows: Tensor, **draws: Unpack[Draws]) -> tuple[Tensor, Tensor]:
        """Return levels with the signs of their entries, and norms [s, 1]."""
        norm = rows.norm(dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)  # squares of small floats vanish
        ratio = rows.abs().div_(torch.where(norm > 0, norm, 1.0))
        level = ratio.mul_(self.levels).add_(uniform(rows, "codec-quantise", **draws)).floor_()
        level.clamp_(max=self.levels)  # the sum may be rounded up to the next whole number
        return level.copysign_(rows), norm

    def _scaled_(self, level: Tensor, norm: Tensor) -> Tensor:
        shrinking = 1.0 if self.unbiased else 1.0 + self.omega(level.shape[1])
        return level.mul_(norm / (self.levels * shrinking))

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """Return the size of d entries of 2 levels + 1 values, without entropy coding, and one number."""
        return -(-d * self._num_bits // 8) + bytes_per_number

    def contraction(self, d: int) -> float:
        """Return 1 / (1 + omega), or what is left of 1 - omega."""
        return super().contraction(d) if self.unbiased else 1.0 / (1.0 + self.omega(d))


CODECS: dict[str, type[BaseCodec]] = {
    "none": Identity,
    "top-k": TopK,
    "random-k": RandomK,
    "sign": Sign,
    "quantise": Quantise,
    "int8": Int8,
    "int4": Int4,
    "low-rank": LowRank,
}


def make_codec(spec: str | Mapping[str, Any], where: str = "codec") -> BaseCodec:
    """Build a codec.

    Args:
        spec: its name, or a mapping of ``name`` and options.
        where: the dotted path of the section, named in errors.

    Raises:
        ConfigError: an unknown name, or a missing, unknown or wrong option.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in CODECS:
        raise ConfigError(
            f"{where}.name = {name!r} is no codec{nearest(str(name), CODECS)} (known: {', '.join(CODECS)}): name one"
        )
    return parse_options(CODECS[name], options, where)
