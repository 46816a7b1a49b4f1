"""The parts of a task, rebuilt from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer import topology
from gossamer.algorithms.base import Algorithm
from gossamer.config.loading import parse
from gossamer.config.resolve import split
from gossamer.config.rules import is_topology_file
from gossamer.config.schema import Config
from gossamer.engines.task import Task
from gossamer.errors import plugin_errors, require_attributes
from gossamer.registry import resolve
from gossamer.submodel import Cutter
from gossamer.topology import Topology
from gossamer.workloads.base import Workload

ALGORITHM = ("uplink", "downlink", "client_arrays", "init", "begin", "step", "end", "update")


STRATEGY = ("choose", "rank")


WORKLOAD = ("layout", "num_samples", "init", "batch", "loss", "evaluate", "metrics")


def make_cutter(config: Config, algorithm: Algorithm, workload: Workload) -> Cutter:
    """Return what cuts sub-models.

    Raises:
        GossamerError: the strategy is unknown or lacks something, or an offset's axis is not the model's.
    """
    sub = config.submodel
    assert sub.strategy is not None
    strategy = resolve("strategy", sub.strategy)
    require_attributes(f"submodel.strategy {sub.strategy!r}", strategy, STRATEGY)
    whole = getattr(algorithm, "full_size", False)
    return Cutter(workload.layout, strategy, sub.stride, config.seed, sub.offsets, full_size=whole)


def task_of(config: Mapping[str, Any], data: Any = None) -> Task:
    """Rebuild the task of a resolved configuration elsewhere, with data that need not be loaded again, see `build`."""
    from gossamer.build import build

    return build(parse(config), data).task


def load_workload(config: Config, data: Any = None) -> Workload:
    """Make the workload, with `data` that were loaded elsewhere, see `build`.

    Raises:
        GossamerError: its options are wrong, its data missing or malformed, or one of its plug-ins fails.
    """
    (name, options), partition = split(config.workload), config.population.partition
    loaded = {} if data is None else {"data": data}
    with plugin_errors(f"workload {config.workload} on partition {partition['name']!r}"):
        workload: Workload = resolve("workload", name)(
            options, num_clients=num_participants(config), partition=partition, seed=config.seed, **loaded
        )
    require_attributes(f"workload {name!r}", workload, WORKLOAD)
    return workload


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with its topology's files named from the root, so that it can be resumed anywhere."""
    if config.peers is None:
        return config
    given = dict(config.peers.topology)
    if is_topology_file(given["name"]):
        given["name"] = str(Path(given["name"]).absolute())
    if isinstance(given.get("path"), str):
        given["path"] = str(Path(given["path"]).absolute())
    return config.model_copy(update={"peers": config.peers.model_copy(update={"topology": given})})


def build_topology(config: Config) -> Topology | None:
    """Build the peers' topology, from a name and parameters or from a YAML file; None where there is a server.

    Raises:
        ConfigError: see `topology.build`.
    """
    if config.peers is None:
        return None
    name, parameters = split(config.peers.topology)
    if is_topology_file(name):
        return topology.load(name, n=config.peers.num, seed=config.seed, **parameters)
    return topology.build(name, n=config.peers.num, seed=config.seed, **parameters)


def num_participants(config: Config) -> int:
    """Return the number of registered clients, or of peers."""
    num = config.population.num
    assert num is not None
    return num
