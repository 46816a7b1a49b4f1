"""A topology: peers, and the mixing of each round, from a name, n, a seed and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
MAX_CACHED = 100_000  # peers of a topology that remembers the mixings of several rounds
NUM_CACHED = 64


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph, or a sequence of graphs, on n peers; a function of its arguments alone.

    Attributes:
        name, n, seed, options: what it was built from.
        kind: "static", "periodic" (the rounds repeat) or "random" (drawn afresh every round).
        schedule: which mixing comes when.
    """

    name: str
    n: int
    seed: int
    options: TopologyOptions
    kind: str
    schedule: Schedule

    def __post_init__(self) -> None:
        remembered = NUM_CACHED if self.n <= MAX_CACHED else 1
        object.__setattr__(self, "_mixing", lru_cache(maxsize=remembered)(self.schedule.draw))

    @property
    def period(self) -> int | None:
        """Rounds that end in the exact mean, begun at a multiple of themselves; None if no number does."""
        return self.schedule.cycle if self.schedule.is_exact else None

    @property
    def bound(self) -> float | None:
        """What theory promises for `consensus_rate`; None where it has no closed form."""
        return self.schedule.bound

    @property
    def resamples(self) -> int:
        """Disconnected draws that were thrown away."""
        return self.schedule.resamples

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was settled on the way, such as the number of basis graphs."""
        return self.schedule.facts

    def mixing(self, round: int) -> Mixing:
        """Return the mixing of a round, the same on every rank.

        Raises:
            ConfigError: the round is below 0.
        """
        if round < 0:
            raise ConfigError(f"round {round} is below 0: rounds are counted from 0")
        place = round if self.schedule.cycle is None else round % self.schedule.cycle
        mixing: Mixing = getattr(self, "_mixing")(place)  # noqa: B009
        return mixing

    def consensus_rate(self) -> float:
        """Return by what factor a round contracts the disagreement ``||X - mean||`` in the worst direction.

        Static: ``||W - J||_2``. Periodic: ``||W_T ... W_1 - J||_2^(1/T)``, 0 if a cycle is exact. Random: the root of
        the largest mean square, ``max_x sqrt(E ||P W x||^2 / ||P x||^2)``, exactly where it is known in closed form,
        else `estimate`.

        Raises:
            ConfigError: n is too large for what has to be decomposed.
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

        It is the mean over directions, where `consensus_rate` is the worst one; for laws in which no peer is special
        the two agree. Drawn from the topology's first rounds, with a fresh normal vector for each.

        Raises:
            ConfigError: the mixings are joint ones, which only contract over a whole cycle.
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
        """Return the least real part of an eigenvalue of a round's W, over a cycle or the first rounds.

        Below 0, gradient tracking can diverge at steps where other graphs converge: set ``lazy: true``. None for joint
        mixings, whose matrix is no averaging matrix.

        Raises:
            ConfigError: n is too large for what has to be decomposed.
        """
        rounds = range(num_rounds if self.schedule.cycle is None else self.schedule.cycle)
        mixings = [self.mixing(round) for round in rounds]
        if any(mixing.rows_per_site != 1 for mixing in mixings):
            return None
        return min(spectra.min_real_part(mixing) for mixing in mixings)


class TopologySpec(Options):
    """A topology as YAML.

    Attributes:
        topology: its name.
        n, seed: of `build`.
        parameters: of the topology; a relative ``path`` among them starts at the folder of the file.
        source: where it was taken from, in one line.
    """

    topology: str
    n: int | None = None
    seed: int = 0
    parameters: dict[str, Any] = Field(default_factory=dict)
    source: str


def build(name: str, n: int | None = None, seed: int = 0, **parameters: Any) -> Topology:
    """Build a topology.

    Args:
        name: a short name (``gossamer topology list``), an entry point's name, or ``module:attribute`` of a `Family`.
        n: number of peers; may be left out where a file tells it.
        seed: of everything that is drawn.
        **parameters: of the topology, see its options.

    Raises:
        ConfigError: an unknown name or parameter, too few peers, a graph that cannot be, or is disconnected.
    """
    family: Family = resolve("topology", name)
    if not isinstance(family, Family):
        raise ConfigError(f"topology {name!r} stands for a {type(family).__name__}, not for a Family: name one")
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
    """Build the topology of a YAML file of `TopologySpec`; arguments replace what it says.

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
