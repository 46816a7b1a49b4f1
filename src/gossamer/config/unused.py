"""What a configuration gives although it changes nothing: allowed, because methods share sections, but warned of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gossamer.config.schema import Config
from gossamer.submodel.strategies import find_strategy
from gossamer.workloads.holdings import apportion

Rule = tuple[str, Any, Any, str | None]
"""An option, its value, the value that it has if left out, and why it changes nothing; None: it changes something."""


def unused_options(config: Config, algorithm: Any, engine_class: Any) -> tuple[str, ...]:
    """Return a sentence for each option that is given, but changes nothing.

    Given is what differs from the value that `resolve` fills in, so a resolved configuration gets the same sentences.

    Args:
        config: resolved configuration.
    """
    rules = [*_of_submodels(config, algorithm), *_of_schedule(config), *_of_engine(config, engine_class)]
    rules += _of_local_steps(config, algorithm)
    rules += _of_stop(config)
    rules += _of_clients(config, algorithm) if config.peers is None else _of_merges(config, algorithm)
    unused = [
        f"{option} = {value!r} changes nothing, because {reason}: leave it out, or correct it"
        for option, value, left_out, reason in rules
        if reason is not None and value != left_out
    ]
    return (*unused, *_windowless(config, algorithm), *_without_participants(config))


def _of_submodels(config: Config, algorithm: Any) -> Iterator[Rule]:
    """Yield rules on windows; none for baselines, which take over the section of the methods beside them."""
    sub, traits = config.submodel, algorithm.traits
    assert sub.strategy is not None
    if traits.capacities in ("smallest", "largest"):
        return
    whole = "all participants train the whole model" if tuple(sub.capacities) == (1.0,) else None
    single = f"submodel.capacities = {sub.capacities} is a single one" if len(sub.capacities) == 1 else None
    ignored = ("stride", "offsets") if traits.full_size else find_strategy(sub.strategy).unused
    moved = {axis: offset for axis, offset in sub.offsets.items() if offset}
    for option, value, left_out in (("stride", sub.stride, 1), ("offsets", moved, {})):
        fixed = f"windows of strategy {sub.strategy!r} do not follow it" if option in ignored else None
        yield f"submodel.{option}", value, left_out, whole or fixed
    yield "submodel.strategy", sub.strategy, traits.strategy or "static", whole
    rows = "the algorithm averages every row by itself" if "rows" in traits.uplink.values() else None
    yield "submodel.mask_labels", sub.mask_labels, traits.default_label_mask != "none", rows
    yield "submodel.scaler", sub.scaler, traits.default_scaler, whole
    yield "submodel.assignment", sub.assignment, "fixed", single
    yield "submodel.shares", sub.shares, None, single


def _of_schedule(config: Config) -> Iterator[Rule]:
    """Yield rules on the learning rate."""
    schedule, where, rounds = config.train.schedule, "train.schedule", config.rounds
    is_multistep = schedule.name == "multistep"
    late = [milestone for milestone in schedule.milestones if milestone >= rounds]
    flat = {
        "multistep": None if schedule.milestones else "it has no milestones",
        "cosine": "there is one round only" if rounds == 1 else None,
    }
    yield f"{where}.name", schedule.name, "constant", flat.get(schedule.name)
    yield f"{where}.milestones", late, [], f"rounds are counted from 0 to {rounds - 1}" if is_multistep else None
    yield f"{where}.factor", schedule.factor, 0.1, None if is_multistep else f"schedule {schedule.name!r} has no steps"
    in_full = "the first round has all of train.lr then" if schedule.warmup_rounds == 1 else None
    yield f"{where}.warmup_rounds", schedule.warmup_rounds, 0, in_full


def _of_local_steps(config: Config, algorithm: Any) -> Iterator[Rule]:
    """Yield rules on the optimizer of local steps."""
    train, optimizer = config.train, algorithm.optimizer
    is_bare = optimizer is None or not (optimizer.traits.moments or optimizer.traits.counts_steps)
    nothing = f"optimizer {train.optimizer['name']!r} has no moments then" if is_bare else None
    yield "train.optimizer.state", train.optimizer.get("state"), None, nothing
    schedule = train.local_schedule
    single = "a round has one local step" if train.steps == 1 else None
    yield "train.local_schedule.name", schedule.name, "constant", single
    in_full = "the first step has all of the learning rate then" if schedule.warmup_steps == 1 else None
    yield "train.local_schedule.warmup_steps", schedule.warmup_steps, 0, in_full


def _of_stop(config: Config) -> Iterator[Rule]:
    """Yield rules on the end before the last round."""
    stop, number = config.stop, config.rounds // config.evaluation.every
    if stop is not None:
        few = f"the run has {number} evaluations" if stop.patience is not None and stop.patience >= number else None
        yield "stop.patience", stop.patience, None, few


def _of_clients(config: Config, algorithm: Any) -> Iterator[Rule]:
    """Yield rules on who is chosen, and whose models are evaluated."""
    clients = config.clients
    assert clients is not None
    everybody = f"clients.per_round = {clients.num} are all clients" if clients.per_round == clients.num else None
    yield "clients.over_selection", clients.over_selection, 1.0, everybody
    yield "evaluation.num_peers", config.evaluation.num_peers, 8, "there are no peers, but clients"
    own = clients.personal or config.workload.get("buffers") == "personal" or algorithm.traits.personal != "none"
    own = own or algorithm.traits.represents
    keep = own or config.evaluation.fine_tune_steps
    alone = None if keep else "clients keep no parameters, and are not fine-tuned"
    yield "evaluation.num_clients", config.evaluation.num_clients, 8, alone


def _of_merges(config: Config, algorithm: Any) -> Iterator[Rule]:
    """Yield rules on exact means of all peers."""
    peers, own, rounds = config.peers, algorithm.traits.merge_every, config.rounds
    assert peers is not None
    every = peers.merge_every or own
    are_away = config.engine.name == "network" or config.replay is not None
    alone = None if are_away else f"peers of engine {config.engine.name!r} are never absent"
    yield "peers.absent_neighbour", peers.absent_neighbour, "wait", alone
    patient = "they wait for ever" if peers.absent_neighbour == "wait" else None
    yield "peers.patience_seconds", peers.patience_seconds, 30.0, alone or patient
    yield "evaluation.num_clients", config.evaluation.num_clients, 8, "there are no clients, but peers"
    yield "evaluation.fine_tune_steps", config.evaluation.fine_tune_steps, 0, "peers are evaluated as they are"
    period = config.algorithm.get("period") if own is not None else None
    replaced = None if peers.merge_every is None else f"peers.merge_every = {peers.merge_every} takes its place"
    early = f"the run ends after {rounds} rounds" if every is not None and every > rounds else None
    is_last = every is not None and rounds % every == 0
    yield "algorithm.period", period, None, replaced or early
    yield "peers.merge_every", peers.merge_every, None, early
    yield "peers.final_merge", peers.final_merge, False, f"round {rounds} is a merge anyway" if is_last else None


def _of_engine(config: Config, engine_class: Any) -> Iterator[Rule]:
    """Yield rules on clusters and workers."""
    engine = config.engine
    by_ranks = "there is one process for each rank" if engine.name == "collective" else None
    yield "engine.workers", engine.workers, "auto", by_ranks
    local = by_ranks if by_ranks or engine_class.is_remote else f"engine {engine.name!r} runs on this machine alone"
    yield "engine.address", engine.address, None, local
    real = None if engine.name == "network" and (engine.address or engine.peers_file) else "nobody dials this machine"
    yield "engine.kit", engine.kit, None, real
    among = None if engine.name == "network" and config.peers is not None else "no peers dial each other"
    yield "engine.peer", engine.peer, None, among
    yield "engine.peers_file", engine.peers_file, None, among
    yield "engine.data", engine.data, None, among or ("no peer is given" if engine.peer is None else None)
    yield "evaluation.on_clients", config.evaluation.on_clients, True, real
    alone = "there is no worker to wait for" if engine.workers == 0 and local else None
    yield "engine.straggler_seconds", engine.straggler_seconds, None, None if by_ranks else alone


def _windowless(config: Config, algorithm: Any) -> Iterator[str]:
    """Say that an algorithm is about sub-models, but all models are whole."""
    traits, name = algorithm.traits, config.algorithm["name"]
    if traits.capacities == "given" and traits.strategy is not None and tuple(config.submodel.capacities) == (1.0,):
        yield (
            f"algorithm {name!r} is about sub-models, but all participants train the whole model: give capacities below"
            " 1 in submodel.capacities"
        )


def _without_participants(config: Config) -> Iterator[str]:
    """Name capacities and devices that nobody has, because participants are too few for their shares."""
    sub, devices, num = config.submodel, config.devices or [], config.population.num
    assert num is not None
    given: list[tuple[str, Sequence[str], Sequence[float]]] = []
    if sub.assignment == "fixed":
        names = [f"capacity {capacity:g}" for capacity in sub.capacities]
        given.append(("submodel.shares", names, sub.shares or [1.0] * len(names)))
    if devices and devices[0].capacity is None:
        profiles = [f"device {device.profile.name!r}" for device in devices]
        given.append(("devices.share", profiles, [1.0 if device.share is None else device.share for device in devices]))
    for where, holders, shares in given:
        for name, share, count in zip(holders, shares, apportion(shares, num), strict=True):
            if share > 0 and count == 0:
                yield f"{name} is that of nobody, because there are {num} participants only: raise its share in {where}"
