"""Dropout whose masks follow from an address alone, so that they are the same on every engine and in every mode.

A participant's local step has a key, 64 bits that follow from (seed, round, phase, participant, step); the calls of
dropout in a forward pass are numbered, and the elements of a tensor have coordinates. SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) turns these into 64 random bits: its outputs are
addressed by their number, and each seeds a sequence of its own, one level for each dimension. So the mask of a sample
does not depend on how many others stand beside it, wherever the batch dimension is. Integers of torch are enough, which
`torch.vmap` and every device understand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import ConfigError


def _signed(number: int) -> int:
    """Return a number modulo 2^64 as torch's int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_GAMMA = _signed(0x9E3779B97F4A7C15)  # the constants of SplitMix64
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_SELU_FLOOR = 1.7580993408473766  # alpha times scale of SELU (Klambauer et al., arXiv 1706.02515)


class Dropout:
    """The calls of dropout in one forward pass.

    Attributes:
        num_calls: those so far that drop something.
    """

    def __init__(self, key: Tensor | None) -> None:
        """Begin a forward pass.

        Args:
            key: int64 [], or [s] where inputs have a leading dimension of s participants; None: nothing is dropped.
        """
        self._key, self.num_calls = key, 0

    def __call__(self, x: Tensor, p: float, num_dims: int | None = None) -> Tensor:
        """Set a share p of x to 0, and divide the rest by 1 - p, as `torch.nn.functional.dropout` does.

        Args:
            x: float tensor.
            p: probability of each element to be dropped.
            num_dims: leading dimensions whose elements are dropped as a whole; None: all of them.
        """
        kept = self._kept(x, p, num_dims)
        if kept is None:
            return x
        return x * kept.to(x.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)  # many times as fast as torch.where

    def alpha(self, x: Tensor, p: float, num_dims: int | None = None) -> Tensor:
        """Set a share p to SELU's floor, and keep mean and variance, as `torch.nn.functional.alpha_dropout` does."""
        kept = self._kept(x, p, num_dims)
        if kept is None:
            return x
        a = 1 / math.sqrt((1 - p) * (1 + p * _SELU_FLOOR**2)) if p < 1 else 0.0
        return torch.where(kept, x, -_SELU_FLOOR) * a + _SELU_FLOOR * a * p

    def _kept(self, x: Tensor, p: float, num_dims: int | None) -> Tensor | None:
        """Return which elements are kept, bool of a shape that broadcasts to that of x; None: all of them."""
        if not 0 <= p <= 1:
            raise ConfigError(f"the probability of dropout is {p!r}: give a number from 0 to 1")
        if p == 0 or self._key is None:
            return None
        lead = self._key.dim()
        held = x.dim() if num_dims is None else num_dims + lead
        shape = [*x.shape[:held], *[1] * (x.dim() - held)]
        bits = random_bits(self._key + _signed(self.num_calls * _GAMMA), shape[lead:])
        self.num_calls += 1
        # bits are uniform in [-2^63, 2^63), and p = 1 keeps none of them
        return bits >= int(p * 2.0**64) - (1 << 63) if p < 1 else torch.zeros_like(bits, dtype=torch.bool)


def random_bits(key: Tensor, shape: list[int]) -> Tensor:
    """Return 64 random bits for each element, int64 [*key.shape, *shape]; those of an element follow from its place.

    Args:
        key: int64 tensor.
        shape: sizes of the further dimensions.
    """
    bits = _mixed(key + _GAMMA)
    for size in shape:
        numbers = torch.arange(1, size + 1, device=key.device) * _GAMMA
        bits = _mixed(bits[..., None] + numbers)
    return bits


def _mixed(z: Tensor) -> Tensor:
    """Finish SplitMix64 on int64 `z`, which is overwritten; shifts are those of unsigned numbers."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _FIRST
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _SECOND
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z
