"""Reads the traces of all nodes of a run as one: of a server and its clients, or of peers, with the observer if any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.engines.network.peer import FILES, OWN
from gossamer.engines.network.place import name_of
from gossamer.engines.network.state import NODES
from gossamer.errors import ConfigError, DataError
from gossamer.profiling.trace import Trace, read_trace
from gossamer.storage.runlog import CONFIG, TRACE, read_config


def read_nodes(directories: Sequence[Path]) -> Trace:
    """Read a run, or the runs of all peers of engine network; rounds are those of the observer, or of the first peer.

    Args:
        directories: one run, with those of the peers that it started; or one of each peer, and of an observer; or that
            of a server, and folders into which its clients recorded.

    Raises:
        ConfigError: several are no runs of all peers of one experiment.
        DataError: there is no trace, it is damaged, or not all are of the same time.
    """
    first = directories[0]
    if folders := [one for one in directories if not (one / CONFIG).exists() and any(one.glob("*.jsonl"))]:
        servers = [one for one in directories if one not in folders]
        if len(servers) != 1:
            raise ConfigError(
                f"{str(folders[0])!r} is what a client recorded: give it with the run directory of its server"
            )
        first, others = servers[0], {one.name.replace(".", "_"): one for one in folders}
        if len(others) < len(folders):
            raise ConfigError("two folders of clients have one name: rename one of them, since lanes are called so")
        if known := [one for one in folders if one.resolve() == (first / TRACE).resolve()]:
            raise ConfigError(f"{str(known[0])!r} is that of {str(first)!r}, which is read with it: leave it out")
        trace = read_trace(first, others)
    elif len(directories) > 1:
        nodes = _by_number(directories)
        first = nodes.pop(None, first)
        own = next((number for number, one in nodes.items() if one == first), None)
        others = {name_of(number): one / TRACE for number, one in nodes.items() if one != first}
        trace = read_trace(first, others, name_of(own))
    else:
        others = {one.name: one / TRACE for one in sorted((first / NODES).glob("peer-*")) if (one / TRACE).is_dir()}
        trace = read_trace(first, others, name_of(None)) if others else read_trace(first)
    seen = {lane.name for one in trace.rounds for lane in one.lanes}
    for name, one in others.items():
        if name not in seen:
            raise DataError(
                f"nothing that {str(one)!r} recorded happened in a round of {str(first)!r}: give directories of one run"
            )
    return trace


def _by_number(directories: Sequence[Path]) -> dict[int | None, Path]:
    """Return directories by the number of the peer, None of the observer; all peers of one experiment.

    Raises:
        ConfigError: they are not.
    """
    found = dict[int | None, Path]()
    configs = [read_config(one) for one in directories]
    for directory, config in zip(directories, configs, strict=True):
        if config.get("peers") is None or config.get("engine", {}).get("name") != "network":
            raise ConfigError(f"{str(directory)!r} is no run of a peer of engine network: give one directory alone")
        if changed := _first_change(_shared(configs[0]), _shared(config)):
            raise ConfigError(
                f"{str(directories[0])!r} and {str(directory)!r} differ in {changed}: give directories of one run"
            )
        number = config["engine"]["peer"]
        if number in found:
            raise ConfigError(
                f"{str(found[number])!r} and {str(directory)!r} are both runs of {name_of(number)}: give one of them"
            )
        found[number] = directory
    num_peers = configs[0]["peers"]["num"] or 0
    if lacking := sorted(set(range(num_peers)) - found.keys()):
        raise ConfigError(f"no directory of {name_of(lacking[0])} is given: give those of all {num_peers} peers")
    return found


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what peers of a run have in common, as sections, or as keys of sections with files."""
    found = {key: value for key, value in config.items() if key not in (*OWN, *FILES, "profile")}
    for section, files in FILES.items():
        found |= {f"{section}.{key}": value for key, value in config[section].items() if key not in files}
    return found


def _first_change(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    return next((key for key in one.keys() | other.keys() if one.get(key) != other.get(key)), None)
