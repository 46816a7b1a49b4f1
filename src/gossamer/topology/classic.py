"""Deterministic static graphs: ring, grid, torus, hypercube, star, complete, static exponential."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats
from gossamer.topology.family import Family, Schedule, TopologyOptions, static
from gossamer.topology.mixings import BlockAverage, Shift
from gossamer.topology.sparse import Sparse
from gossamer.topology.weights import averaging, symmetric

NEDIC = "Nedic, Olshevsky and Rabbat, Proc. IEEE 2018"


class GridOptions(TopologyOptions):
    """Options of a grid or torus.

    Attributes:
        rows: number of rows, a divisor of n; None: that of the most nearly square shape.
    """

    rows: int | None = Field(default=None, ge=1)


def ceil_log2(n: int) -> int:
    """Return the smallest t with 2**t >= n, by integer arithmetic."""
    return (n - 1).bit_length()


def _ring(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """A cycle: each peer mixes with its two neighbours, weights 1/3."""
    return static(Shift(n, (1, n - 1), (1 / 3, 1 / 3)))


def _static_exp(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """Peer i hears i - 1, i - 2, i - 4, ..., with equal weights.

    For even n the rate is (t - 1) / (t + 1), t = ceil(log2 n), else less.
    Source: Ying et al., "Exponential graph is provably efficient", NeurIPS 2021, proposition 1.
    """
    num_offsets = ceil_log2(n)
    weight = 1.0 / (num_offsets + 1)
    mixing = Shift(n, tuple(1 << t for t in range(num_offsets)), (weight,) * num_offsets)
    return static(mixing, bound=(num_offsets - 1) / (num_offsets + 1))


def _complete(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """Everybody with everybody: each round ends in the exact mean."""
    return static(BlockAverage(1, n, 1), is_exact=True, rate=lambda share: 1.0 - share, bound=0.0)


def _star(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """One peer in the middle of all others; Metropolis weights 1/n: eigenvalues 1, 1 - 1/n (n - 2 times) and 0."""
    leaves = np.arange(1, n, dtype=np.int64)
    mixing = averaging(n, np.zeros_like(leaves), leaves)
    return static(mixing, rate=lambda share: 1.0 - share / n if n > 2 else 1.0 - share)


def _hypercube(n: int, seed: int, options: TopologyOptions) -> Schedule:
    """Peers whose numbers differ in one bit mix, with equal weights.

    These are 1 / (b + 1) for b = log2 n bits: eigenvalues 1 - 2 j / (b + 1), j = 0..b.
    """
    num_bits = ceil_log2(n)
    if n != 1 << num_bits:
        raise ConfigError(
            f"'hypercube' needs a power of two, not n = {n}: take {1 << (num_bits - 1)} or {1 << num_bits}"
        )
    receiver = np.repeat(np.arange(n, dtype=np.int64), num_bits)
    sender = receiver ^ np.tile(1 << np.arange(num_bits, dtype=np.int64), n)
    mixing = Sparse.of_edges(n, receiver, sender, np.full(len(receiver), 1.0 / (num_bits + 1)))
    eigenvalues = 1.0 - 2.0 * np.arange(1, num_bits + 1) / (num_bits + 1)
    rate = (num_bits - 1) / (num_bits + 1)
    return static(mixing, rate=lambda share: _largest(eigenvalues, share), bound=rate)


def _grid(n: int, seed: int, options: GridOptions) -> Schedule:
    """A rectangle: each peer mixes with those above, below, left and right of it; Metropolis weights."""
    rows, columns = _shape("grid", n, options.rows, min_rows=2)
    number = np.arange(n, dtype=np.int64).reshape(rows, columns)
    first = np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()])
    second = np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])
    return static(averaging(n, first, second), facts={"rows": rows, "columns": columns})


def _torus(n: int, seed: int, options: GridOptions) -> Schedule:
    """A rectangle whose opposite borders are joined: each peer has four neighbours, weights 1/5.

    Eigenvalues (1 + 2 cos(2 pi p / a) + 2 cos(2 pi q / b)) / 5.
    """
    rows, columns = _shape("torus", n, options.rows, min_rows=3)
    number = np.arange(n, dtype=np.int64).reshape(rows, columns)
    first = np.tile(number.ravel(), 2)
    second = np.concatenate([np.roll(number, -1, axis).ravel() for axis in (0, 1)])
    mixing = symmetric(n, first, second, np.full(len(first), 0.2))

    def rate(share: float) -> float:
        waves = [2.0 * np.cos(2.0 * np.pi * np.arange(size) / size) for size in (rows, columns)]
        return _largest(((1.0 + waves[0][:, None] + waves[1][None, :]) / 5.0).ravel()[1:], share)

    return static(mixing, rate=rate, facts={"rows": rows, "columns": columns})


def _largest(eigenvalues: Floats, share: float) -> float:
    """Return the largest ``|1 - share + share l|`` over the eigenvalues l."""
    return float(np.abs(1.0 - share + share * eigenvalues).max())


def _shape(name: str, n: int, rows: int | None, min_rows: int) -> tuple[int, int]:
    """Return rows <= columns with rows * columns = n, as nearly square as n allows.

    Raises:
        ConfigError: no such shape has `min_rows` rows or more.
    """
    if rows is None:
        rows = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
        if rows < min_rows:
            fitting = [m for m in range(max(n - 20, min_rows * min_rows), n + 20) if _has_shape(m, min_rows)]
            nearest_n = min(fitting, key=lambda m: abs(m - n))
            raise ConfigError(
                f"'{name}' cannot arrange n = {n} peers in a rectangle of {min_rows} or more rows: take n = {nearest_n}"
            )
    if n % rows or min(rows, n // rows) < min_rows:
        raise ConfigError(
            f"{name}.rows = {rows} does not arrange n = {n} peers in {min_rows} or more rows and columns:"
            " choose another divisor of n"
        )
    return rows, n // rows


def _has_shape(n: int, min_rows: int) -> bool:
    return any(n % rows == 0 for rows in range(min_rows, math.isqrt(n) + 1))


ring = Family(_ring, "static", "2", "1 - Θ(1/n²)", NEDIC, minimum=3)
grid = Family(_grid, "static", "4", "1 - Θ(1/(n ln n))", NEDIC, GridOptions, minimum=4)
torus = Family(_torus, "static", "4", "1 - Θ(1/n)", NEDIC, GridOptions, minimum=9)
hypercube = Family(_hypercube, "static", "log₂ n", "1 - 2/(1 + log₂ n)", NEDIC)
star = Family(_star, "static", "n - 1", "1 - 1/n", NEDIC)
complete = Family(_complete, "static", "n - 1", "0", "the exact mean")
static_exp = Family(_static_exp, "static", "⌈log₂ n⌉", "1 - 2/(1 + ⌈log₂ n⌉)", "Ying et al., NeurIPS 2021")
