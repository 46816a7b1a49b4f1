"""Rates at which mixings contract disagreement: Fourier transforms of circulants, eigenvalues and singular values.

The rate is ``||P W P||_2`` with ``P = I - J`` and ``J = 11^T / n``. For a doubly stochastic W it equals
``||W - J||_2``, the consensus rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Mixing
from gossamer.topology.mixings import BlockAverage, Matching, Shift

MAX_EXACT = 1_500  # rows of a matrix for dense decompositions
Spectrum = NDArray[np.complex128]


def circulant_spectrum(shift: Shift) -> Spectrum:
    """Return the eigenvalues of a circulant, complex128 [n], that of the constant vector first, in O(n log n)."""
    return np.asarray(np.fft.fft(shift.first_column()), dtype=np.complex128)


def spectrum(mixing: Mixing) -> Spectrum:
    """Return all eigenvalues of W, complex128 [n].

    Raises:
        ConfigError: W is not circulant, and too large for a dense decomposition.
    """
    if isinstance(mixing, Shift):
        return circulant_spectrum(mixing)
    if mixing.n * mixing.rows_per_site > MAX_EXACT:
        raise ConfigError(f"n = {mixing.n} peers exceed the limit of {MAX_EXACT} for all eigenvalues: use fewer")
    matrix = mixing.dense()
    values = np.linalg.eigvalsh(matrix) if mixing.is_symmetric else np.linalg.eigvals(matrix)
    return values.astype(np.complex128)


def min_real_part(mixing: Mixing) -> float:
    """Return the smallest real part of an eigenvalue of W: if below 0, gradient tracking may need ``lazy``.

    Raises:
        ConfigError: it cannot be computed for a mixing of this size.
    """
    if isinstance(mixing, Matching) and mixing.max_degree:
        return 1.0 - 2.0 * mixing.weight
    if isinstance(mixing, BlockAverage):
        return 1.0 - mixing.weight
    if isinstance(mixing, Shift) or mixing.n * mixing.rows_per_site <= MAX_EXACT:
        return float(spectrum(mixing).real.min())
    if not mixing.is_symmetric or mixing.kind != "sparse":  # iterations may miss it
        raise ConfigError(f"n = {mixing.n} peers are too many for the spectrum of a {mixing.kind} mixing: use fewer")
    return _least_by_iteration(mixing)


def _least_by_iteration(mixing: Mixing) -> float:
    """Return the smallest eigenvalue of a symmetric W."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((mixing.n, mixing.n), matvec=lambda x: mixing.apply(x.reshape(-1)), dtype=np.float64)
    try:
        values = eigsh(operator, k=1, which="SA", v0=_start(mixing.n), tol=1e-10, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise ConfigError(f"the spectrum of n = {mixing.n} peers did not converge: use fewer") from error
    return float(values[0])


def norm(mixings: Sequence[Mixing]) -> float:
    """Return ``||P W_T ... W_1 P||_2`` of successive mixings, W_1 first.

    Circulants by one Fourier transform each; up to `MAX_EXACT` peers by a dense decomposition; else by Lanczos
    iterations, to a relative 1e-9.

    Raises:
        ConfigError: the iterations do not converge.
    """
    if all(isinstance(each, Shift) for each in mixings):
        product = np.prod([circulant_spectrum(each) for each in mixings if isinstance(each, Shift)], axis=0)
        return float(np.abs(product[1:]).max())
    n = mixings[0].n
    if n <= MAX_EXACT:
        product = np.eye(n) - 1.0 / n
        for each in mixings:
            product = each.apply(product)
        product -= product.mean(0)
        symmetric = len(mixings) == 1 and mixings[0].is_symmetric
        return float(np.abs(np.linalg.eigvalsh(product)).max() if symmetric else np.linalg.norm(product, 2))
    return _norm_by_iteration(n, mixings)


def _norm_by_iteration(n: int, mixings: Sequence[Mixing]) -> float:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    back = [each.transposed() for each in reversed(mixings)]
    symmetric = len(mixings) == 1 and mixings[0].is_symmetric

    def through(x: Floats, steps: Sequence[Mixing]) -> Floats:
        """Mix the deviations of x [n] from its mean by all steps."""
        x = x - x.mean()
        for each in steps:
            x = each.apply(x)
        return np.asarray(x - x.mean())

    def times(x: Floats) -> Floats:
        """Apply the mixing of deviations, followed by its transpose if it is not symmetric."""
        x = np.asarray(x, dtype=np.float64).reshape(n)
        return through(x, mixings) if symmetric else through(through(x, mixings), back)

    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        value = eigsh(operator, k=1, which="LM", v0=_start(n), tol=1e-10, maxiter=20_000, return_eigenvectors=False)[0]
    except ArpackNoConvergence as error:
        raise ConfigError(f"the consensus rate of n = {n} peers did not converge: use fewer") from error
    return float(abs(value)) if symmetric else float(np.sqrt(max(value, 0.0)))


def _start(n: int) -> Floats:
    """Return a fixed vector without symmetries, so that iterations give the same digits each time."""
    return np.asarray(np.cos(np.arange(n) ** 1.5 + 1.0))
