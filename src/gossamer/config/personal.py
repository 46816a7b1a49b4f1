"""Which parameters stay with the clients."""

from __future__ import annotations

from typing import Any

from gossamer.algorithms.base import Algorithm
from gossamer.config.schema import Config
from gossamer.errors import ConfigError
from gossamer.workloads.base import Workload
from gossamer.workloads.parts import matching

WHERE = "clients.personal"


def require_holdings(config: Config, algorithm: Algorithm, workload: Workload) -> None:
    """Refuse a workload whose participants hold different modules where the algorithm needs the same ones of all.

    Raises:
        ConfigError: it does, or models of different modules are to be evaluated, and there are none.
    """
    traits, every = algorithm.traits, workload.layout.modules
    if config.evaluation.by_holding and (traits.represents or not workload.holdings):
        why = "clients keep models of their own" if traits.represents else "all participants hold the same modules"
        raise ConfigError(f"evaluation.by_holding divides nothing, because {why}: leave it out")
    if traits.represents:
        return  # its server never combines parameters
    if workload.traits.has_public_set:
        raise ConfigError(
            "workload.exchange = 'representations' keeps whole models with the clients, but algorithm"
            f" {config.algorithm['name']!r} combines parameters: choose creamfl, or leave workload.exchange out"
        )
    lacking = {one.name: [name for name in every if name not in one.modules] for one in workload.holdings}
    reason = traits.whole_models_only
    if traits.full_size or traits.has_local_loss:
        reason = reason or "it cuts sub-models of its own"
    if "rows" in traits.uplink.values():
        reason = reason or "its server combines the rows of all participants"
    who = next((name for name, modules in lacking.items() if modules), None)
    if who is not None and reason is not None:
        raise ConfigError(
            f"participants with {who} lack the modules {', '.join(lacking[who])}, but algorithm"
            f" {config.algorithm['name']!r} trains whole models only, because {reason}: choose fedavg, fedrolex or"
            " heterofl, or give everybody all modalities"
        )


def require_personal(config: Config, algorithm: Any) -> None:
    """Check what can be checked of personal parameters without the model.

    Raises:
        ConfigError: the algorithm needs some and there are none, or it does not go with them.
    """
    name, traits = config.algorithm["name"], algorithm.traits
    given = config.clients.personal if config.clients is not None else []
    if traits.personal == "given" and not given:
        raise ConfigError(
            f"algorithm {name!r} keeps layers with the clients, but {WHERE} names none: give patterns of their"
            ' parameters, such as ["head.*"]'
        )
    if traits.personal == "norms" and given:
        raise ConfigError(
            f"algorithm {name!r} keeps the BatchNorm layers with the clients: leave {WHERE} = {given} out, or choose"
            " 'fedper'"
        )
    shaped = {payload: kind for payload, kind in traits.uplink.items() if payload not in traits.scalars}
    if given and traits.represents:
        raise ConfigError(
            f"algorithm {name!r} keeps whole models with the clients: leave {WHERE} = {given} out, or choose 'fedper'"
        )
    if (given or traits.personal != "none") and (shaped != {"x": "mean"} or traits.num_phases > 1):
        raise ConfigError(
            f"algorithm {name!r} does not go with {WHERE}, because clients send more than one mean of their changes:"
            " leave it out, or choose fedavg, fedprox or the like"
        )


def personal_parameters(config: Config, algorithm: Any, workload: Workload) -> tuple[str, ...]:
    """Return the names of the parameters that stay with the clients.

    Raises:
        ConfigError: a pattern matches nothing, or everything would stay.
    """
    traits = algorithm.traits
    shaped = {payload: kind for payload, kind in traits.uplink.items() if payload not in traits.scalars}
    sends_more = not traits.represents and (shaped != {"x": "mean"} or traits.num_phases > 1)
    if workload.personal and not workload.buffers and sends_more:
        raise ConfigError(
            f"workload {config.workload['name']!r} keeps {workload.personal[0]!r} with its participants, which does not"
            f" go with algorithm {config.algorithm['name']!r}, because it sends more than one mean: choose fedavg,"
            " fedprox or the like"
        )
    if config.clients is None:
        return workload.personal
    layout, name = workload.layout, config.algorithm["name"]
    patterns, where = config.clients.personal, WHERE
    if algorithm.traits.personal == "norms":
        patterns, where = [f"{layer}.*" for layer in workload.norms], f"algorithm {name!r}"
        if not patterns:
            raise ConfigError(
                f"{where} keeps BatchNorm layers with the clients, and the model has none that are trained: choose"
                " another model, or 'fedper'"
            )
    found = matching(where, patterns, layout.names, "trained parameter") | set(workload.personal)
    if len(found) == len(layout.names):
        raise ConfigError(
            f"{where} keeps all parameters with the clients, so that nothing is learnt together: keep fewer"
        )
    return tuple(name for name in layout.names if name in found)
