"""EquiTopo (Song et al., arXiv 2210.07881, NeurIPS 2022): graphs whose consensus rate does not depend on n.

The directed basis graph u has 1/n on the diagonal and (n - 1)/n on the edge i -> (i + u) mod n, so that the mean over
all u in 1..n-1 is exactly J. EquiStatic mixes by the mean of M of them, drawn with replacement; EquiDyn by one of them
a round, the same for all peers. A draw whose u have a common divisor with n is disconnected and drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from pydantic import Field, model_validator

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Integers, Mixing
from gossamer.topology.family import MAX_ATTEMPTS, Family, Schedule, TopologyOptions, static
from gossamer.topology.mixings import Matching, Shift
from gossamer.topology.spectra import norm

SOURCE = "EquiTopo, arXiv 2210.07881"


class BasisOptions(TopologyOptions):
    """Number of basis graphs.

    Attributes:
        M: number of basis graphs, drawn with replacement; None, without rho: floor(5 ln n), as in the paper.
        rho: rate of the mean of the basis graphs with probability 1 - p; sets M by theorem 1.
        p: probability of failure.
    """

    M: int | None = Field(default=None, ge=1)
    rho: float | None = Field(default=None, gt=0, lt=1)
    p: float = Field(default=0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> BasisOptions:
        if self.M is not None and self.rho is not None:
            raise ValueError(f"give either M = {self.M} or rho = {self.rho}: each sets the number of basis graphs")
        return self

    def num_graphs(self, n: int) -> int:
        """Return the number of basis graphs for n peers."""
        if self.M is not None:
            return self.M
        if self.rho is not None:
            return theorem_num_graphs(n, self.rho, self.p)
        return max(1, math.floor(5.0 * math.log(n)))


class CompleteDynOptions(TopologyOptions):
    """Options of EquiDyn over all n - 1 basis graphs.

    Attributes:
        eta: share of the drawn graph in the mixing.
    """

    eta: float = Field(default=0.5, gt=0, lt=1)


class EquiDynOptions(CompleteDynOptions, BasisOptions):
    """Options of EquiDyn, see the two."""


def theorem_num_graphs(n: int, rho: float, p: float) -> int:
    """Return the least M with ``M >= 8 ln(2 n / p) / (3 rho^2)``: then ``P(||W - J|| <= rho) >= 1 - p`` (theorem 1)."""
    return math.ceil(8.0 * math.log(2.0 * n / p) / (3.0 * rho**2))


def theorem_rate(n: int, num_graphs: int, p: float) -> float | None:
    """Return the rho that theorem 1 guarantees with probability 1 - p for M graphs; None where it is 1 or more."""
    rho = math.sqrt(8.0 * math.log(2.0 * n / p) / (3.0 * num_graphs))
    return rho if rho < 1.0 else None


def draw_basis(n: int, num_graphs: int, seed: int) -> tuple[Integers, int]:
    """Draw M shifts from 1..n-1 with replacement, again and again until they connect all peers.

    Returns:
        int64 [M], and the number of disconnected draws: gcd(u_1, ..., u_M, n) > 1.

    Raises:
        ConfigError: `MAX_ATTEMPTS` draws were disconnected.
    """
    for attempt in range(MAX_ATTEMPTS):
        shifts = rng.generator(seed, "topology-basis", extra=attempt).integers(1, n, size=num_graphs)
        if math.gcd(n, *shifts.tolist()) == 1:
            return shifts.astype(np.int64), attempt
    raise ConfigError(
        f"{MAX_ATTEMPTS} draws of M = {num_graphs} basis graphs of n = {n} peers were disconnected: raise M"
    )


def mean_of_basis(n: int, shifts: Integers, undirected: bool) -> Shift:
    """Return ``(1/M) sum A^(u)``, or with `undirected` ``(1/2M) sum (A^(u) + A^(u)^T)``."""
    every = np.concatenate([shifts, n - shifts]) if undirected else shifts
    offsets, counts = np.unique(every, return_counts=True)
    weights = counts / len(every) * ((n - 1) / n)
    return Shift(n, tuple(offsets.tolist()), tuple(weights.tolist()))


def _equi_static(undirected: bool) -> Callable[[int, int, BasisOptions], Schedule]:
    def make(n: int, seed: int, options: BasisOptions) -> Schedule:
        num_graphs = options.num_graphs(n)
        shifts, resamples = draw_basis(n, num_graphs, seed)
        bound = options.rho if options.rho is not None else theorem_rate(n, num_graphs, options.p)
        facts = {"M": num_graphs, "p": options.p}
        return static(mean_of_basis(n, shifts, undirected), bound=bound, resamples=resamples, facts=facts)

    return make


def _equi_dyn(undirected: bool, complete: bool) -> Callable[[int, int, EquiDynOptions | CompleteDynOptions], Schedule]:
    def make(n: int, seed: int, options: EquiDynOptions | CompleteDynOptions) -> Schedule:
        eta = options.eta
        if isinstance(options, EquiDynOptions):
            num_graphs = options.num_graphs(n)
            shifts, resamples = draw_basis(n, num_graphs, seed)
            rho = norm([mean_of_basis(n, shifts, undirected)])
        else:
            num_graphs, resamples, rho = n - 1, 0, 0.0
            shifts = np.arange(1, n, dtype=np.int64)
        draw, rate, slope = (_undirected, ou_rate, 4 / 3) if undirected else (_directed, od_rate, 2.0)
        return Schedule(
            draw=lambda round: draw(n, shifts, eta, seed, round),
            cycle=None,
            rate=lambda share: rate(n, shifts, eta * share),
            bound=math.sqrt(1.0 - slope * eta * (1.0 - eta) * (1.0 - rho)),
            resamples=resamples,
            facts={"eta": eta} if complete else {"M": num_graphs, "eta": eta, "rho_of_basis": rho},
        )

    return make


def _directed(n: int, shifts: Integers, eta: float, seed: int, round: int) -> Mixing:
    """OD-EquiDyn: ``(1 - eta) I + eta A^(v)`` with one v a round."""
    v = int(rng.generator(seed, "topology-round", round).choice(shifts))
    return Shift(n, (v,), (eta * (n - 1) / n,))


def _undirected(n: int, shifts: Integers, eta: float, seed: int, round: int) -> Mixing:
    """OU-EquiDyn: as OD, but peers i and i + v are matched in a scan from a random peer on."""
    source = rng.generator(seed, "topology-round", round)
    v, start = int(source.choice(shifts)), int(source.integers(n))
    return Matching(scan_matching(n, v, start), eta * (n - 1) / n)


def scan_sources(n: int, v: int) -> Integers:
    """Return the peers i that a scan 0, 1, ..., n - 1 matches with i + v mod n if both are free; int64, ascending.

    Closed form of the scan. While i + v < n, blocks of v peers are matched in turns: block 0 with 1, block 2 with 3.
    For v <= n/2 the last v peers find their target taken. For v > n/2 only block 0, of w = n - v peers, reaches up that
    way; w..v-1 are left, and i is matched with i - w: in blocks of w peers, 2 with 1, 4 with 3, and so on.
    """
    if 2 * v <= n:
        i = np.arange(n - v, dtype=np.int64)
        return np.asarray(i[i // v % 2 == 0])
    w = n - v
    i = np.arange(v, dtype=np.int64)
    return np.asarray(i[i // w % 2 == 0])


def scan_matching(n: int, v: int, start: int) -> Integers:
    """Return the partner of each peer, int64 [n], after the scan of OU-EquiDyn from `start` on; itself if it has none.

    Args:
        v: 1..n-1, the distance of partners.
        start: 0..n-1, the first peer of the scan.
    """
    source = (scan_sources(n, v) + start) % n
    target = (source + v) % n
    partner = np.arange(n, dtype=np.int64)
    partner[source], partner[target] = target, source
    return partner


def num_pairs(n: int, v: int) -> int:
    """Return the length of `scan_sources`."""
    size, end = (v, n - v) if 2 * v <= n else (n - v, v)
    return end // (2 * size) * size + min(size, end % (2 * size))


def od_rate(n: int, shifts: Integers, eta: float) -> float:
    """Return the root of the largest ``E ||P W x||^2 / ||P x||^2`` of OD-EquiDyn, exactly, for shifts drawn uniformly.

    E[W^T W] is circulant, with eigenvalues ``a^2 + b^2 + 2 a b mean_u cos(2 pi k u / n)``, a = 1 - eta + eta / n,
    b = eta (n - 1) / n. Over all shifts the mean is -1 / (n - 1): ``(1 - eta)^2 + eta^2 (1 - 2 / n)``.
    """
    b = eta * (n - 1) / n
    a = 1.0 - b
    waves = np.fft.fft(np.bincount(shifts, minlength=n) / len(shifts)).real[1:]
    return math.sqrt(max(0.0, a * a + b * b + 2.0 * a * b * float(waves.max())))


def ou_rate(n: int, shifts: Integers, eta: float) -> float:
    """Return the root of the largest ``E ||P W x||^2 / ||P x||^2`` of OU-EquiDyn, exactly, for shifts drawn uniformly.

    W = I - c L with c = eta (n - 1) / n and L the Laplacian of a matching, L^2 = 2 L; so E[W^2] = I - 2 c (1 - c) E[L].
    The start being uniform, each peer is a source with probability q_v = `num_pairs` / n, and E[L] is circulant with
    eigenvalues ``mean_v 2 q_v (1 - cos(2 pi k v / n))``.
    """
    drawn, counts = np.unique(shifts, return_counts=True)
    matched = np.zeros(n)
    matched[drawn] = counts / len(shifts) * np.array([num_pairs(n, int(v)) / n for v in drawn])
    waves: Floats = np.fft.fft(matched).real
    slowest = float((2.0 * (waves[0] - waves[1:])).min())
    c = eta * (n - 1) / n
    return math.sqrt(max(0.0, 1.0 - 2.0 * c * (1.0 - c) * slowest))


STATIC = "M random shifts u, the same in all rounds and for all peers: peer i hears i - u"
DYNAMIC = "Each round draws one of M shifts u, which were drawn at random: peer i"
COMPLETE = "Each round draws one of all n - 1 shifts u: peer i"
HEARS, MEETS = "hears i - u.", "averages with i + u or i - u, where both are free."

d_equistatic = Family(
    _equi_static(False), "static", "≤ M", "Θ(1), independent of n", SOURCE, BasisOptions, about=f"{STATIC}."
)
u_equistatic = Family(
    _equi_static(True),
    "static",
    "≤ 2 M",
    "Θ(1), independent of n",
    SOURCE,
    BasisOptions,
    about=f"{STATIC} and i + u.",
)
od_equidyn = Family(
    _equi_dyn(False, False),
    "random",
    "1",
    "√((1 + rho)/2) if eta = 1/2",
    SOURCE,
    EquiDynOptions,
    about=f"{DYNAMIC} {HEARS}",
)
ou_equidyn = Family(
    _equi_dyn(True, False),
    "random",
    "1",
    "√((2 + rho)/3) if eta = 1/2",
    SOURCE,
    EquiDynOptions,
    about=f"{DYNAMIC} {MEETS}",
)
od_equidyn_complete = Family(
    _equi_dyn(False, True),
    "random",
    "1",
    "√(1/2) if eta = 1/2",
    SOURCE,
    CompleteDynOptions,
    about=f"{COMPLETE} {HEARS}",
)
ou_equidyn_complete = Family(
    _equi_dyn(True, True),
    "random",
    "1",
    "√(2/3) if eta = 1/2",
    SOURCE,
    CompleteDynOptions,
    about=f"{COMPLETE} {MEETS}",
)
