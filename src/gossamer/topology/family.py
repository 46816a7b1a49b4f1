"""Families of topologies: options, and a schedule of mixings for given n and seed.

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

MAX_ATTEMPTS = 100  # draws of a random graph until it is connected


class TopologyOptions(Options):
    """Options of every topology.

    Attributes:
        lazy: mix by (I + W) / 2 instead of W: slower, but no eigenvalue has a negative real part.
    """

    lazy: bool = False


@dataclass(frozen=True)
class Schedule:
    """The mixings of all rounds.

    Attributes:
        draw: ``round -> mixing``, for rounds >= 0.
        cycle: number of rounds after which the mixings repeat, 1 if they never change; None: each round is drawn anew.
        is_exact: whether one cycle, from a multiple of its length on, ends in the exact mean.
        rate: ``share -> consensus rate`` of ``(1 - share) I + share W``, exact; None: to be computed.
        bound: upper bound of the rate by theory; None: no closed form.
        resamples: number of disconnected draws.
        facts: derived parameters, such as the number of basis graphs.
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
        options: model of its parameters.
        kind: "static", "periodic" or "random" (drawn anew every round).
        degree, rate: text for the table of all topologies.
        source: publication.
        minimum: minimum number of peers.
        sets_n: whether `make` determines the number of peers; n is 0 then, unless the user gives it.
        about: what it is, in a sentence; "": the first paragraph of the docstring of `make`.
    """

    make: Callable[[int, int, Any], Schedule]
    kind: str
    degree: str
    rate: str
    source: str
    options: type[TopologyOptions] = TopologyOptions
    minimum: int = 2
    sets_n: bool = False
    about: str = ""


def static(mixing: Mixing, **more: Any) -> Schedule:
    """Return the schedule of a mixing that never changes."""
    return Schedule(lambda round: mixing, cycle=1, **more)


def connected(
    name: str, seed: int, draw: Callable[[Any], tuple[Integers, Integers]], n: int, advice: str
) -> tuple[Integers, Integers, int]:
    """Draw a random graph until it is connected.

    Args:
        name: name of the topology, for errors.
        seed: seed of all draws.
        draw: ``generator -> (first, second)``, the ends of the edges, int64 [e] each.
        n: number of peers.
        advice: remedy for errors.

    Returns:
        the edges, and the number of disconnected draws.

    Raises:
        ConfigError: `MAX_ATTEMPTS` draws were disconnected.
    """
    from gossamer.topology.weights import is_connected

    for attempt in range(MAX_ATTEMPTS):
        first, second = draw(rng.generator(seed, f"topology-{name}", extra=attempt))
        if is_connected(n, first, second):
            return first, second, attempt
    raise ConfigError(f"{MAX_ATTEMPTS} draws of {name!r} with n = {n} were all disconnected: {advice}")
