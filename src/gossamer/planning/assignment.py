"""Which capacity and which device every participant has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gossamer.simulation.devices import Devices, DeviceShare, uniform_draws
from gossamer.workloads.holdings import assigned


class Capacities:
    """The variant of every client: its capacity, fixed once or drawn in every round, and the modules that it holds.

    Attributes:
        levels: the capacities.
        shares: share of the clients at each level; they add up to 1.
        is_fixed: whether a client's level never changes.
        holding_shares: share of the clients with each set of modules; they add up to 1.
    """

    def __init__(
        self,
        levels: Sequence[float],
        shares: Sequence[float],
        assignment: str,
        num_clients: int,
        seed: int,
        purpose: str = "assign-capacities",
        holdings: NDArray[np.int16] | None = None,
        num_holdings: int = 1,
    ) -> None:
        """Assign levels.

        Args:
            shares: relative number of clients at each level.
            assignment: "fixed" (largest remainders, shuffled) or "dynamic".
            purpose: of the shuffle; two assignments with the same one and the same shares agree.
            holdings: int16 [num_clients], number of the modules of each client; None: all hold the same ones.
            num_holdings: how many such sets of modules there are.
        """
        self.levels, self.shares, self._seed = tuple(levels), np.asarray(shares) / np.sum(shares), seed
        self.is_fixed = assignment == "fixed"
        self._holdings = np.zeros(num_clients, dtype=np.int16) if holdings is None else holdings
        self._num_holdings = num_holdings
        self.holding_shares = np.bincount(self._holdings, minlength=num_holdings) / max(1, num_clients)
        if self.is_fixed:
            self._fixed = assigned(shares, num_clients, seed, purpose)

    def variants(self, clients: NDArray[np.int64], round: int) -> NDArray[np.int16]:
        """Return int16 [p]: the number of each client's variant in a round.

        Where all hold the same modules, it is the index into `levels`; else variants are sorted by capacity, then by
        the number of their modules.
        """
        if self.is_fixed:
            level = self._fixed[clients]
        else:
            drawn = uniform_draws(self._seed, "draw-capacity", round, clients)
            level = np.searchsorted(np.cumsum(self.shares)[:-1], drawn, side="right").astype(np.int16)
        return level if self._num_holdings == 1 else level * np.int16(self._num_holdings) + self._holdings[clients]

    @property
    def variant_shares(self) -> list[float]:
        """Share of the clients of each variant; they add up to 1."""
        return [float(level * share) for level in self.shares for share in self.holding_shares]

    @property
    def held(self) -> list[int]:
        """Numbers of the sets of modules that somebody holds."""
        numbers: list[int] = np.unique(self._holdings).tolist()
        return numbers

    def of_level(self, level: int) -> list[int]:
        """Return the numbers of the variants of a level that somebody may have."""
        return [level * self._num_holdings + number for number in self.held]


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
    """Return the pairs (device, variant), as indices, that some client may have."""
    everybody, assignment = np.arange(num_clients, dtype=np.int64), devices.assignment
    if capacities.is_fixed and (assignment is None or assignment.is_fixed):
        together = np.stack([devices.of(everybody, 0), capacities.variants(everybody, 0)], axis=1)
        return [(int(device), int(variant)) for device, variant in np.unique(together, axis=0)]
    if assignment is not None and assignment.levels == capacities.levels:  # drawn in every round, but together
        return [(level, variant) for level in range(len(capacities.levels)) for variant in capacities.of_level(level)]
    levels, num_devices = range(len(capacities.levels)), len(devices.profiles)
    return [(one, variant) for one in range(num_devices) for level in levels for variant in capacities.of_level(level)]
