"""Random static graphs: Erdos-Renyi, half-random, geometric, regular, small world; Metropolis weights on each."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from gossamer.errors import ConfigError
from gossamer.topology.base import Integers
from gossamer.topology.classic import NEDIC
from gossamer.topology.family import MAX_ATTEMPTS, Family, Schedule, TopologyOptions, connected, static
from gossamer.topology.weights import averaging

MAX_HALF_RANDOM = 5_000  # peers of a graph with about n^2 / 4 edges


class ErdosRenyiOptions(TopologyOptions):
    """Options of an Erdos-Renyi graph.

    Attributes:
        probability: probability of each edge; None: 2 ln n / n, twice the threshold of connectivity.
    """

    probability: float | None = Field(default=None, gt=0, le=1)


class GeometricOptions(TopologyOptions):
    """Options of a random geometric graph.

    Attributes:
        radius: maximum distance of linked points of the unit square; None: sqrt(2 ln n / n).
    """

    radius: float | None = Field(default=None, gt=0, le=1.5)


class DegreeOptions(TopologyOptions):
    """Options of a random regular graph.

    Attributes:
        degree: number of neighbours of each peer; n * degree must be even.
    """

    degree: int = Field(default=4, ge=2)


class SmallWorldOptions(TopologyOptions):
    """Options of a small world.

    Attributes:
        degree: number of neighbours of each peer in the ring that is rewired, even.
        probability: probability that an edge is rewired.
    """

    degree: int = Field(default=4, ge=2)
    probability: float = Field(default=0.1, ge=0, le=1)


def bernoulli_edges(n: int, probability: float, source: np.random.Generator) -> tuple[Integers, Integers]:
    """Return each pair i < j with the same probability, independently.

    A binomial number of distinct pairs is drawn, so that the cost is proportional to the edges.
    """
    num_pairs = n * (n - 1) // 2
    wanted = int(source.binomial(num_pairs, probability))
    if 2 * wanted > num_pairs:
        chosen = source.permutation(num_pairs)[:wanted]
    else:
        chosen = np.empty(0, dtype=np.int64)
        while len(chosen) < wanted:
            more = source.integers(num_pairs, size=wanted - len(chosen) + 16)
            seen = np.concatenate([chosen, more])
            _, places = np.unique(seen, return_index=True)
            chosen = seen[np.sort(places)][:wanted]
    return pair_of_number(np.sort(chosen).astype(np.int64))


def pair_of_number(number: Integers) -> tuple[Integers, Integers]:
    """Return the pair i < j at each position of (0, 1), (0, 2), (1, 2), (0, 3), ...: number = j (j - 1) / 2 + i."""
    second = ((1.0 + np.sqrt(8.0 * number + 1.0)) / 2.0).astype(np.int64)
    second -= second * (second - 1) // 2 > number  # square roots may round up
    second += (second + 1) * second // 2 <= number
    return number - second * (second - 1) // 2, second


def check_regular(n: int, degree: int) -> None:
    """Refuse a degree of which there is no regular graph on n peers.

    Raises:
        ConfigError: degree >= n, or n * degree is odd.
    """
    if degree >= n or n * degree % 2:
        raise ConfigError(
            f"no graph has n = {n} peers of degree {degree} each: take a degree below n, with n * degree even"
        )


def regular_edges(n: int, degree: int, source: np.random.Generator) -> tuple[Integers, Integers]:
    """Return a random regular graph: stubs are paired at random; loops and multiple edges are paired again.

    Source: Steger and Wormald, "Generating random regular graphs quickly", 1999 (in rounds over all free stubs).

    Raises:
        ConfigError: degree >= n, an odd number of stubs, or no success after many restarts.
    """
    check_regular(n, degree)
    if 2 * degree > n - 1:  # pairing is quicker for sparse graphs: draw the complement
        missing = _regular(n, n - 1 - degree, source)
        present = np.ones(n * (n - 1) // 2, dtype=bool)
        low, high = np.minimum(*missing), np.maximum(*missing)
        present[high * (high - 1) // 2 + low] = False
        return pair_of_number(np.flatnonzero(present))
    return _regular(n, degree, source)


def _regular(n: int, degree: int, source: np.random.Generator) -> tuple[Integers, Integers]:
    for _ in range(MAX_ATTEMPTS):
        stubs = np.repeat(np.arange(n, dtype=np.int64), degree)
        edges = np.empty(0, dtype=np.int64)
        idle = 0
        while len(stubs) and idle < 20:
            stubs = source.permutation(stubs)
            low, high = np.minimum(stubs[0::2], stubs[1::2]), np.maximum(stubs[0::2], stubs[1::2])
            number = low * n + high
            _, places = np.unique(number, return_index=True)
            good = np.zeros(len(number), dtype=bool)
            good[places] = True
            good &= (low != high) & ~np.isin(number, edges)
            edges = np.concatenate([edges, number[good]])
            stubs = stubs[np.repeat(~good, 2)]
            idle = 0 if good.any() else idle + 1
        if not len(stubs):
            edges = np.sort(edges)
            return edges // n, edges % n
    raise ConfigError(f"no regular graph of n = {n} peers and degree {degree} was found: choose another degree")


def _erdos_renyi(n: int, seed: int, options: ErdosRenyiOptions) -> Schedule:
    """Each pair is linked with the same probability, until the graph is connected; Metropolis weights."""
    probability = min(1.0, 2.0 * math.log(n) / n) if options.probability is None else options.probability
    return _of_pairs("erdos-renyi", n, seed, probability)


def _half_random(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """Each pair is linked with probability 1/2."""
    if n > MAX_HALF_RANDOM:
        raise ConfigError(
            f"'half-random' with n = {n} peers has about {n * (n - 1) // 4} edges, above the limit of"
            f" n = {MAX_HALF_RANDOM}: take 'erdos-renyi' with a lower probability"
        )
    return _of_pairs("half-random", n, seed, 0.5)


def _of_pairs(name: str, n: int, seed: int, probability: float) -> Schedule:
    first, second, resamples = connected(
        name, seed, lambda source: bernoulli_edges(n, probability, source), n, "raise the probability"
    )
    return static(averaging(n, first, second), resamples=resamples, facts={"probability": probability})


def _geometric(n: int, seed: int, options: GeometricOptions) -> Schedule:
    """Random points of the unit square, linked where they are near each other; Metropolis weights."""
    radius = min(1.5, math.sqrt(2.0 * math.log(n) / n)) if options.radius is None else options.radius

    def draw(source: np.random.Generator) -> tuple[Integers, Integers]:
        from scipy.spatial import cKDTree

        pairs = cKDTree(source.random((n, 2))).query_pairs(radius, output_type="ndarray").astype(np.int64)
        return pairs[:, 0], pairs[:, 1]

    first, second, resamples = connected("geometric", seed, draw, n, "raise the radius")
    return static(averaging(n, first, second), resamples=resamples, facts={"radius": radius})


def _random_regular(n: int, seed: int, options: DegreeOptions) -> Schedule:
    """A random graph in which all peers have the same number of neighbours; equal weights."""
    first, second, resamples = connected(
        "random-regular", seed, lambda source: regular_edges(n, options.degree, source), n, "raise the degree"
    )
    return static(averaging(n, first, second), resamples=resamples)


def _small_world(n: int, seed: int, options: SmallWorldOptions) -> Schedule:
    """A ring of near neighbours, some of whose edges are rewired at random; Metropolis weights."""
    if options.degree % 2 or options.degree >= n:
        raise ConfigError(f"small-world.degree = {options.degree} with n = {n}: take an even degree below n")

    def draw(source: np.random.Generator) -> tuple[Integers, Integers]:
        import networkx

        graph = networkx.watts_strogatz_graph(n, options.degree, options.probability, seed=source)
        pairs = np.array(sorted(tuple(sorted(edge)) for edge in graph.edges), dtype=np.int64)
        return pairs[:, 0], pairs[:, 1]

    first, second, resamples = connected("small-world", seed, draw, n, "raise the degree or lower the probability")
    return static(averaging(n, first, second), resamples=resamples)


erdos_renyi = Family(_erdos_renyi, "static", "Θ(ln n)", "Θ(1) below 1", NEDIC, ErdosRenyiOptions)
half_random = Family(_half_random, "static", "about n/2", "Θ(1) below 1", NEDIC)
geometric = Family(_geometric, "static", "Θ(ln n)", "1 - Θ(ln n / n)", NEDIC, GeometricOptions)
random_regular = Family(_random_regular, "static", "degree", "Θ(1) below 1", "Friedman, 2008", DegreeOptions, minimum=3)
small_world = Family(
    _small_world, "static", "about degree", "depends", "Watts and Strogatz, Nature 1998", SmallWorldOptions, minimum=3
)
