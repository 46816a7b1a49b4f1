"""One-peer exponential graphs, random matchings, CECA and Epidemic Learning: new links every round."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.topology.base import Mixing
from gossamer.topology.classic import ceil_log2
from gossamer.topology.family import Family, Schedule, TopologyOptions
from gossamer.topology.mixings import Matching, Shift
from gossamer.topology.randomgraphs import check_regular, regular_edges
from gossamer.topology.sparse import Joint, Sparse
from gossamer.topology.weights import symmetric

EPIDEMIC = "Epidemic Learning, NeurIPS 2023"


class EpidemicOptions(TopologyOptions):
    """Options of Epidemic Learning.

    Attributes:
        degree: number of messages that each peer sends in a round (s in the paper).
    """

    degree: int = Field(default=4, ge=1)


class LocalEpidemicOptions(EpidemicOptions):
    """Options of el-local.

    Attributes:
        averaging: "receiver" (receivers average with equal weights, rows sum to 1) or "sender" (senders divide their
            row among receivers and themselves, columns sum to 1, for push-sum).
    """

    averaging: Literal["receiver", "sender"] = "receiver"


def _one_peer_exp(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """In round r peer i averages with what comes from i - 2^(r mod t), t = ceil(log2 n); exact if n = 2^t.

    Source: Ying et al., "Exponential graph is provably efficient", NeurIPS 2021.
    """
    cycle = ceil_log2(n)
    return Schedule(
        lambda round: Shift(n, (1 << (round % cycle),), (0.5,)),
        cycle=cycle,
        is_exact=n == 1 << cycle,
        bound=0.0 if n == 1 << cycle else None,
    )


def _random_match(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """A uniform matching every round, perfect but for one peer if n is odd; partners average.

    E[L] of its Laplacian is m P, m = n / (n - 1) for even n and 1 for odd n, so that the mean squared contraction of
    ``I - c L`` is ``1 - 2 c (1 - c) m`` in every direction: about 1/2 for c = 1/2, 0.707 a round.
    """
    slope = n / (n - 1) if n % 2 == 0 else 1.0

    def draw(round: int) -> Mixing:
        order = rng.generator(seed, "topology-round", round).permutation(n).astype(np.int64)
        partner = np.arange(n, dtype=np.int64)
        first, second = order[0 : n - 1 : 2], order[1::2]
        partner[first], partner[second] = second, first
        return Matching(partner, 0.5)

    def rate(share: float) -> float:
        weight = 0.5 * share
        return math.sqrt(max(0.0, 1.0 - 2.0 * weight * (1.0 - weight) * slope))

    return Schedule(draw, cycle=None, rate=rate, bound=rate(1.0))


def _ceca(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """The exact mean in ceil(log2 n) rounds for any n: see `Joint`."""
    if options.lazy:
        raise ConfigError("ceca.lazy = True: lazy rounds do not end in the exact mean: leave lazy out")
    cycle = ceil_log2(n)

    def draw(round: int) -> Mixing:
        position = round % cycle
        others = (n - 1) >> (cycle - position)
        return Joint(n, others, (n - 1) >> (cycle - position - 1) & 1)  # type: ignore[arg-type]

    return Schedule(draw, cycle=cycle, is_exact=True, bound=0.0)


def _el_oracle(n: int, seed: int, options: EpidemicOptions) -> Schedule:
    """A random regular graph every round, weights 1 / (s + 1).

    By symmetry the mean squared contraction is ``(tr E[W^2] - 1) / (n - 1)`` in every direction, tr W^2 = n / (s + 1).
    """
    degree = options.degree
    check_regular(n, degree)

    def draw(round: int) -> Mixing:
        source = rng.generator(seed, "topology-round", round)
        first, second = regular_edges(n, degree, source)
        names = source.permutation(n)  # so that no peer is special
        return symmetric(n, names[first], names[second], np.full(len(first), 1.0 / (degree + 1)))

    def rate(share: float) -> float:
        trace = n * ((1.0 - share) ** 2 + (2.0 * share * (1.0 - share) + share**2) / (degree + 1))
        return math.sqrt(max(0.0, (trace - 1.0) / (n - 1)))

    return Schedule(draw, cycle=None, rate=rate, bound=rate(1.0))


def _el_local(n: int, seed: int, options: LocalEpidemicOptions) -> Schedule:
    """Each peer sends to s random others and averages what it receives: row-stochastic only, so the mean drifts.

    With ``averaging: sender`` it is column-stochastic, which keeps the sum, as push-sum requires.
    """
    degree = options.degree
    if degree >= n:
        raise ConfigError(f"el-local.degree = {degree} is not below n = {n}: lower it")

    def draw(round: int) -> Mixing:
        source = rng.generator(seed, "topology-round", round)
        sender = np.repeat(np.arange(n, dtype=np.int64), degree)
        receiver = _distinct_others(n, degree, source)
        if options.averaging == "sender":
            share = np.full(len(sender), 1.0 / (degree + 1))
            return Sparse.of_edges(n, receiver, sender, share, stochasticity="column")
        received = np.bincount(receiver, minlength=n)
        weight = np.asarray(1.0 / (1.0 + received[receiver]), dtype=np.float64)
        return Sparse.of_edges(n, receiver, sender, weight, stochasticity="row")

    return Schedule(draw, cycle=None)


def _distinct_others(n: int, count: int, source: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return `count` distinct others for each of n peers, int64 [n * count]."""
    if count * count > n:
        keys = source.random((n, n - 1)) if n <= 5_000 else None
        if keys is None:
            rows = [source.choice(n - 1, size=count, replace=False) for _ in range(n)]
            others = np.array(rows, dtype=np.int64)
        else:
            others = np.argpartition(keys, count - 1, axis=1)[:, :count]
    else:
        others = source.integers(n - 1, size=(n, count))
        while True:
            ordered = np.sort(others, axis=1)
            again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
            if not len(again):
                break
            others[again] = source.integers(n - 1, size=(len(again), count))
    others = others + (others >= np.arange(n)[:, None])
    return others.reshape(-1).astype(np.int64)


one_peer_exp = Family(_one_peer_exp, "periodic", "1", "exact in log₂ n if n = 2^t", "Ying et al., NeurIPS 2021")
random_match = Family(_random_match, "random", "1", "about √(1/2)", "Boyd et al., IEEE Trans. IT 2006")
ceca = Family(_ceca, "periodic", "1", "exact in ⌈log₂ n⌉", "DSGD-CECA, ICML 2023")
el_oracle = Family(_el_oracle, "random", "degree", "about 1/√(degree + 1)", EPIDEMIC, EpidemicOptions)
el_local = Family(_el_local, "random", "degree out", "mean drifts", EPIDEMIC, LocalEpidemicOptions)
