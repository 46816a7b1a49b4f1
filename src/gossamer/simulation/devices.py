"""The devices of participants: speed, links, memory and availability, who has which, and who is available when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator

from gossamer import rng
from gossamer.errors import ConfigError, nearest
from gossamer.options import Options
from gossamer.storage.strict_yaml import read_yaml

RETRY_SECONDS = 60.0  # simulated; after which a server that found nobody asks anew
MAX_RETRIES = 10_000
REQUIRED = ("name", "source", "flops_per_second", "download_bytes_per_second", "upload_bytes_per_second")

Seconds = Annotated[float, Field(ge=0)]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Availability(Options):
    """When a device may be chosen, looked at once, when a round begins; ``"always"`` is the default of both.

    Attributes:
        probability: chance to be available in a round, drawn for every client and round.
        trace: [on, off] stretches in simulated seconds, repeated for ever; each client begins at a place of its own,
            drawn uniformly. None: always on. A device with both must be on and drawn.
    """

    probability: float = Field(default=1.0, gt=0, le=1)
    trace: list[tuple[Seconds, Seconds]] | None = None

    @field_validator("trace")
    @classmethod
    def _sometimes_on(cls, value: list[tuple[float, float]] | None) -> list[tuple[float, float]] | None:
        if value is not None and not sum(on for on, _ in value) > 0:
            raise ValueError("a device that is never on cannot take part: give one [on, off] stretch with on > 0")
        return value


def _always(value: Any) -> Any:
    return {} if value == "always" else value


class DeviceProfile(Options):
    """One kind of device; the defaults are assumptions, not measurements.

    Attributes:
        name, source: what it is called and where its numbers come from.
        flops_per_second: speed of training.
        download_bytes_per_second, upload_bytes_per_second: its link.
        latency_seconds: simulated time of a round that is neither transfer nor computation, such as round trips.
        memory_bytes: what training may use; None: enough for anything.
        availability: when it may be chosen.
    """

    name: str = "device"
    source: str = "assumed"
    flops_per_second: float = Field(default=1e10, gt=0)
    download_bytes_per_second: float = Field(default=2.5e6, gt=0)
    upload_bytes_per_second: float = Field(default=1.25e6, gt=0)
    latency_seconds: Seconds = 0.0
    memory_bytes: int | None = Field(default=None, gt=0)
    availability: Annotated[Availability, BeforeValidator(_always)] = Availability()


def profile_names() -> list[str]:
    """List the profiles that ship here."""
    folder = resources.files("gossamer.simulation") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_profile(name: str) -> dict[str, Any]:
    """Read a profile that ships here by its name, or any other by the path of its YAML file, without checking values.

    Raises:
        ConfigError: there is none, or it is no YAML mapping that gives at least `REQUIRED`.
    """
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    if not is_path and name not in (known := profile_names()):
        raise ConfigError(
            f"unknown device profile {name!r}{nearest(name, known)} (known: {', '.join(known)}; or give the path of a"
            " YAML file)"
        )
    path = Path(name) if is_path else resources.files("gossamer.simulation") / "profiles" / f"{name}.yaml"
    data = read_yaml(path, "device profile")
    missing = [key for key in REQUIRED if not isinstance(data, Mapping) or key not in data]
    if missing:
        raise ConfigError(f"device profile {name!r} lacks {', '.join(missing)}: add it to the file")
    return dict(data)


def complete_profile(value: Any) -> Any:
    """Read a profile by its name or path; a mapping that names a shipped profile changes only what it gives."""
    if isinstance(value, str):
        return read_profile(value)
    if isinstance(value, Mapping) and value.get("name") in profile_names():
        return read_profile(value["name"]) | dict(value)
    return value


Profile = Annotated[DeviceProfile, BeforeValidator(complete_profile)]


class DeviceShare(Options):
    """A profile and who has it.

    Attributes:
        profile: the name of a shipped profile, the path of a YAML file, or a profile's own keys.
        share: relative number of the clients that have it; None: 1, or that of the capacity.
        capacity: the capacity whose clients have it; None: devices do not depend on capacity.
    """

    profile: Profile
    share: float | None = Field(default=None, ge=0)
    capacity: float | None = None


def check_devices(entries: Sequence[DeviceShare]) -> None:
    """Check a list of devices as a whole.

    Raises:
        ValueError: it is empty, mixes shares with capacities, or names a capacity twice.
    """
    capacities = [entry.capacity for entry in entries if entry.capacity is not None]
    if not entries or len(capacities) not in (0, len(entries)):
        raise ValueError("give at least one device, and a capacity for each of them or for none")
    if len(set(capacities)) < len(capacities):
        raise ValueError(f"devices name capacities {capacities}: name every capacity once")
    if sum(1.0 if entry.share is None else entry.share for entry in entries) <= 0:
        raise ValueError("devices have share 0, all of them: give one a larger share")


class Assignment(Protocol):
    """Says which of several levels each client has, as `planning.Capacities` does.

    Attributes:
        levels: the levels.
        is_fixed: whether a client's level never changes.
    """

    levels: tuple[float, ...]
    is_fixed: bool

    def variants(self, clients: Ints, round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the level of each client in a round."""
        ...


