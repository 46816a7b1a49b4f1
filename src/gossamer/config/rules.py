"""What a configuration may not ask for together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.algorithms.decentralized.base import mixings
from gossamer.config.schema import Config
from gossamer.errors import ConfigError
from gossamer.registry import OBJECT
from gossamer.simulation.devices import Availability
from gossamer.submodel.strategies import find_strategy
from gossamer.topology import Topology


def require_population(config: Config, algorithm: Any) -> None:
    """Refuse an algorithm of peers for clients, and the other way round.

    Raises:
        ConfigError: they do not fit.
    """
    name, needs_peers = config.algorithm["name"], algorithm.traits.downlink is None
    if needs_peers and config.peers is None:
        raise ConfigError(
            f"algorithm {name!r} has no server: give peers and their topology instead of clients, or choose an"
            " algorithm such as fedavg"
        )
    if config.peers is not None and not needs_peers:
        raise ConfigError(
            f"algorithm {name!r} needs a server: give clients instead of peers, or choose an algorithm such as dsgd"
        )
    if config.peers is not None and config.submodel.mask_labels:
        raise ConfigError(
            f"submodel.mask_labels = {config.submodel.mask_labels} needs a server that counts who holds a label: leave"
            " it out for peers"
        )


def require_whole_models(config: Config, algorithm: Any) -> None:
    """Refuse sub-models, and means over different holders, where `algorithm` (or its class) gives a reason.

    Raises:
        ConfigError: capacities other than 1, or label rows that only some clients hold.
    """
    sub, name = config.submodel, config.algorithm["name"]
    reason: str | None = algorithm.traits.whole_models_only
    if reason is not None and sub.mask_labels:
        raise ConfigError(
            f"algorithm {name!r} needs all participants to hold all coordinates, because {reason}: set"
            f" submodel.mask_labels to false instead of {sub.mask_labels}"
        )
    if reason is not None and tuple(sub.capacities) != (1.0,):
        raise ConfigError(
            f"algorithm {name!r} trains whole models only, because {reason}: set submodel.capacities to [1.0] instead"
            f" of {sub.capacities}"
        )


def require_selection(config: Config, algorithm: Any) -> None:
    """Refuse several rounds, and a selection of models by test data, where `algorithm` gives a reason.

    Raises:
        ConfigError: the algorithm is of one round, or measures models and no training data are held out for it.
    """
    traits, name = algorithm.traits, config.algorithm["name"]
    if traits.one_round_only is not None and config.rounds != 1:
        raise ConfigError(
            f"algorithm {name!r} is of one round, because {traits.one_round_only}: set rounds to 1 instead of"
            f" {config.rounds}"
        )
    if traits.scores_models and config.workload.get("validation") is None:
        raise ConfigError(
            f"algorithm {name!r} selects models by what they reach, which must not be on the test data: give"
            " workload.validation, the share of the training data that is held out for it"
        )


def check_peers(config: Config, algorithm: Any, topology: Topology) -> tuple[str, ...]:
    """Check what an algorithm asks of the topology and of local training, and return its warnings.

    Raises:
        ConfigError: theory excludes the combination.
    """
    reason, name = algorithm.traits.one_step_only, config.algorithm["name"]
    if reason is not None and config.train.steps != 1:
        given = f"train.epochs = {config.train.epochs}" if config.train.steps is None else ""
        raise ConfigError(
            f"algorithm {name!r} takes one local step a round, because {reason}: set train.steps to 1 instead of"
            f" {given or f'train.steps = {config.train.steps}'}"
        )
    peers, no_merge = config.peers, algorithm.traits.no_merge
    if no_merge is not None and peers is not None and (peers.merge_every is not None or peers.final_merge):
        given = f"merge_every = {peers.merge_every}" if peers.merge_every is not None else "final_merge = True"
        raise ConfigError(
            f"algorithm {name!r} does not go with peers.{given}, because {no_merge}: leave it out; the merged model is"
            " evaluated anyway"
        )
    if config.stop is not None and peers is not None and peers.final_merge:
        raise ConfigError(
            f"peers.final_merge = True merges in round {config.rounds}, but stop may end the run before it: leave one"
            " of them out"
        )
    profiles = [config.device] if config.devices is None else [share.profile for share in config.devices]
    away = next((profile.name for profile in profiles if profile.availability != Availability()), None)
    if away is not None:
        raise ConfigError(
            f"device {away!r} is not always available, but all peers train and mix in every round: set its availability"
            " to always, or give clients"
        )
    warnings = tuple(algorithm.check(topology))
    if tuple(config.submodel.capacities) != (1.0,):
        _check_windows(config, topology)
    return warnings


def _check_windows(config: Config, topology: Topology) -> None:
    """Refuse what windows of peers cannot be chosen or mixed by.

    Raises:
        ConfigError: windows by rank, or weights below 0.
    """
    strategy = config.submodel.strategy
    assert strategy is not None
    if find_strategy(strategy).rank is not None:
        raise ConfigError(
            f"submodel.strategy = {strategy!r} ranks the channels of one model, which only a server has: choose"
            " rolling, static or random for peers"
        )
    for mixing in mixings(topology):
        least = min(float(mixing.self_weights().min()), float(mixing.edges().weight.min(initial=0.0)))
        if least < -1e-9:
            raise ConfigError(
                f"topology {topology.name!r} has a negative weight, {least:.3g}, but windows are averaged by the sum of"
                " their holders' weights: choose weights 'metropolis', or set submodel.capacities to [1.0]"
            )


def require_importable(config: Config) -> None:
    """Refuse, on an engine whose processes import what they train, objects that were given in Python without a name.

    Raises:
        ConfigError: there is one.
    """
    remedies = {
        "model": "put it into a file, such as mine.py, and give model='mine:{name}', or the class that is imported from"
        " it",
        "partition": "write its lists into a JSON file, and give partition={{'name': 'file', 'path': ...}}",
    }
    specs = {"model": config.workload.get("model"), "partition": config.population.partition}
    for what, spec in specs.items():
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and name.startswith(OBJECT):
            remedy = remedies[what].format(name=name.removeprefix(OBJECT))
            raise ConfigError(
                f"{what} {name!r} is an object of this process, which the processes of engine {config.engine.name!r}"
                f" cannot import: {remedy}"
            )
