"""Who was dropped by the clock in a run of real clients, so that a simulation can drop the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gossamer.engines.base import BY_THE_CLOCK, Absent
from gossamer.errors import ConfigError
from gossamer.storage.runlog import read_events


def absences(directory: Path, num_clients: int) -> Absent:
    """Return who was dropped in which phase of a run, and why, by its log.

    Raises:
        ConfigError: the directory holds no run, or one of other clients.
        DataError: its log is damaged.
    """
    found: dict[tuple[int, int], dict[int, str]] = {}
    for event in read_events(directory):
        if event["kind"] == "update-dropped" and event["reason"] in BY_THE_CLOCK:
            if not 0 <= event["client"] < num_clients:
                raise ConfigError(
                    f"replay {str(directory)!r} is a run of other clients, among them {event['client']}: give a run of"
                    " the same experiment"
                )
            found.setdefault((event["round"] - 1, event.get("phase", 1) - 1), {})[event["client"]] = event["reason"]

    def absent(round: int, phase: int) -> Mapping[int, str]:
        """Return who was dropped in a phase, and why."""
        return found.get((round, phase), {})

    return absent
