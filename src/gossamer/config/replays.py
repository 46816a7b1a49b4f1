"""A simulation that leaves out whoever was away in a run of real participants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.config.inputs import require_replayed
from gossamer.config.schema import Config
from gossamer.engines.base import EngineHooks
from gossamer.errors import ConfigError
from gossamer.planning.absences import absences, absent_neighbours
from gossamer.storage.runlog import read_config, run_directories


def replaying(config: Config, inputs: Mapping[str, Any], num_participants: int, hooks: EngineHooks) -> EngineHooks:
    """Return hooks that tell an engine who was away in the run that a configuration replays.

    Args:
        config: resolved; without an entry ``replay`` the hooks are returned as they are.
        inputs: of the simulation, see `require_replayed`.
        num_participants: of clients or peers.

    Raises:
        ConfigError: it is no run of the same experiment, or not all of it.
        GossamerError: a log or a commit is damaged.
    """
    if config.replay is None:
        return hooks
    directory = Path(config.replay)
    if config.peers is None:
        require_replayed(directory, inputs)
        return replace(hooks, absent=absences(directory, num_participants))
    if config.engine.name != "local":
        raise ConfigError(
            f"replay: engine {config.engine.name!r} cannot leave out neighbours of single peers: choose engine local"
        )
    runs = _runs_of_peers(directory)
    if lacking := sorted(set(range(num_participants)) - runs.keys()):
        raise ConfigError(
            f"replay {str(directory)!r} holds no run directory of peer {lacking[0]}: collect those of all"
            f" {num_participants} peers in one folder"
        )
    for run in runs.values():
        require_replayed(run, inputs)
    return replace(hooks, neighbours=absent_neighbours(runs))


def _runs_of_peers(directory: Path) -> dict[int, Path]:
    """Return the run directories below a folder, by the number of the peer; a peer's own directory is one, too."""
    if not directory.is_dir():
        raise ConfigError(f"replay {str(directory)!r} is no folder: give the one that holds the peers' run directories")
    below = [run for child in sorted(directory.iterdir()) if child.is_dir() for run in run_directories(child)]
    found = dict[int, Path]()
    for run in below:
        engine = read_config(run)["engine"]
        peer = engine.get("peer")
        if engine.get("data") is not None:
            raise ConfigError(
                f"replay {str(directory)!r} holds the run of peer {peer}, which had data of its own: a simulation has"
                " only those of the experiment's file"
            )
        if peer in found:
            raise ConfigError(
                f"replay {str(directory)!r} holds two runs of peer {peer}, {found[peer].name!r} and {run.name!r}: keep"
                " those of one run of the experiment"
            )
        if peer is not None:
            found[peer] = run
    return found