class Devices:
    """Every client's device, and who is available."""

    def __init__(
        self, profiles: Sequence[DeviceProfile], assignment: Assignment | None, num_clients: int, seed: int
    ) -> None:
        """Bind profiles to clients.

        Args:
            assignment: which of `profiles` each client has; None: all have the first.
            num_clients: registered clients.
            seed: of availability.
        """
        self.profiles, self.assignment, self._seed = tuple(profiles), assignment, seed
        self._clients = np.arange(num_clients, dtype=np.int64)
        self._probability = np.array([profile.availability.probability for profile in profiles])
        self._always = all(profile.availability == Availability() for profile in profiles)
        self._shift = uniform_draws(seed, "device-phase", 0, self._clients)

    def of(self, clients: Ints, round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the index into `profiles` of each client's device in a round."""
        if self.assignment is None:
            return np.zeros(len(clients), dtype=np.int16)
        return self.assignment.variants(clients, round)

    def available(self, round: int, now: float) -> tuple[float, Ints]:
        """Return when a round begins and who is available then.

        If nobody is, simulated time advances: to where a trace next switches a device on, or by `RETRY_SECONDS`, after
        which availability is drawn anew, whichever comes first.

        Args:
            now: simulated seconds so far.

        Returns:
            simulated seconds >= `now`, and int64 [m >= 1], clients, ascending.

        Raises:
            ConfigError: nobody was available, however often the server asked.
        """
        if self._always:
            return now, self._clients
        device, time = self.of(self._clients, round), now
        for attempt in range(MAX_RETRIES):
            wait = self._seconds_until_on(device, time)
            drawn = uniform_draws(self._seed, "availability", round, self._clients, attempt) < self._probability[device]
            ready = (wait == 0) & drawn
            if ready.any():
                return time, self._clients[ready]
            step = min(np.min(wait[wait > 0], initial=np.inf), RETRY_SECONDS if (wait == 0).any() else np.inf)
            time = math.nextafter(time + step, math.inf)  # past the edge, however it was rounded
        raise ConfigError(
            f"round {round + 1}: nobody was available from second {now:g} to {time:g} of simulated time: raise"
            " availability.probability of the devices, or clients.num"
        )

    def _seconds_until_on(self, device: NDArray[np.int16], now: float) -> Floats:
        wait = np.zeros(len(self._clients))
        for index, profile in enumerate(self.profiles):
            if profile.availability.trace is not None:
                rows = device == index
                stretches = np.array(profile.availability.trace)
                wait[rows] = seconds_until_on(stretches, now + self._shift[rows] * stretches.sum())
        return wait


def seconds_until_on(stretches: Floats, at: Floats) -> Floats:
    """Return how long a cyclic trace stays off.

    Args:
        stretches: float64 [k, 2], [on, off] seconds, repeated for ever from time 0.
        at: float64 [s], times >= 0.

    Returns:
        float64 [s], seconds until the device is on; 0 where it is.
    """
    edges = np.concatenate([[0.0], np.cumsum(stretches)])
    starts = edges[:-1:2][stretches[:, 0] > 0]
    place = np.mod(at, edges[-1])
    is_on = (np.searchsorted(edges, place, side="right") - 1) % 2 == 0
    following = np.append(starts, edges[-1] + starts[0])[np.searchsorted(starts, place, side="right")]
    return np.where(is_on, 0.0, following - place)


def uniform_draws(seed: int, purpose: str, round: int, clients: Ints, extra: int = 0) -> Floats:
    """Draw one number in [0, 1) for each client; float64 [p]."""
    return rng.uniforms(seed, purpose, round, 0, clients, 1, extra)[:, 0]
