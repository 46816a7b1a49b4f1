"""A topology: peers, and the mixing of each round, from a name, n, a seed and parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from gossamer import rng
from gossamer.errors import ConfigError, nearest
from gossamer.options import Options, parse_options
from gossamer.registry import resolve
from gossamer.topology import spectra
from gossamer.topology.base import Mixing
from gossamer.topology.family import Family, Schedule, TopologyOptions

NUM_ESTIMATION_ROUNDS = 200
MAX_CACHED = 100_000  # peers of a topology that caches the mixings of several rounds
NUM_CACHED = 64


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
        return self._mixing(place)

    def consensus_rate(self) -> float:
        """Return the factor by which a round contracts the disagreement ``||X - mean||`` in the worst direction.

        Static: ``||W - J||_2``. Periodic: ``||W_T ... W_1 - J||_2^(1/T)``, 0 if a cycle is exact. Random: the root of
        the largest mean square, ``max_x sqrt(E ||P W x||^2 / ||P x||^2)``, exactly where it is known in closed form,
        else `estimate`.

        Raises:
            ConfigError: n is too large for the decomposition.
        """
        schedule = self.schedule
        if schedule.rate is not None:
            return schedule.rate(1.0)
        if schedule.is_exact:
            return 0.0
        if schedule.cycle is None:
            return self.estimate()
        rounds = [self.mixing(round) for round in range(schedule.cycle)]
        return float(spectra.norm(rounds) ** (1.0 / schedule.cycle))

    def estimate(self, num_rounds: int = NUM_ESTIMATION_ROUNDS) -> float:
        """Return a Monte-Carlo estimate of the root mean square contraction of a round, over random directions.

        It is the mean over directions, where `consensus_rate` is the maximum; if peers are exchangeable, the two agree.
        It uses the first rounds, with a new normal vector for each.

        Raises:
            ConfigError: the mixings are joint, which contract over a whole cycle only.
        """
        squares = []
        for round in range(num_rounds):
            mixing = self.mixing(round)
            if mixing.rows_per_site != 1:
                raise ConfigError(f"a round of {self.name!r} contracts nothing by itself: measure a whole cycle")
            start = rng.generator(self.seed, "topology-estimate", round).standard_normal(self.n)
            mixed = mixing.apply(start)
            squares.append(mixed.var() / start.var())
        return float(np.sqrt(np.mean(squares)))

    def min_real_part(self, num_rounds: int = 16) -> float | None:
        """Return the smallest real part of an eigenvalue of W, over a cycle or the first rounds.

        Below 0, gradient tracking can diverge at steps where other graphs converge: set ``lazy: true``. None for joint
        mixings, whose matrix does not average.

        Raises:
            ConfigError: n is too large for the decomposition.
        """
        rounds = range(num_rounds if self.schedule.cycle is None else self.schedule.cycle)
        mixings = [self.mixing(round) for round in rounds]
        if any(mixing.rows_per_site != 1 for mixing in mixings):
            return None
        return min(spectra.min_real_part(mixing) for mixing in mixings)


class TopologySpec(Options):
    """A topology as YAML.

    Attributes:
        topology: name of the topology.
        n, seed: see `build`.
        parameters: parameters of the topology; a relative ``path`` is relative to the folder of the file.
        source: publication, in one line.
    """

    topology: str
    n: int | None = None
    seed: int = 0
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
    family: Family = resolve("topology", name)
    if not isinstance(family, Family):
        raise ConfigError(f"topology {name!r} is a {type(family).__name__}, not a Family: name a Family")
    if n is None and not family.sets_n:
        raise ConfigError(f"topology {name!r} needs the number of peers: give n")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer) or n < family.minimum):
        raise ConfigError(f"topology {name!r} with n = {n!r}: n must be a whole number, {family.minimum} or more")
    options = parse_options(family.options, parameters, name)
    schedule = family.make(int(n or 0), seed, options)
    if options.lazy:
        schedule = schedule.lazy()
    found = schedule.draw(0).n if n is None else int(n)
    return Topology(name, found, seed, options, family.kind, schedule)


def load(path: str | Path, n: int | None = None, seed: int | None = None, **parameters: Any) -> Topology:
    """Build the topology of a YAML file of `TopologySpec`; arguments replace its entries.

    Raises:
        ConfigError: the file is missing or malformed; see `build`.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read the topology {str(path)!r} ({reason}): give a YAML file{nearest(path.name, _near(path))}"
        ) from None
    spec = parse_options(TopologySpec, data, path.name)
    merged = {**spec.parameters, **parameters}
    if "path" in spec.parameters and "path" not in parameters:
        merged["path"] = path.parent / str(merged["path"])
    return build(spec.topology, spec.n if n is None else n, spec.seed if seed is None else seed, **merged)


def _near(path: Path) -> list[str]:
    return [each.name for each in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
