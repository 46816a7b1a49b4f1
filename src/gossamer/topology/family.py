"""What a family of topologies provides: options, and a schedule of mixings for given n and seed.

A family of your own is a `Family` named in full as ``my_package.my_module:my_family``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.topology.base import Integers, Mixing

MAX_ATTEMPTS = 100  # draws of a random graph before it is called hopelessly disconnected


class TopologyOptions(Options):
    """Options that every topology has.

    Attributes:
        lazy: mix by (I + W) / 2 instead of W: slower, but no eigenvalue has a negative real part.
    """

    lazy: bool = False


@dataclass(frozen=True)
class Schedule:
    """Which mixing comes in which round.

    Attributes:
        draw: the mixing of a round >= 0, a function of the round alone.
        cycle: rounds after which the mixings repeat: 1 if they never change; None: drawn afresh for ever.
        is_exact: whether one cycle, begun in a round that it divides, ends in the exact mean.
        rate: the exact consensus rate of ``(1 - share) I + share W``, as a function of share; None: to be computed.
        bound: what theory promises for the rate; None: nothing in closed form.
        resamples: disconnected draws that were thrown away.
        facts: what was settled on the way, such as the number of basis graphs.
    """

    draw: Callable[[int], Mixing]
    cycle: int | None
    is_exact: bool = False
    rate: Callable[[float], float] | None = None
    bound: float | None = None
    resamples: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def lazy(self, share: float = 0.5) -> Schedule:
        """Return the schedule of ``(1 - share) I + share W``.

        A bound b becomes (1 - share) + share b, by the triangle inequality; where one cycle is a single mixing or the
        rounds are independent, that is a bound of the lazy rate.
        """
        exact_rate = self.rate
        return replace(
            self,
            draw=lambda round: self.draw(round).lazy(share),
            is_exact=False,
            rate=None if exact_rate is None else lambda further: exact_rate(share * further),
            bound=None if self.bound is None else 1.0 - share + share * self.bound,
        )


@dataclass(frozen=True)
class Family:
    """A named way to make topologies.

    Attributes:
        make: ``(n, seed, options) -> Schedule``.
        options: the model of its parameters.
        kind: "static", "periodic" or "random" (fresh every round).
        degree, rate: what theory says, for the table of all topologies.
        source: where it was described.
        minimum: least number of peers.
        sets_n: whether the number of peers is found out by `make`, given n = 0 where the user gives none.
    """

    make: Callable[[int, int, Any], Schedule]
    kind: str
    degree: str
    rate: str
    source: str
    options: type[TopologyOptions] = TopologyOptions
    minimum: int = 2
    sets_n: bool = False


def static(mixing: Mixing, **more: Any) -> Schedule:
    """Return the schedule of a mixing that never changes."""
    return Schedule(lambda round: mixing, cycle=1, **more)


def connected(
    name: str, seed: int, draw: Callable[[Any], tuple[Integers, Integers]], n: int, advice: str
) -> tuple[Integers, Integers, int]:
    """Draw a random graph again and again, until it is connected.

    Args:
        name: of the topology, for the error.
        draw: edges (first, second), int64 [e] each, from a numpy generator.
        advice: what to change if it never is.

    Returns:
        the edges, and how many draws were thrown away.

    Raises:
        ConfigError: `MAX_ATTEMPTS` draws were disconnected.
    """
    from gossamer.topology.weights import is_connected

    for attempt in range(MAX_ATTEMPTS):
        first, second = draw(rng.generator(seed, f"topology-{name}", extra=attempt))
        if is_connected(n, first, second):
            return first, second, attempt
    raise ConfigError(f"{MAX_ATTEMPTS} draws of {name!r} with n = {n} were all disconnected: {advice}")
