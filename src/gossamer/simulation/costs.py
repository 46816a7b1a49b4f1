"""What participants cost, and the simulated time that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError
from gossamer.round_record import RoundCosts
from gossamer.simulation.devices import Devices, Floats, Ints


@dataclass(frozen=True)
class VariantCosts:
    """What one participant of a capacity costs.

    Attributes:
        capacity: the capacity.
        num_parameters: number of parameters of its sub-model.
        bytes_up, bytes_down: bytes that it sends and receives in a round.
        flops_per_sample: operations of one training sample, forward and backward.
        memory_bytes: memory of training: parameters, constants beside them, gradients, what else the algorithm carries
            from step to step (such as momentum), and what a batch saves for the backward pass, its own samples
            included. What a client received becomes the parameters; a peer stores and receives whole models, see
            `counting.memory_bytes`.
        uncounted: names of the operations that `flops_per_sample` leaves out, because no formula is known.
        holding: name of the modules that it holds; None: all.
        flops_per_round: operations that do not depend on the number of samples.
    """

    capacity: float
    num_parameters: int
    bytes_up: int
    bytes_down: int
    flops_per_sample: float
    memory_bytes: int
    uncounted: tuple[str, ...] = ()
    holding: str | None = None
    flops_per_round: float = 0.0


class Efforts(NamedTuple):
    """What each of p participants has to do in a round, and how long its device takes: float64 [p] each.

    Attributes:
        num_uncounted: operations that `flops` leaves out, because no formula is known.
    """

    bytes_up: Floats
    bytes_down: Floats
    flops: Floats
    latency_seconds: Floats
    download_seconds: Floats
    compute_seconds: Floats
    upload_seconds: Floats
    samples: Floats
    num_uncounted: int = 0

    @property
    def seconds(self) -> Floats:
        """Simulated seconds from the beginning of the round to the last byte received; float64 [p]."""
        return self.latency_seconds + self.download_seconds + self.compute_seconds + self.upload_seconds


class Costs:
    """Costs of participants by capacity and device."""

    def __init__(self, variants: Sequence[VariantCosts], devices: Devices) -> None:
        """Bind the costs of each capacity, ascending, to the devices that bear them."""
        self.variants, self.devices = tuple(variants), devices

    def efforts(self, clients: Ints, variant: NDArray[np.int16], samples_trained: Ints, round: int) -> Efforts:
        """Return what participants have to do and how long it takes them.

        Args:
            clients: int64 [p].
            variant: int16 [p], their capacities.
            samples_trained: int64 [p], samples that each one's local steps go through.
            round: the round, by which devices may be drawn.
        """
        device = self.devices.of(clients, round)

        def of_variant(name: str) -> Floats:
            """Return one cost of each participant, by its capacity."""
            return np.array([getattr(costs, name) for costs in self.variants], dtype=np.float64)[variant]

        def of_device(name: str) -> Floats:
            """Return one property of each participant's device."""
            return np.array([getattr(profile, name) for profile in self.devices.profiles], dtype=np.float64)[device]

        up, down = of_variant("bytes_up"), of_variant("bytes_down")
        flops = of_variant("flops_per_sample") * samples_trained + of_variant("flops_per_round")
        return Efforts(
            bytes_up=up,
            bytes_down=down,
            flops=flops,
            latency_seconds=of_device("latency_seconds"),
            download_seconds=down / of_device("download_bytes_per_second"),
            compute_seconds=flops / of_device("flops_per_second"),
            upload_seconds=up / of_device("upload_bytes_per_second"),
            samples=samples_trained.astype(np.float64),
            num_uncounted=len(self.uncounted),
        )

    @property
    def uncounted(self) -> list[str]:
        """Names of the operations whose FLOPs are left out, of whatever capacity."""
        return sorted({name for costs in self.variants for name in costs.uncounted})

    def check_memory(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Check that every sub-model fits the devices that train it.

        Args:
            pairs: (device, variant) that occur.

        Raises:
            ConfigError: one does not fit.
        """
        for device, variant in pairs:
            profile, costs = self.devices.profiles[device], self.variants[variant]
            if profile.memory_bytes is not None and costs.memory_bytes > profile.memory_bytes:
                raise ConfigError(
                    f"device {profile.name!r} has memory_bytes = {profile.memory_bytes}, but training capacity"
                    f" {costs.capacity:g} needs {costs.memory_bytes}: give this device a smaller capacity, lower"
                    " train.batch_size, or choose a device with more memory"
                )


def add_up(efforts: Efforts, kept: NDArray[np.bool_], round_seconds: float, waited_seconds: float) -> RoundCosts:
    """Add up the costs of a round.

    Args:
        efforts: efforts of all p that were chosen.
        kept: bool [p], those in time.
        round_seconds: simulated seconds from the round's beginning to its end.
        waited_seconds: simulated seconds before it began, when nobody was available.
    """
    left = round_seconds - efforts.latency_seconds - efforts.download_seconds
    computed = np.where(kept, efforts.compute_seconds, np.clip(left, 0.0, efforts.compute_seconds))
    share = np.divide(computed, efforts.compute_seconds, out=np.ones_like(computed), where=efforts.compute_seconds > 0)
    return RoundCosts(
        bytes_up=int(efforts.bytes_up[kept].sum()),
        bytes_down=int(efforts.bytes_down.sum()),
        client_flops=float((efforts.flops * share).sum()),
        simulated_seconds=waited_seconds + round_seconds,
        download_seconds=float(efforts.download_seconds.sum()),
        compute_seconds=float(computed.sum()),
        upload_seconds=float(efforts.upload_seconds[kept].sum()),
        num_samples=float((efforts.samples * share).sum()),
        num_uncounted_operations=efforts.num_uncounted,
    )
