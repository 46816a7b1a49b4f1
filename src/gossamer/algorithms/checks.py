"""Whether the class of an algorithm, or an instance, is what an algorithm is to be."""

from __future__ import annotations

from typing import Any

from gossamer.algorithms.base import Algorithm
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.errors import ConfigError, require_attributes
from gossamer.options import check_traits
from gossamer.registry import resolve


def require_algorithm(plugin: str, found: Any) -> None:
    """Check the methods and the traits of the class of an algorithm, or of an instance.

    Args:
        plugin: what errors call it, such as ``"algorithm 'mine:MyAlgorithm'"``.

    Raises:
        ConfigError: it lacks a method, or its traits are missing or contradicted, see `check_traits`.
    """
    methods = [name for name in vars(Algorithm) if not name.startswith("_")]
    require_attributes(plugin, found, ["traits", *methods], "derive it from gossamer.algorithms.base.Algorithm")
    check_traits(plugin, found, AlgorithmTraits, Algorithm)


def require_phases(plugin: str, algorithm: Algorithm) -> None:
    """Check what an algorithm is in each phase of a round, where there are several.

    Raises:
        ConfigError: see `require_algorithm`; or a phase contradicts the traits of the whole.
    """
    traits = algorithm.traits
    for phase in range(traits.num_phases if traits.num_phases > 1 else 0):
        one, where = algorithm.of_phase(phase), f"phase {phase} of {plugin}"
        require_algorithm(where, one)
        if (one.traits.downlink is None) != (traits.downlink is None):
            raise ConfigError(
                f"{where} has downlink = {one.traits.downlink}, but the whole has {traits.downlink}: give names in"
                " both, or None (peers) in both"
            )
        if unknown := sorted({*one.traits.client_arrays} - {*traits.client_arrays}):
            raise ConfigError(f"{where} has client_arrays {unknown}, which the whole has not: add them to its traits")


def find_algorithm(name: str) -> type[Algorithm]:
    """Return the class of an algorithm's name.

    Raises:
        RegistryError: the name is unknown.
        ConfigError: see `require_algorithm`.
    """
    found: type[Algorithm] = resolve("algorithm", name)
    require_algorithm(f"algorithm {name!r}", found)
    return found
