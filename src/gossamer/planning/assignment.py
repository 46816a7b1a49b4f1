"""Which capacity and which device every participant has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gossamer import rng
from gossamer.simulation.devices import Devices, DeviceShare, uniform_draws


def apportion(shares: Sequence[float], count: int) -> NDArray[np.int64]:
    """Split `count` clients in proportion to `shares` by largest remainders; int64, sums to `count`."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * count
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    for index in np.argsort(whole - exact, kind="stable")[: count - int(whole.sum())]:
        whole[index] += 1
    return whole


class Capacities:
    """The capacity level of every client: fixed once, or drawn in every round.

    Attributes:
        levels: the levels.
        shares: share of the clients at each level; they add up to 1.
        is_fixed: whether a client's level never changes.
    """

    def __init__(
        self,
        levels: Sequence[float],
        shares: Sequence[float],
        assignment: str,
        num_clients: int,
        seed: int,
        purpose: str = "assign-capacities",
    ) -> None:
        """Assign levels.

        Args:
            shares: relative number of clients at each level.
            assignment: "fixed" (largest remainders, shuffled) or "dynamic".
            purpose: of the shuffle; two assignments with the same one and the same shares agree.
        """
        self.levels, self.shares, self._seed = tuple(levels), np.asarray(shares) / np.sum(shares), seed
        self.is_fixed = assignment == "fixed"
        self._fixed = np.empty(num_clients, dtype=np.int16)
        if self.is_fixed:
            variants = np.repeat(np.arange(len(levels), dtype=np.int16), apportion(shares, num_clients))
            self._fixed[rng.generator(seed, purpose).permutation(num_clients)] = variants

    def variants(self, clients: NDArray[np.int64], round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the index into `levels` of each client in a round."""
        if self.is_fixed:
            return self._fixed[clients]
        drawn = uniform_draws(self._seed, "draw-capacity", round, clients)
        return np.searchsorted(np.cumsum(self.shares)[:-1], drawn, side="right").astype(np.int16)


def assign_devices(entries: Sequence[DeviceShare], assignment: str, num_clients: int, seed: int) -> Devices:
    """Give every client a device: by shares, or as capacities are assigned where the entries name them.

    Args:
        entries: those with capacities have the shares of these, see `config.resolve.fill_in`.
        assignment: how capacities are assigned, "fixed" or "dynamic".
    """
    if entries[0].capacity is not None:
        entries = sorted(entries, key=lambda entry: entry.capacity or 0.0)
        levels, purpose = [entry.capacity or 0.0 for entry in entries], "assign-capacities"
    else:
        levels, purpose, assignment = [float(index) for index in range(len(entries))], "assign-devices", "fixed"
    shares = [1.0 if entry.share is None else entry.share for entry in entries]
    profiles = [entry.profile for entry in entries]
    if len(profiles) == 1:
        return Devices(profiles, None, num_clients, seed)
    return Devices(profiles, Capacities(levels, shares, assignment, num_clients, seed, purpose), num_clients, seed)


def devices_of_capacities(devices: Devices, capacities: Capacities, num_clients: int) -> list[tuple[int, int]]:
    """Return the pairs (device, capacity), as indices, that some client may have."""
    everybody, assignment = np.arange(num_clients, dtype=np.int64), devices.assignment
    if capacities.is_fixed and (assignment is None or assignment.is_fixed):
        together = np.stack([devices.of(everybody, 0), capacities.variants(everybody, 0)], axis=1)
        return [(int(device), int(variant)) for device, variant in np.unique(together, axis=0)]
    if assignment is not None and assignment.levels == capacities.levels:  # drawn in every round, but together
        return [(level, level) for level in range(len(capacities.levels))]
    return [(device, level) for device in range(len(devices.profiles)) for level in range(len(capacities.levels))]
