"""Graphs whose rounds end in the exact mean: k-peer hyper-hypercube, Simple Base-(k+1), Base-(k+1).

Source: Takezawa et al., "Beyond exponential graph", arXiv 2305.11420, NeurIPS 2023. Integers only:
rounded logarithms give graphs of degree 3 for k = 2. Every round is symmetric, doubly stochastic and of degree <= k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Integers, Mixing
from gossamer.topology.family import Family, Schedule, TopologyOptions
from gossamer.topology.mixings import BlockAverage, Matching
from gossamer.topology.weights import symmetric

SOURCE = "Base-(k+1), arXiv 2305.11420"


class PeersOptions(TopologyOptions):
    """Options of finite-time graphs.

    Attributes:
        k: maximum number of peers that each one exchanges with in a round.
    """

    k: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Segment:
    """Consecutive peers with a graph of their own.

    Attributes:
        start: first peer.
        copies: number of consecutive parts of equal size, each with the same graph.
        size: number of peers of one part.
    """

    start: int
    copies: int
    size: int


@lru_cache(maxsize=4096)
def factors(n: int, k: int) -> tuple[int, ...] | None:
    """Return the fewest factors of n that are all <= k + 1, ascending; None if there are none such; () for n = 1."""
    if n == 1:
        return ()
    best: tuple[int, ...] | None = None
    for factor in range(min(k + 1, n), 1, -1):
        if n % factor == 0:
            rest = factors(n // factor, k)
            if rest is not None and (best is None or len(rest) + 1 < len(best)):
                best = tuple(sorted((factor, *rest)))
    return best


def smooth_part(n: int, k: int) -> int:
    """Return the product of all prime factors of n that are <= k + 1, with their multiplicity."""
    product, rest = 1, n
    for prime in range(2, k + 2):  # composites no longer divide the rest
        while rest % prime == 0:
            product, rest = product * prime, rest // prime
    return product


def digits(n: int, k: int) -> list[tuple[int, int]]:
    """Return (a_l, p_l) of ``n = sum a_l (k + 1)^p_l``, 1 <= a_l <= k, the largest power first."""
    found, power, rest = [], 0, n
    while rest:
        rest, digit = divmod(rest, k + 1)
        if digit:
            found.append((digit, power))
        power += 1
    return found[::-1]


def hyper_hypercube_length(n: int, k: int) -> int:
    """Return the rounds of the hyper-hypercube of a (k+1)-smooth n."""
    return len(_smooth_factors(n, k))


def simple_base_length(n: int, k: int) -> int:
    """Return the rounds of Simple Base-(k+1) of n peers."""
    if factors(n, k) is not None:
        return hyper_hypercube_length(n, k)
    parts = digits(n, k)
    first = hyper_hypercube_length(parts[0][0] * (k + 1) ** parts[0][1], k)
    tails = [number + power for number, (_, power) in enumerate(parts[:-1], 1)]
    return first + max(len(parts) - 1, *tails)


def base_length(n: int, k: int) -> int:
    """Return the rounds of Base-(k+1) of n peers: the shorter of Simple Base, and Simple Base within groups."""
    smooth = smooth_part(n, k)
    within = simple_base_length(n // smooth, k) + hyper_hypercube_length(smooth, k)
    return min(simple_base_length(n, k), within)


def _smooth_factors(n: int, k: int) -> tuple[int, ...]:
    found = factors(n, k)
    if found is None:
        raise ConfigError(
            f"'hyper-hypercube' needs n = {n} to have no prime factor above k + 1 = {k + 1}: raise k, or use 'base'"
        )
    return found


def hyper_hypercube(n: int, k: int, round: int) -> BlockAverage:
    """Return one round (below the length): peers that differ in one digit of the mixed-radix number only average fully.

    Raises:
        ConfigError: n has a prime factor above k + 1.
    """
    sizes = _smooth_factors(n, k)
    inner = int(np.prod(sizes[:round], dtype=np.int64))
    return BlockAverage(n // inner // sizes[round], sizes[round], inner)


def simple_base(n: int, k: int, round: int, groups: int = 1) -> Mixing:
    """Return one round (below the length) of Simple Base-(k+1) within each of `groups` successive groups of n peers."""
    if factors(n, k) is not None:
        block = hyper_hypercube(n, k, round)
        return BlockAverage(groups * block.outer, block.size, block.inner)
    links = _Links(n)
    parts = digits(n, k)
    sizes = [digit * (k + 1) ** power for digit, power in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    length = hyper_hypercube_length(sizes[0], k)
    for number, (digit, power) in enumerate(parts):
        if round < length:
            whole = Segment(starts[number], 1, sizes[number])
            links.average(whole, k, round % max(1, hyper_hypercube_length(sizes[number], k)))
        elif round == length + number and number < len(parts) - 1:
            links.reach_back(starts[number], digit, sizes[number], n)
        elif 0 <= round - length - number - 1 < power and number < len(parts) - 1:
            links.average(Segment(starts[number], digit, sizes[number] // digit), k, round - length - number - 1)
    return links.mixing(groups)


def base(n: int, k: int, round: int) -> Mixing:
    """Return one round (below the length) of Base-(k+1)."""
    smooth = smooth_part(n, k)
    group = n // smooth
    length = simple_base_length(group, k)
    if simple_base_length(n, k) <= length + hyper_hypercube_length(smooth, k):
        return simple_base(n, k, round)
    if round < length:
        return simple_base(group, k, round, groups=smooth)
    across = hyper_hypercube(smooth, k, round - length)
    return BlockAverage(across.outer, across.size, across.inner * group)


class _Links:
    """Collects the weighted edges of one round."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.first: list[Integers] = []
        self.second: list[Integers] = []
        self.weight: list[Floats] = []

    def average(self, segment: Segment, k: int, round: int) -> None:
        """Average fully, within each part, over one digit of its hyper-hypercube."""
        sizes = _smooth_factors(segment.size, k)
        if not sizes:
            return
        size, inner = sizes[round], int(np.prod(sizes[:round], dtype=np.int64))
        places = np.arange(segment.start, segment.start + segment.copies * segment.size, dtype=np.int64)
        members = places.reshape(-1, size, inner).transpose(0, 2, 1).reshape(-1, size)
        low, high = np.triu_indices(size, 1)
        self._add(members[:, low].ravel(), members[:, high].ravel(), 1.0 / size)

    def reach_back(self, start: int, digit: int, size: int, n: int) -> None:
        """Link each peer after V = [start, start + size) to a distinct peer in each of its `digit` parts.

        Afterwards each peer after V has the share of V's mean that it needs, and all parts of V have the right sum.
        """
        later = np.arange(start + size, n, dtype=np.int64)
        weight = size / (n - start)
        for part in range(digit):
            partner = start + part * (size // digit) + np.arange(len(later), dtype=np.int64)
            self._add(later, partner, weight / digit)

    def _add(self, first: Integers, second: Integers, weight: float) -> None:
        self.first.append(first)
        self.second.append(second)
        self.weight.append(np.full(len(first), weight))

    def mixing(self, groups: int) -> Mixing:
        """Return the round, repeated in each of `groups` groups of n peers; a matching if each has one other."""
        shifts = np.repeat(np.arange(groups, dtype=np.int64) * self.n, sum(map(len, self.first)))
        first = np.tile(np.concatenate(self.first), groups) + shifts
        second = np.tile(np.concatenate(self.second), groups) + shifts
        weight = np.tile(np.concatenate(self.weight), groups)
        n = self.n * groups
        busy = np.bincount(np.concatenate([first, second]), minlength=n)
        if busy.max() <= 1 and (weight == weight[0]).all():
            partner = np.arange(n, dtype=np.int64)
            partner[first], partner[second] = second, first
            return Matching(partner, float(weight[0]))
        return symmetric(n, first, second, weight)


def _make_hyper_hypercube(n: int, seed: int, options: PeersOptions) -> Schedule:
    """The exact mean by full averages within groups of at most k + 1 peers; n may have no larger prime factor."""
    length = hyper_hypercube_length(n, options.k)
    return _finite(lambda round: hyper_hypercube(n, options.k, round), length)


def _make_simple_base(n: int, seed: int, options: PeersOptions) -> Schedule:
    """The exact mean for any n, by hyper-hypercubes within groups as large as the digits of n to the base k + 1."""
    return _finite(lambda round: simple_base(n, options.k, round), simple_base_length(n, options.k))


def _make_base(n: int, seed: int, options: PeersOptions) -> Schedule:
    """Base-(k+1): the exact mean for any n, by simple-base as a whole or within groups, whichever is shorter."""
    return _finite(lambda round: base(n, options.k, round), base_length(n, options.k))


def _finite(draw: Callable[[int], Mixing], length: int) -> Schedule:
    return Schedule(lambda round: draw(round % length), cycle=length, is_exact=True, bound=0.0)


hyper_hypercube_family = Family(
    _make_hyper_hypercube, "periodic", "≤ k", "exact in about log₍ₖ₊₁₎ n", SOURCE, PeersOptions
)
simple_base_family = Family(_make_simple_base, "periodic", "≤ k", "exact in ≤ 2 log₍ₖ₊₁₎ n + 2", SOURCE, PeersOptions)
base_family = Family(_make_base, "periodic", "≤ k", "exact in ≤ 2 log₍ₖ₊₁₎ n + 2", SOURCE, PeersOptions)
