"""Weights of undirected graphs: Metropolis-Hastings, or the fastest symmetric ones."""

from __future__ import annotations

import numpy as np

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Integers
from gossamer.topology.sparse import Sparse

MAX_OPTIMISED = 300  # peers of the fastest weights


def metropolis(n: int, first: Integers, second: Integers) -> Floats:
    """Return ``1 / (1 + max(degree_i, degree_j))`` for each edge (Xiao, Boyd and Kim, JPDC 2007).

    Args:
        first, second: ends of each undirected edge, int64 [e], each pair once.
    """
    degree = np.bincount(first, minlength=n) + np.bincount(second, minlength=n)
    return np.asarray(1.0 / (1.0 + np.maximum(degree[first], degree[second])))


def symmetric(n: int, first: Integers, second: Integers, weight: Floats) -> Sparse:
    """Return the mixing of undirected edges with given weights."""
    return Sparse.of_edges(
        n, np.concatenate([first, second]), np.concatenate([second, first]), np.concatenate([weight, weight])
    )


def averaging(n: int, first: Integers, second: Integers) -> Sparse:
    """Return the mixing of an undirected graph with Metropolis-Hastings weights."""
    return symmetric(n, first, second, metropolis(n, first, second))


def is_connected(n: int, first: Integers, second: Integers, directed: bool = False) -> bool:
    """Return whether every peer reaches every other, if `directed` along edges first -> second."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    count, _ = connected_components(graph, directed=directed, connection="strong")
    return int(count) == 1


def fastest(n: int, first: Integers, second: Integers) -> Floats:
    """Return the symmetric edge weights of least ``||W - J||_2`` (Xiao and Boyd, "Fast linear iterations", 2004).

    The norm is convex in the weights. It is smoothed as ``log(sum(exp(b l) + exp(-b l))) / b`` over the eigenvalues l
    of W - J, at most ``log(2 n) / b`` above it, and minimised with b growing in steps. Weights may come out negative.

    Args:
        first, second: ends of each undirected edge, int64 [e], each pair once.

    Returns:
        float64 [e].

    Raises:
        ConfigError: n exceeds `MAX_OPTIMISED`.
    """
    from scipy.optimize import minimize

    if n > MAX_OPTIMISED:
        raise ConfigError(
            f"weights = 'fastest' for n = {n} peers exceeds the limit of {MAX_OPTIMISED} peers: use metropolis"
        )

    def smoothed(weight: Floats, sharpness: float) -> tuple[float, Floats]:
        """Return the smoothed norm and its gradient."""
        matrix = np.full((n, n), -1.0 / n)
        matrix[first, second] += weight
        matrix[second, first] += weight
        np.fill_diagonal(matrix, -1.0 / n + 1.0 - np.bincount(np.concatenate([first, second]), np.tile(weight, 2), n))
        values, vectors = np.linalg.eigh(matrix)
        largest = np.abs(values).max()
        up, down = np.exp(sharpness * (values - largest)), np.exp(sharpness * (-values - largest))
        total = (up + down).sum()
        slopes = -((vectors[first] - vectors[second]) ** 2) @ ((up - down) / total)
        return float(largest + np.log(total) / sharpness), slopes

    weight = metropolis(n, first, second)
    for sharpness in 10.0 ** np.arange(1, 6):
        found = minimize(smoothed, weight, args=(sharpness,), jac=True, method="L-BFGS-B", options={"maxiter": 500})
        weight = found.x
    return np.asarray(weight, dtype=np.float64)
