"""Who was away in a run of real participants, so that a simulation can leave out the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gossamer.engines.base import BY_THE_CLOCK, Absent, AbsentNeighbours
from gossamer.errors import ConfigError
from gossamer.storage.runlog import read_events

When = tuple[int, int]


def absences(directory: Path, num_clients: int) -> Absent:
    """Return who was dropped in which phase of a run, and why, by its log.

    Raises:
        ConfigError: the directory holds no run, or one of other clients.
        DataError: its log is damaged.
    """
    found: dict[When, dict[int, str]] = {}
    for event in read_events(directory):
        if event["kind"] == "update-dropped" and event["reason"] in BY_THE_CLOCK:
            if not 0 <= event["client"] < num_clients:
                raise ConfigError(
                    f"replay {str(directory)!r} is a run of other clients, among them {event['client']}: give a run of"
                    " the same experiment"
                )
            found.setdefault(_when(event), {})[event["client"]] = event["reason"]

    def absent(round: int, phase: int) -> Mapping[int, str]:
        """Return who was dropped in a phase, and why."""
        return found.get((round, phase), {})

    return absent


def absent_neighbours(runs: Mapping[int, Path]) -> AbsentNeighbours:
    """Return whose rows peers did not get, and whose states they took up, by their logs.

    Args:
        runs: run directory of each peer.

    Raises:
        DataError: a log is damaged.
    """
    missing: dict[When, dict[int, Sequence[int]]] = {}
    taken: dict[When, dict[int, int]] = {}
    for peer, directory in runs.items():
        for event in read_events(directory):
            if event["kind"] == "neighbours-absent":
                missing.setdefault(_when(event), {})[peer] = event["peers"]
            elif event["kind"] == "state-lost" and "taken_from" in event:
                taken.setdefault((event["taken_round"] - 1, event["taken_phase"] - 1), {})[peer] = event["taken_from"]
    return AbsentNeighbours(missing, taken)


def _when(event: Mapping[str, int]) -> When:
    """Return the round and phase of an event, counted from 0."""
    return event["round"] - 1, event.get("phase", 1) - 1
