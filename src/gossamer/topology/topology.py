"""A topology: peers, and the mixing of each round, from a name, n, a seed and parameters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from gossamer import rng
from gossamer.errors import ConfigError, nearest
from gossamer.options import Options, parse_options
from gossamer.registry import names, resolve
from gossamer.storage.strict_yaml import read_yaml
from gossamer.topology import spectra
from gossamer.topology.base import Mixing
from gossamer.topology.family import Family, Schedule, TopologyOptions

NUM_ESTIMATION_ROUNDS = 200
MAX_CACHED = 100_000  # peers of a topology that caches the mixings of several rounds
NUM_CACHED = 64
MAX_PEERS = 100_000_000
MIN_SAMPLES, MAX_SAMPLES = 16, 400  # rounds from which a rate is estimated
MAX_SAMPLED_EDGES = 500_000  # of all of them, unless that are too few
YAML = (".yaml", ".yml")
SUFFIXES = (*YAML, ".graphml", ".xml", ".txt", ".csv", ".tsv", ".edgelist", ".edges")


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph, or a sequence of graphs, on n peers, determined by its arguments.

    Attributes:
        name, n, seed, options: arguments of `build`.
        kind: "static", "periodic" (the rounds repeat) or "random" (drawn anew every round).
        schedule: the mixings of all rounds.
    """

    name: str
    n: int
    seed: int
    options: TopologyOptions
    kind: str
    schedule: Schedule
    _mixing: Callable[[int], Mixing] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        remembered = NUM_CACHED if self.n <= MAX_CACHED else 1
        object.__setattr__(self, "_mixing", lru_cache(maxsize=remembered)(self.schedule.draw))

    @property
    def period(self) -> int | None:
        """Number of rounds that end in the exact mean, from a multiple of it on; None if there is no such number."""
        return self.schedule.cycle if self.schedule.is_exact else None

    @property
    def bound(self) -> float | None:
        """Upper bound of `consensus_rate` by theory; None where there is no closed form."""
        return self.schedule.bound

    @property
    def resamples(self) -> int:
        """Number of disconnected draws."""
        return self.schedule.resamples

    @property
    def facts(self) -> Mapping[str, Any]:
        """Derived parameters, such as the number of basis graphs."""
        return self.schedule.facts

    def mixing(self, round: int) -> Mixing:
        """Return the mixing of a round, the same in every process.

        Raises:
            ConfigError: the round is below 0.
        """
        if round < 0:
            raise ConfigError(f"round {round} is below 0: rounds are counted from 0")
        place = round if self.schedule.cycle is None else round % self.schedule.cycle
        with _enough_memory(self.name, self.n):
            return self._mixing(place)

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify the mixings of all rounds, and the links of a file.

        A cycle is digested mixing by mixing, so comments and spelling of a file do not matter; of rounds that are drawn
        anew, the first one, and what they are drawn from.
        """
        drawn = (self.name, self.seed, self.options.model_dump_json(exclude={"graph", "path"}))
        digest = hashlib.blake2b(repr(drawn if self.schedule.cycle is None else ()).encode(), digest_size=16)
        for round in range(self.schedule.cycle or 1):
            mixing = self.mixing(round)
            digest.update(mixing.digest().encode())
            for link in mixing.edges()[3:] if mixing.has_links else ():
                digest.update(b"|" + (b"" if link is None else link.tobytes()))
        return digest.hexdigest()

    def consensus_rate(self) -> float:
        """Return the factor by which a round contracts the disagreement ``||X - mean||`` in the worst direction.

        Static: ``||W - J||_2``. Periodic: ``||W_T ... W_1 - J||_2^(1/T)``, 0 if a cycle is exact. Random: the root of
        the largest mean square, ``max_x sqrt(E ||P W x||^2 / ||P x||^2)``, that is of the largest eigenvalue of
        ``E[P W^T P W P]``: exactly where it is known in closed form, else by samples, to `consensus_rate_error`.

        Raises:
            ConfigError: n is too large for the decomposition.
        """
        schedule = self.schedule
        if schedule.rate is not None:
            return schedule.rate(1.0)
        if schedule.is_exact:
            return 0.0
        if schedule.cycle is None:
            return self._sampled_rate[0]
        rounds = [self.mixing(round) for round in range(schedule.cycle)]
        return float(spectra.norm(rounds) ** (1.0 / schedule.cycle))

    @property
    def consensus_rate_error(self) -> float:
        """Standard error of `consensus_rate`: 0 unless it is known by samples alone."""
        is_known = self.schedule.rate is not None or self.schedule.cycle is not None
        return 0.0 if is_known else self._sampled_rate[1]

    @cached_property
    def _sampled_rate(self) -> tuple[float, float]:
        first = self._averaging(0)
        size = first.n * (1 + first.max_degree)
        count = min(MAX_SAMPLES, max(MIN_SAMPLES, MAX_SAMPLED_EDGES // size))
        square, error = spectra.mean_square([self._averaging(round) for round in range(count)])
        rate = float(np.sqrt(square))
        return rate, error / (2.0 * rate) if rate else 0.0

    def _averaging(self, round: int) -> Mixing:
        """Return the mixing of a round, unless it is joint."""
        mixing = self.mixing(round)
        if mixing.rows_per_site != 1:
            raise ConfigError(f"a round of {self.name!r} contracts nothing by itself: measure a whole cycle")
        return mixing

    def estimate(self, num_rounds: int = NUM_ESTIMATION_ROUNDS) -> float:
        """Return a Monte-Carlo estimate of the root mean square contraction of a round, over random directions.

        It is the mean over directions, where `consensus_rate` is the maximum; if peers are exchangeable, the two agree.
        It uses the first rounds, with a new normal vector for each.

        Raises:
            ConfigError: the mixings are joint, which contract over a whole cycle only.
        """
        squares = []
        for round in range(num_rounds):
            mixing = self._averaging(round)
            start = rng.generator(self.seed, "topology-estimate", round).standard_normal(self.n)
            mixed = mixing.apply(start)
            squares.append(mixed.var() / start.var())
        return float(np.sqrt(np.mean(squares)))

    def min_real_part(self, num_rounds: int = 16) -> float | None:
        """Return the smallest real part of an eigenvalue of W, over a cycle or the first rounds.

        None for joint mixings, whose matrix does not average.

        Raises:
            ConfigError: n is too large for the decomposition.
        """
        rounds = range(num_rounds if self.schedule.cycle is None else self.schedule.cycle)
        mixings = [self.mixing(round) for round in rounds]
        if any(mixing.rows_per_site != 1 for mixing in mixings):
            return None
        return min(spectra.min_real_part(mixing) for mixing in mixings)

    def tracking_limit(self, lazy: bool = False) -> float | None:
        """Return the step, times the curvature, below which gradient tracking is stable, see `spectra.tracking_limit`.

        None where mixings change from round to round, or their eigenvalues cannot be computed.

        Args:
            lazy: whether (I + W) / 2 takes the place of W.
        """
        mixing = self.mixing(0)
        if self.schedule.cycle != 1 or mixing.rows_per_site != 1:
            return None
        try:
            if mixing.is_symmetric:
                values = np.array([spectra.min_real_part(mixing)], dtype=np.complex128)
            else:
                values = spectra.spectrum(mixing)
        except ConfigError:
            return None
        return spectra.tracking_limit((1.0 + values) / 2.0 if lazy else values)


class TopologySpec(Options):
    """A topology as YAML.

    Attributes:
        topology: name of the topology.
        n: number of peers.
        seed: seed of all draws; None: that of the run, 0 where there is none.
        parameters: parameters of the topology; a relative ``path`` is relative to the folder of the file.
        source: publication, in one line.
    """

    topology: str
    n: int | None = None
    seed: int | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    source: str


def build(name: str, n: int | None = None, seed: int = 0, **parameters: Any) -> Topology:
    """Build a topology.

    Args:
        name: short name (``gossamer topology list``), name of an entry point, or ``module:attribute`` of a `Family`.
        n: number of peers; may be None for a file.
        seed: seed of all draws.
        **parameters: parameters of the topology, see its options.

    Raises:
        ConfigError: the name or a parameter is unknown, there are too few peers, or the graph is impossible or
            disconnected.
    """
    return _build(name, n, seed, parameters)


def _build(name: str, n: Any, seed: Any, parameters: Mapping[str, Any]) -> Topology:
    family: Family = resolve("topology", name)
    if not isinstance(family, Family):
        raise ConfigError(f"topology {name!r} is a {type(family).__name__}, not a Family: name a Family")
    if n is None and not family.sets_n:
        raise ConfigError(f"topology {name!r} needs the number of peers: give n")
    if n is not None:
        _require_whole(f"topology {name!r} with n", n, family.minimum)
        if n > MAX_PEERS:
            raise ConfigError(f"topology {name!r} with n = {n} exceeds the limit of {MAX_PEERS} peers: lower n")
    _require_whole(f"topology {name!r} with seed", seed, 0)
    options = parse_options(family.options, parameters, name)
    with _enough_memory(name, n):
        schedule = family.make(int(n or 0), seed, options)
        if options.lazy:
            schedule = schedule.lazy()
        found = schedule.draw(0).n if n is None else int(n)
    return Topology(name, found, seed, options, family.kind, schedule)


def _require_whole(what: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        key = what.rpartition(" ")[2]
        raise ConfigError(f"{what} = {value!r}: {key} must be a whole number, {minimum} or more")


@contextmanager
def _enough_memory(name: str, n: Any) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise ConfigError(f"topology {name!r} with n = {n} needs more memory than there is: lower n") from None


def is_file(name: str) -> bool:
    """Say whether the name of a topology is the path of a YAML file or of a graph."""
    is_path = Path(name).suffix.lower() in SUFFIXES or "/" in name
    return is_path or (":" not in name and os.path.isfile(name) and name not in names("topology"))


def find(name: str, parameters: Mapping[str, Any], *, default_n: int | None = None, default_seed: int = 0) -> Topology:
    """Build the topology of a name or a file.

    Args:
        name: see `build`, or the path of a YAML file of `TopologySpec`, of a GraphML file, or of a list of edges.
        parameters: parameters of the topology, ``n`` and ``seed`` among them; they replace the entries of a file.
        default_n, default_seed: number of peers and seed where neither `parameters` nor the file say them.

    Raises:
        ConfigError: a file is missing or malformed; see `build`.
    """
    given = {key: value for key, value in parameters.items() if value is not None or key not in ("n", "seed")}
    if is_file(name) and Path(name).suffix.lower() not in YAML:
        name, given = "file", {"path": Path(name), **given}
    elif is_file(name):
        path = Path(name)
        spec = _read(path)
        said = {"n": spec.n, "seed": spec.seed}
        folder = {"path": path.parent / str(spec.parameters["path"])} if "path" in spec.parameters else {}
        given = {key: value for key, value in said.items() if value is not None} | spec.parameters | folder | given
        name = spec.topology
    n, seed = given.pop("n", default_n), given.pop("seed", default_seed)
    return _build(name, n, seed, given)


def load(path: str | Path, n: int | None = None, seed: int | None = None, **parameters: Any) -> Topology:
    """Build the topology of a file, see `find`; arguments replace its entries.

    Raises:
        ConfigError: the file is missing or malformed; see `build`.
    """
    return find(str(path), {"n": n, "seed": seed, **parameters})


def _read(path: Path) -> TopologySpec:
    try:
        data = read_yaml(path, "topology")
    except ConfigError as error:
        near = [each.name for each in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{error}{nearest(path.name, near)}") from None
    spec = parse_options(TopologySpec, data, path.name)
    if is_file(spec.topology):
        raise ConfigError(
            f"{path.name}.topology = {spec.topology!r} is a file: write 'topology: file' and 'parameters: {{path:"
            f" {spec.topology}}}'"
        )
    return spec
