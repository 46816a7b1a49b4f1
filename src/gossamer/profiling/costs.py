"""What participants compute, send and hold, counted rather than guessed, and the simulated time that this takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gossamer.aggregate.codecs import Codec
from gossamer.algorithms.base import Algorithm, Arrays, given_to_loss, of_capacity, scalars_of
from gossamer.errors import ConfigError
from gossamer.profiling.devices import Devices, Floats, Ints
from gossamer.submodel import Cutter, Layout
from gossamer.threads import one_thread
from gossamer.workloads.base import Workload

BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class VariantCosts:
    """What one participant of a capacity costs.

    Attributes:
        capacity: the capacity.
        num_parameters: of its sub-model.
        bytes_up, bytes_down: what it sends and receives a round.
        flops_per_sample: of one training sample, forward and backward.
        memory_bytes: what training holds at once: parameters, gradients, what else the algorithm carries from step to
            step (such as momentum), and what a batch saves for the backward pass, its own samples included. What was
            received counts no second time: it becomes the parameters.
    """

    capacity: float
    num_parameters: int
    bytes_up: int
    bytes_down: int
    flops_per_sample: float
    memory_bytes: int


@dataclass(frozen=True)
class RoundCosts:
    """What one round costs.

    Attributes:
        bytes_up, bytes_down, client_flops: sums over all that were chosen. A late one counts its whole download, its
            FLOPs up to the end of the round, and no upload.
        simulated_seconds: by how much simulated time advances: waiting for somebody to be available, and the round,
            which lasts as long as its slowest survivor, or its deadline where fewer survive than it waits for.
        download_seconds, compute_seconds, upload_seconds: simulated seconds that devices spend so, added up like the
            bytes; latency is in none of them.
    """

    bytes_up: int
    bytes_down: int
    client_flops: float
    simulated_seconds: float
    download_seconds: float
    compute_seconds: float
    upload_seconds: float


class Efforts(NamedTuple):
    """What each of p participants has to do in a round, and how long its device takes: float64 [p] each."""

    bytes_up: Floats
    bytes_down: Floats
    flops: Floats
    latency_seconds: Floats
    download_seconds: Floats
    compute_seconds: Floats
    upload_seconds: Floats

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
        flops = of_variant("flops_per_sample") * samples_trained
        return Efforts(
            bytes_up=up,
            bytes_down=down,
            flops=flops,
            latency_seconds=of_device("latency_seconds"),
            download_seconds=down / of_device("download_bytes_per_second"),
            compute_seconds=flops / of_device("flops_per_second"),
            upload_seconds=up / of_device("upload_bytes_per_second"),
        )

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
        efforts: of all p that were chosen.
        kept: bool [p], who is in time.
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
    )


def count_variants(
    workload: Workload,
    algorithm: Algorithm,
    cutter: Cutter,
    capacities: Sequence[float],
    *,
    batch_size: int,
    scaler: bool,
    bytes_per_number: int = BYTES_PER_FLOAT,
) -> list[VariantCosts]:
    """Count what a participant of each capacity costs, by training one batch of the largest client.

    What a peer sends and receives is one message, to or from one neighbour.

    Args:
        scaler: whether a sub-model's activations are multiplied by 1 / capacity while training.
        bytes_per_number: of a parameter.
    """
    scales = {capacity: 1.0 / capacity if scaler else 1.0 for capacity in capacities}
    bound = {capacity: of_capacity(algorithm, cutter.layout, capacity) for capacity in capacities}
    steps = {c: count_step(workload, cutter.sub_layout(c), batch_size, scales[c], bound[c]) for c in capacities}
    found = []
    for capacity in capacities:
        layout = cutter.sub_layout(capacity)
        size = layout.num_parameters * bytes_per_number
        passes = _passes(algorithm, capacities, capacity)
        # At worst a step goes through the whole sub-model and then, if it makes two passes, through the next smaller.
        widest = sorted(passes, reverse=True)[: 1 if sum(passes.values()) < 1.5 else 2]
        found.append(
            VariantCosts(
                capacity=capacity,
                num_parameters=layout.num_parameters,
                bytes_up=sent_bytes(algorithm, layout.num_parameters, bytes_per_number),
                bytes_down=size * len(algorithm.downlink)
                if algorithm.downlink is not None
                else sent_bytes(algorithm, layout.num_parameters, bytes_per_number),
                flops_per_sample=sum(steps[width].flops_per_sample * times for width, times in passes.items()),
                memory_bytes=size + carried_bytes(algorithm, layout) + sum(steps[w].saved_bytes for w in widest),
            )
        )
    return found


def sent_bytes(algorithm: Algorithm, num_parameters: int, bytes_per_number: int = BYTES_PER_FLOAT) -> int:
    """Return the bytes of all payloads of a participant; of a joint mixing's two only one is sent in a round."""
    codecs: Mapping[str, Codec] = getattr(algorithm, "codecs", {})
    sizes = [
        bytes_per_number
        if name in scalars_of(algorithm)
        else codecs[name].row_bytes(num_parameters, bytes_per_number)
        if name in codecs
        else num_parameters * bytes_per_number
        for name in algorithm.uplink
    ]
    return max(sizes) if getattr(algorithm, "joint", False) else sum(sizes)


