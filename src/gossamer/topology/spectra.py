"""Rates at which mixings contract disagreement: Fourier transforms of circulants, eigenvalues and singular values.

The rate is ``||P W P||_2`` with ``P = I - J`` and ``J = 11^T / n``. For a doubly stochastic W it equals
``||W - J||_2``, the consensus rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Mixing
from gossamer.topology.mixings import BlockAverage, Matching, Shift
from gossamer.topology.sparse import csr

MAX_EXACT = 1_500  # rows of a matrix for dense decompositions
MAX_SAMPLED = 64  # the same where there is one for each of many samples
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


def tracking_limit(eigenvalues: Spectrum) -> float:
    """Return the step, times the curvature of the loss, below which gradient tracking by a fixed W is stable.

    On losses of curvature h, with a = step * h, an eigenvalue l of W has the mode (`DSGT`, one local step a round)::

        x <- l (x - step y);  y <- l y + h (new x - x)      with the roots z of  z^2 - l (2 - a) z + l^2 - l a

    It is stable for a < 1/rho - rho where l = -rho is negative and real, and for a < 2 at least where l is positive:
    2 is the limit of gradient descent, too, which l = 1 has. Of complex l it is found by bisection.
    """
    found, real = 2.0, eigenvalues.real[np.abs(eigenvalues.imag) < 1e-12]
    least = float(-real.min(initial=0.0))
    if least > 0.0:
        found = min(found, max(0.0, 1.0 / least - least))
    others = eigenvalues[eigenvalues.imag > 1e-12]

    def is_stable(a: float) -> bool:
        """Say whether no root is outside of the unit circle."""
        half = others * (2.0 - a) / 2.0
        root = np.sqrt(half**2 - others**2 + others * a)
        return bool((np.maximum(np.abs(half + root), np.abs(half - root)) <= 1.0 + 1e-9).all())

    grid = np.linspace(0.0, found, 101)
    unstable = next((index for index in range(1, 101) if not is_stable(grid[index])), None)
    if unstable is None:
        return found
    low, high = grid[unstable - 1], grid[unstable]
    for _ in range(40):
        low, high = (middle, high) if is_stable(middle := (low + high) / 2) else (low, middle)
    return float(low)


def min_real_part(mixing: Mixing) -> float:
    """Return the smallest real part of an eigenvalue of W.

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
    back = [each.transposed() for each in reversed(mixings)]
    symmetric = len(mixings) == 1 and mixings[0].is_symmetric

    def through(x: Floats, steps: Sequence[Mixing]) -> Floats:
        """Mix the deviations of x [n] from its mean by all steps."""
        x = _centred(x)
        for each in steps:
            x = each.apply(x)
        return _centred(x)

    def times(x: Floats) -> Floats:
        """Apply the mixing of deviations, followed by its transpose if it is not symmetric."""
        x = np.asarray(x, dtype=np.float64).reshape(n)
        return through(x, mixings) if symmetric else through(through(x, mixings), back)

    value = float(_largest(n, times)[0])
    return abs(value) if symmetric else float(np.sqrt(max(value, 0.0)))


def mean_square(mixings: Sequence[Mixing]) -> tuple[float, float]:
    """Estimate the largest eigenvalue of ``E[P W^T P W P]``, of which `mixings` are independent samples W.

    That of a mean over samples is too large, since its direction suits these samples. So the direction is taken from
    one half, the mean square ``||P W x||^2 / ||x||^2`` from the other, and the other way round.

    Returns:
        the estimate, and its standard error; the direction's own error counts to second order only, and lowers it.

    Raises:
        ConfigError: the iterations do not converge.
    """
    halves, squares = [_stacked(mixings[part::2]) for part in (0, 1)], list[Floats]()
    n = mixings[0].n
    for half, other in (halves, halves[::-1]):
        squares.append(np.square(_centred((other @ _worst_direction(half, n)).reshape(-1, n).T)).sum(0))
    values = np.concatenate(squares)
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))


def _stacked(mixings: Sequence[Mixing]) -> Any:
    """Return the matrices of mixings below one another, a scipy CSR array [len(mixings) * n, n]."""
    from scipy.sparse import vstack

    return vstack([csr(*each.edges()[:3], each.self_weights()) for each in mixings], format="csr")


def _worst_direction(stacked: Any, n: int) -> Floats:
    """Return the leading eigenvector, of norm 1 and mean 0, of the mean of ``P W^T P W P`` over matrices [k n, n]."""

    def times(x: Floats) -> Floats:
        """Add up over all matrices; x is [n] or [n, columns]."""
        x = _centred(np.asarray(x, dtype=np.float64))
        mixed = (stacked @ x).reshape(-1, n, *x.shape[1:])
        return _centred(stacked.T @ (mixed - mixed.mean(1, keepdims=True)).reshape(-1, *x.shape[1:]))

    if n <= MAX_SAMPLED:
        return np.asarray(np.linalg.eigh(times(np.eye(n)))[1][:, -1])
    return _centred(_largest(n, lambda x: times(x.reshape(n)), vectors=True, tol=1e-6)[1][:, 0])


def _centred(x: Floats) -> Floats:
    """Return the deviations of x [n, ...] from its mean."""
    return np.asarray(x - x.mean(0))


def _largest(n: int, times: Callable[[Floats], Floats], vectors: bool = False, tol: float = 1e-10) -> Any:
    """Return the eigenvalue of largest magnitude of a symmetric operator on float64 [n], as `eigsh` does."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        return eigsh(operator, k=1, v0=_start(n), tol=tol, maxiter=20_000, return_eigenvectors=vectors)
    except ArpackNoConvergence as error:
        raise ConfigError(f"the consensus rate of n = {n} peers did not converge: use fewer") from error


def _start(n: int) -> Floats:
    """Return a fixed vector without symmetries, so that iterations give the same digits each time."""
    return np.asarray(np.cos(np.arange(n) ** 1.5 + 1.0))
