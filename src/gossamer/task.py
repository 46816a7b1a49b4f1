"""A task from a resolved configuration: all that an actor, a rank or a node needs to train, without plans and costs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from gossamer.algorithms.base import Algorithm
from gossamer.config.communication import make_communication
from gossamer.config.loading import parse
from gossamer.config.personal import personal_parameters
from gossamer.config.resolve import build_topology, make_algorithm, split
from gossamer.config.schema import Config
from gossamer.engines.local_steps import LocalSteps, capacity_rates, require_matches, torch_dtype
from gossamer.engines.task import Task, Variant, VariantMode
from gossamer.errors import ConfigError, plugin_errors
from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import find_strategy
from gossamer.topology import Topology
from gossamer.workloads.base import Workload, find_workload, require_workload
from gossamer.workloads.held import HeldWorkload
from gossamer.workloads.holdings import Holding
from gossamer.workloads.samples import reading_later


def task_of(config: Mapping[str, Any], data: Any = None) -> Task:
    """Rebuild the task of a resolved configuration elsewhere.

    Args:
        config: resolved configuration, as JSON.
        data: data of an equal workload of another process, see `Workload`; None: it is loaded.

    Raises:
        GossamerError: a plug-in or the data is missing here.
    """
    parsed = parse(config)
    return make_task(parsed, make_algorithm(parsed), build_topology(parsed), workload_of(parsed, data))


def make_task(config: Config, algorithm: Algorithm, topology: Topology | None, workload: Workload) -> Task:
    """Assemble a task and bind its variants, in the modes that the configuration pins.

    Raises:
        GossamerError: the strategy is unknown or lacks something, an offset's axis is not the model's, or the modes
            are not those of the capacities.
    """
    sub, train = config.submodel, config.train
    assert sub.scaler is not None
    algorithm = algorithm.of_model(workload.layout).of_workload(workload)
    cutter = make_cutter(config, algorithm, workload.layout)
    capacities, communication = sorted(sub.capacities), make_communication(config.communication)
    rates = capacity_rates(train.lr_by_capacity, capacities)
    require_matches(train.groups, workload.layout, workload.holdings)
    steps = LocalSteps(
        clip_norm=train.clip_norm,
        lr=train.lr,
        groups=tuple(train.groups),
        part_size=train.batch_size if train.accumulate > 1 else None,
        precision=train.precision,
        schedule=train.local_schedule,
    )
    personal = frozenset(personal_parameters(config, algorithm, workload))
    steps_of = {capacity: replace(steps, capacity_lr=rates.get(capacity)) for capacity in capacities}
    held = [(capacity, holding) for capacity in capacities for holding in workload.holdings or (None,)]
    bound = (
        Variant.bind(index, capacity, algorithm, cutter, steps_of[capacity], mode, communication, personal, holding)
        for index, ((capacity, holding), mode) in enumerate(zip(held, pinned_modes(config, held), strict=True))
    )
    return Task(
        workload=workload,
        algorithm=algorithm,
        cutter=cutter,
        variants=tuple(bound),
        batch_size=min(train.step_size, int(workload.num_samples.max())),  # what is beyond would be padding alone
        seed=config.seed,
        scaler=sub.scaler,
        count_labels=bool(sub.mask_labels) and workload.num_labels > 0,
        topology=topology,
        max_update_norm_ratio=config.aggregation.max_update_norm_ratio,
        communication=communication,
        personal=personal,
    )


def held_variants(task: Task) -> dict[str, int]:
    """Return ``{modules and capacity: number}`` of what kinds of participants hold, such as ``"video+text 0.5"``."""
    named = ((one.holding, one.capacity, one.index) for one in task.variants)
    return {f"{holding.name} {capacity:g}": index for holding, capacity, index in named if holding is not None}


def make_cutter(config: Config, algorithm: Algorithm, layout: Layout) -> Cutter:
    """Return what cuts sub-models, as a resolved configuration says.

    Raises:
        GossamerError: the strategy is unknown or lacks something, or an offset's axis is not the model's.
    """
    sub = config.submodel
    assert sub.strategy is not None
    strategy, whole = find_strategy(sub.strategy), algorithm.traits.full_size
    return Cutter(layout, strategy, sub.stride, config.seed, sub.offsets, full_size=whole)


def pinned_modes(config: Config, held: Sequence[tuple[float, Holding | None]]) -> list[VariantMode]:
    """Return the mode of each variant that the configuration pins; where it pins none, the default ones.

    Args:
        held: capacity and modules of each variant.

    Raises:
        ConfigError: it names other capacities or modules.
    """
    given = config.engine.modes
    if isinstance(given, str):
        return on_device([VariantMode()] * len(held), config.engine.device)
    if isinstance(given, VariantMode):
        return on_device([given] * len(held), config.engine.device)
    wanted = [(capacity, None if holding is None else holding.name) for capacity, holding in held]
    found = {(mode.capacity, mode.holding): mode for mode in given}
    if len(given) != len(found) or set(found) != set(wanted):
        names, run = (sorted({capacity for capacity, _ in pairs}) for pairs in (found, wanted))
        each = "" if all(holding is None for _, holding in wanted) else ", each with all of its holdings"
        raise ConfigError(
            f"engine.modes names capacities {names} but the run has {run}{each}: name each once, or set engine.modes to"
            " auto"
        )
    modes = [VariantMode(**found[one].model_dump(exclude={"capacity", "holding"})) for one in wanted]
    return on_device(modes, config.engine.device)


def on_device(modes: Iterable[VariantMode], device: str | None) -> list[VariantMode]:
    """Return modes with a device in the place of theirs; None: as they are."""
    return list(modes) if device is None else [mode.model_copy(update={"device": device}) for mode in modes]


def workload_of(config: Config, data: Any = None) -> Workload:
    """Make the workload of a resolved configuration: that of a peer's own data where it has some.

    Args:
        data: see `task_of`.

    Raises:
        GossamerError: see `load_workload`, `held_workload`.
    """
    engine = config.engine
    if engine.data is None or engine.peer is None:
        return load_workload(config, data)
    return held_workload(config, engine.peer, engine.data)


def load_workload(config: Config, data: Any = None, stands_for: tuple[int, int] | None = None) -> Workload:
    """Make the workload, with `data` that were loaded elsewhere, see `task_of`.

    Args:
        stands_for: number of a participant that has data of its own, and of all participants: where they hold
            different modules, its one client holds those of that number.

    Raises:
        GossamerError: its options are wrong, its data missing or malformed, or one of its plug-ins fails.
    """
    # Of peers on ranks, each rank has the samples of its own, see `Workload.hold`.
    is_shared_out = config.engine.name == "collective" and config.peers is not None
    loading = reading_later() if is_shared_out else nullcontext(list[Any]())
    (name, options), partition = split(config.workload), config.population.partition
    make = find_workload(name)
    given: dict[str, Any] = {} if data is None else {"data": data}
    if "whole_models" in inspect.signature(make).parameters:
        given["whole_models"] = tuple(config.submodel.capacities) == (1.0,) and not config.submodel.mask_labels
    if stands_for is not None and "stands_for" in inspect.signature(make).parameters:
        given["stands_for"] = stands_for
    precision = config.train.precision
    if precision == "float64" and "dtype" in inspect.signature(make).parameters:
        given["dtype"] = torch_dtype(precision)
    with plugin_errors(f"workload {config.workload} on partition {partition['name']!r}"), loading as passes:
        workload = make(options, num_clients=config.population.num, partition=partition, seed=config.seed, **given)
    require_workload(f"workload {name!r}", workload)
    if is_shared_out:
        workload.passes = tuple(passes)
    return workload


def held_task_of(config: Mapping[str, Any], client: int, dataset: Any) -> Task:
    """Rebuild the task of a resolved configuration at a client that has data of its own.

    Args:
        config: resolved configuration, as JSON.
        client: number of the client.
        dataset: name, or name and options, of its data set, which takes the place of the configuration's.

    Raises:
        GossamerError: the data is missing or does not suit the workload.
    """
    parsed = parse(config)
    if parsed.clients is None:
        raise ConfigError("the run has peers and no server: take gossamer node peer")
    return make_task(parsed, make_algorithm(parsed), None, held_workload(parsed, client, dataset))


def held_workload(config: Config, number: int, dataset: Any) -> Workload:
    """Make the workload of a participant that has data of its own.

    Args:
        config: resolved.
        number: of the client, or of the peer.
        dataset: see `held_task_of`.

    Raises:
        GossamerError: there is no such participant, or the data is missing or does not suit the workload.
    """
    kind, num = "peer" if config.clients is None else "client", config.population.num
    assert num is not None
    if not 0 <= number < num:
        raise ConfigError(f"there is no {kind} {number} in this run: give a number below {num}")
    alone = config.population.model_copy(update={"num": 1, "partition": {"name": "in-order"}})
    own = config.model_copy(update={f"{kind}s": alone, "workload": {**config.workload, "dataset": dataset}})
    held: Any = HeldWorkload(load_workload(own, stands_for=(number, num)), num)
    return held  # type: ignore[no-any-return]