def _passes(algorithm: Algorithm, capacities: Sequence[float], capacity: float) -> dict[float, float]:
    """Return the mean number of passes of a local step by the width that they go through: one, of the sub-model."""
    mean_passes: Callable[..., dict[float, float]] | None = getattr(algorithm, "mean_passes", None)
    return {capacity: 1.0} if mean_passes is None else mean_passes(capacities, capacity)


def carried(algorithm: Algorithm, layout: Layout, dtype: torch.dtype = torch.float32) -> Arrays:
    """Return what local steps of one participant work on: a model of zeros, and whatever else `begin` makes."""
    x = torch.zeros(1, layout.d, dtype=dtype)
    state = algorithm.init(x)
    received: Arrays = {name: state[name] for name in (state if algorithm.downlink is None else algorithm.downlink)}
    return algorithm.begin(received, algorithm.init_client(x))


def carried_bytes(algorithm: Algorithm, layout: Layout) -> int:
    """Return the bytes of what local steps work on: the model, and momentum or whatever else `begin` makes."""
    rows = carried(algorithm, layout).values()
    floats = (layout.num_parameters if row.shape[-1] == layout.d else row.numel() for row in rows)
    return BYTES_PER_FLOAT * sum(floats)


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and convolutions, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` does the same, but loads torch's compiler, which takes a second.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing here is compiled, so that the compiler is not loaded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class StepCosts(NamedTuple):
    """What one batch costs: FLOPs of matrix products and convolutions per sample, bytes saved for the backward pass."""

    flops_per_sample: float
    saved_bytes: int


class SavedBytes:
    """Counts the memory that autograd keeps for the backward pass: every storage once, those of `carried` left out."""

    def __init__(self, carried: Iterable[Tensor]) -> None:
        self._sizes = {row.untyped_storage().data_ptr(): 0 for row in carried}
        self._alive: list[Tensor] = []  # so that no address is used twice

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._sizes.values())

    def watching(self) -> AbstractContextManager[Any]:
        """Return a context in which what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)

    def _pack(self, saved: Tensor) -> Tensor:
        self._alive.append(saved.detach())
        storage = saved.untyped_storage()
        self._sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return saved


def count_step(
    workload: Workload, layout: Layout, batch_size: int, scale: float = 1.0, algorithm: Algorithm | None = None
) -> StepCosts:
    """Count what one local step costs, by doing one of the largest client.

    Args:
        layout: of the (sub-)model that is trained.
        scale: factor of hidden activations, see `Workload.loss`.
        algorithm: as participants of this capacity run it; None: the loss is given the parameters themselves.
    """
    client = np.array([int(np.argmax(workload.num_samples))], dtype=np.int64)
    count = int(min(batch_size, workload.num_samples[client[0]]))
    batch = workload.batch(client, np.arange(count, dtype=np.int64)[None])
    merged = {key: value[0] for key, value in (batch.samples | batch.client).items() if key != "mask"}
    dtype = workload.init(0).dtype
    own = {"x": torch.zeros(1, layout.d, dtype=dtype)}
    carry = own if algorithm is None else carried(algorithm, layout, dtype)
    leaves = {name: view.requires_grad_() for name, view in layout.views(carry["x"][0]).items()}
    views = {name: layout.views(value[0]) for name, value in carry.items()}
    carries = {leaf: {name: view[leaf] for name, view in views.items()} for leaf in leaves}
    counter, saved = FlopCounter(), SavedBytes(carry.values())
    with one_thread(), counter:
        with saved.watching():
            loss = workload.loss(given_to_loss(algorithm, leaves, carries), merged | {"scale": scale})
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return StepCosts(float(counter.total) / count, saved.total)
