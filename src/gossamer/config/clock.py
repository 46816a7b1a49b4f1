"""Whose clock tells which clients are late: a simulated one, or that of real machines."""

from __future__ import annotations

from gossamer.config.schema import Config
from gossamer.engines.base import WallClock


def goes_by_the_clock(config: Config) -> bool:
    """Say whether the real clock tells who is late, now or in the run that is replayed, and not simulated time."""
    return wall_clock(config) is not None or config.replay is not None


def wall_clock(config: Config) -> WallClock | None:
    """Return when a phase goes on without real clients; None: clients are simulated.

    Real clients are those that dial an address of engine network. ``clients.deadline_seconds`` and
    ``clients.over_selection`` are then by the real clock.
    """
    clients, engine = config.clients, config.engine
    if clients is None or engine.name != "network" or engine.address is None:
        return None
    return WallClock(clients.deadline_seconds, clients.per_round if clients.over_selection > 1 else None)
