"""A table and a figure of rounds of other sizes, extrapolated from a recorded run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigError
from gossamer.profiling.deployment import Deployment, Devices, Ints, Network, devices_of
from gossamer.profiling.exports import rounds_of
from gossamer.profiling.scale import Scaled, extrapolate, jobs_of
from gossamer.profiling.trace import Trace
from gossamer.reports.images import save
from gossamer.reports.profile import MAX_ROUNDS, as_time
from gossamer.simulation.devices import DeviceProfile
from gossamer.simulation.traffic import Traffic
from gossamer.storage.runlog import read_config, read_metrics
from gossamer.storage.tables import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PARTICIPANTS = 1_000_000
MIN_SHARE = 0.005  # of a round, of what a table names


def parse_sizes(text: str) -> list[int]:
    """Return the numbers in a list such as ``100,1000``.

    Raises:
        ConfigError: it is none, or one is out of range.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > MAX_PARTICIPANTS:
        raise ConfigError(f"--scale {text}: give numbers from 1 to {MAX_PARTICIPANTS:,}, such as 100,1000")
    return sizes


def scale(directory: Path, trace: Trace, sizes: Sequence[int], workers: int | None = None) -> list[Scaled]:
    """Extrapolate a recorded run to other numbers of participants.

    Args:
        workers: that train; None: as many as were recorded.

    Raises:
        ConfigError: it is not a federation's.
        DataError: no worker trained in it.
    """
    clients = read_config(directory).get("clients")
    if clients is None:
        raise ConfigError("--scale is for runs with clients, and this one has peers: leave it out")
    jobs = jobs_of(rounds_of(trace, MAX_ROUNDS))
    return [extrapolate(jobs, clients["per_round"], size, workers or jobs.workers) for size in sizes]


def deploy(directory: Path, trace: Trace, sizes: Sequence[int], links: Path) -> list[Scaled]:
    """Extrapolate a recorded run to other numbers of participants, each with a machine of its own.

    Devices are those of the configuration, if it names some; else such as the machine of the record.

    Args:
        links: GraphML of a network, see `Network.of`.

    Raises:
        ConfigError: the network, or the topology, cannot be that of such a run.
        DataError: no worker trained in the run.
    """
    network, config, rounds = _network(links), read_config(directory), rounds_of(trace, MAX_ROUNDS)
    jobs, last = jobs_of(rounds), read_metrics(directory)[-1]
    recorded = (config["clients"] or {}).get("per_round") or config["peers"]["num"]
    each, done = jobs.per_round / recorded, last["round"]
    rate = last["total_client_flops"] / done / (sum(jobs.seconds) / len(rounds))
    up, down = (last[f"total_bytes_{way}"] / done / recorded for way in ("up", "down"))
    rest, handling = jobs.rest, jobs.handling * each
    if config["peers"] is not None:
        up /= len(_messages(config, recorded)[0]) / recorded
        mixing = sum(one.seconds for each in rounds for own in each.lanes.values() for one in own if one.kind == "mix")
        rest, handling = [0.0], mixing / len(rounds) / recorded
    seconds = [one * each for one in jobs.seconds]
    made = Deployment(network, _devices(config, rate), seconds, handling, rest, up, down)
    return [made.scaled(size, _messages(config, size) if config["peers"] is not None else None) for size in sizes]


def _network(path: Path) -> Network:
    from gossamer.topology.files import FileOptions, read_graph

    try:
        return Network.of(read_graph(path, FileOptions(path=path)))
    except ConfigError as error:
        raise ConfigError(f"--links {path}: {error}") from None


def _devices(config: Mapping[str, Any], host_flops_per_second: float) -> Devices:
    """Return the devices that a configuration names, or such as the machine of the record."""
    found = config["devices"] or [{"profile": config["device"], "share": None}]
    if not config["devices"] and DeviceProfile.model_validate(config["device"]) == DeviceProfile():
        return Devices.of_host()
    kinds = [{**one["profile"], "share": 1.0 if one["share"] is None else one["share"]} for one in found]
    return devices_of(kinds, host_flops_per_second)


def _messages(config: Mapping[str, Any], num_peers: int) -> tuple[Ints, Ints]:
    """Return senders and receivers of the messages of a round of so many peers, as the run's topology has them.

    Raises:
        ConfigError: it is one of another number of peers, or everybody sends to everybody.
    """
    from gossamer import topology as topologies

    parameters = {key: value for key, value in config["peers"]["topology"].items() if key != "name"}
    name = config["peers"]["topology"]["name"]
    found = topologies.find(name, {**parameters, "n": num_peers} if "n" in parameters else parameters,
                            default_n=num_peers, default_seed=config["seed"])  # fmt: skip
    links = Traffic.of(found.mixing(0)).links if found.n == num_peers else None
    if links is None:
        what = f"has {found.n} peers" if found.n != num_peers else f"has all of {num_peers} peers send to all others"
        raise ConfigError(f"--scale {num_peers}: topology {name!r} {what}: record a run on a family of any size")
    return links.sender, links.receiver


def render(found: Sequence[Scaled], as_json: bool = False) -> str:
    """Return a table, or JSON."""
    if as_json:
        return json.dumps([asdict(one) | {"seconds": one.seconds._asdict()} for one in found], indent=2)
    is_deployed = bool(found) and found[0].workers is None
    rows = [("participants", "workers", "round", "90 % of rounds", "bottleneck", "without" if is_deployed else "busy")]
    for one in found:
        interval = f"{as_time(one.seconds.lo)} to {as_time(one.seconds.hi)}"
        sign = "-" if is_deployed else ""
        busy = ", ".join(f"{name} {sign}{share:.0%}" for name, share in one.shares.items() if share >= MIN_SHARE)
        size = f"{one.participants:,}", "its own" if one.workers is None else str(one.workers)
        rows.append((*size, as_time(one.seconds.mean), interval, one.bottleneck, busy))
    return f"Extrapolated; nothing of this size ran.\n\n{aligned(rows)}"


def draw(found: Sequence[Scaled], output: Path) -> Path:
    """Draw the length of a round against the number of participants, with the names of bottlenecks."""

    def figure() -> Figure:
        """Draw."""
        from matplotlib import figure as figures

        made = figures.Figure(figsize=(5.5, 3.6), layout="constrained")
        panel, ordered = made.subplots(), sorted(found, key=lambda one: one.participants)
        sizes = [one.participants for one in ordered]
        panel.plot(sizes, [one.seconds.mean for one in ordered], marker="o", markersize=4)
        panel.fill_between(sizes, [one.seconds.lo for one in ordered], [one.seconds.hi for one in ordered], alpha=0.2)
        for one in ordered:
            place = one.participants, one.seconds.mean
            panel.annotate(one.bottleneck, place, (4, -12), textcoords="offset points", fontsize=8)
        panel.set(xscale="log", yscale="log", xlabel="Participants a round", ylabel="Seconds a round, extrapolated")
        panel.margins(0.15)
        panel.grid(True)
        return made

    return save(figure, output)
