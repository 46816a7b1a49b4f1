"""Measurement of the convergence of random numbers to their mean under a topology."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.topology.base import Floats
from gossamer.topology.topology import Topology

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Measurement:
    """The convergence of one random number for each peer.

    Attributes:
        rounds: number of rounds until the distance is at most the tolerance; None: more than allowed.
        rate: mean factor for each round, ``(last distance / first)^(1 / rounds)``.
        mean_drift: distance by which the mean has moved, in units of the root mean square of the first distance; 0 but
            for rounding, unless mixings are row-stochastic only.
        distances: float64, ``||x_r - mean(x_r)|| / ||x_0 - mean(x_0)||`` for r = 0, 1, ...
    """

    rounds: int | None
    rate: float
    mean_drift: float
    distances: Floats


def measure(
    topology: Topology, num_rounds: int = 1000, start_seed: int = 0, tolerance: float = TOLERANCE
) -> Measurement:
    """Mix a normal random vector of mean 0, in float64, until all peers agree.

    Args:
        topology: topology to measure.
        num_rounds: maximum number of rounds.
        start_seed: seed of the vector.
        tolerance: relative distance at which peers agree.

    Raises:
        ConfigError: num_rounds is below 1.
    """
    if num_rounds < 1:
        raise ConfigError(f"rounds = {num_rounds} is below 1: give a maximum number of rounds")
    start = rng.generator(start_seed, "topology-start").standard_normal((topology.n, 1))
    start -= start.mean()
    state = topology.mixing(0).start(start)
    first = float(np.linalg.norm(start))
    distances, values, rounds = [1.0], start, None
    for round in range(num_rounds):
        mixing = topology.mixing(round)
        state = mixing.apply(state)
        values = mixing.read(state)
        distances.append(float(np.linalg.norm(values - values.mean())) / first)
        if distances[-1] <= tolerance:
            rounds = round + 1
            break
    drift = abs(float(values.mean())) * np.sqrt(topology.n) / first
    rate = float(distances[-1] ** (1.0 / (len(distances) - 1)))
    return Measurement(rounds, rate, float(drift), np.array(distances))
