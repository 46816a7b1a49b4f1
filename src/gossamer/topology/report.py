"""Tables about topologies: all of them, one of them, and a measurement of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gossamer.errors import ConfigError
from gossamer.registry import names, resolve
from gossamer.storage.tables import aligned
from gossamer.topology.consensus import TOLERANCE, measure
from gossamer.topology.topology import Topology

Answer = TypeVar("Answer")


def catalogue() -> list[dict[str, Any]]:
    """Return one row for each known topology: name, kind, degree, minimum_n, rate, options, source."""
    rows = []
    for name in names("topology"):
        family = resolve("topology", name)
        rows.append(
            {
                "name": name,
                "kind": family.kind,
                "degree": family.degree,
                "minimum_n": family.minimum,
                "rate": family.rate,
                "parameters": sorted(family.options.model_fields),
                "source": family.source,
            }
        )
    return rows


def describe(topology: Topology) -> dict[str, Any]:
    """Return a description of a topology for JSON; None: does not apply, or is too large to compute.

    Where rounds differ, stochasticity, symmetry and edges are those of round 0, and the degree is the maximum over a
    cycle.
    """
    cycle = topology.schedule.cycle
    first = topology.mixing(0)
    given = topology.options.model_dump(mode="json", exclude_none=True, exclude={"graph"})
    return {
        "topology": topology.name,
        "kind": topology.kind,
        "n": topology.n,
        "seed": topology.seed,
        "parameters": {**given, **topology.facts},
        "mixing": first.kind,
        "stochasticity": first.stochasticity,
        "symmetric": first.is_symmetric,
        "max_degree": max(topology.mixing(round).max_degree for round in range(cycle or 1)),
        "period": topology.period,
        "consensus_rate": _if_possible(topology.consensus_rate),
        "rate_error": _if_possible(lambda: topology.consensus_rate_error),
        "bound": topology.bound,
        "min_real_part": _if_possible(topology.min_real_part),
        "resamples": topology.resamples,
        "digest_of_round_0": first.digest(),
    }


def measured(topology: Topology, num_rounds: int, start_seed: int) -> dict[str, Any]:
    """Return `describe` with the result of `measure`.

    Raises:
        ConfigError: num_rounds is below 1.
    """
    found = measure(topology, num_rounds, start_seed)
    return {
        **describe(topology),
        "tolerance": TOLERANCE,
        "rounds_to_tolerance": found.rounds,
        "rounds_mixed": len(found.distances) - 1,
        "rate_measured": found.rate,
        "final_distance": float(found.distances[-1]),
        "mean_drift": found.mean_drift,
    }


def _if_possible(compute: Callable[[], Answer]) -> Answer | None:
    try:
        return compute()
    except ConfigError:
        return None


def render(facts: Mapping[str, Any]) -> str:
    """Return one line for each entry."""
    return aligned((name.replace("_", " "), _text(value)) for name, value in facts.items())


def render_catalogue(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line for each topology."""
    columns = {
        "name": "name",
        "kind": "kind",
        "degree": "degree",
        "minimum_n": "least n",
        "rate": "consensus rate",
        "source": "source",
    }
    return aligned([columns.values(), *([str(row[key]) for key in columns] for row in rows)])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_text(each)}" for key, each in value.items()) or "-"
    return str(value)
