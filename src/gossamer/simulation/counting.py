"""What participants compute, send and hold, counted rather than guessed, and the simulated time that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gossamer.algorithms.base import Algorithm, Arrays, given_to_loss
from gossamer.simulation.costs import VariantCosts
from gossamer.submodel import Layout
from gossamer.threads import one_thread
from gossamer.workloads.base import Workload

BYTES_PER_FLOAT = 4


class Holding(Protocol):
    """What a participant holds; a task's variants are."""

    @property
    def capacity(self) -> float:
        """Share of the channels of each axis."""

    @property
    def layout(self) -> Layout:
        """Of its sub-model."""

    @property
    def algorithm(self) -> Algorithm:
        """As such participants run it."""


def count_variants(
    workload: Workload,
    algorithm: Algorithm,
    variants: Sequence[Holding],
    *,
    batch_size: int,
    scaler: bool,
    bytes_per_number: int = BYTES_PER_FLOAT,
) -> list[VariantCosts]:
    """Count what a participant of each variant costs, by training one batch of the largest client.

    What a peer sends and receives is one message, to or from one neighbour.

    Args:
        scaler: whether a sub-model's activations are multiplied by 1 / capacity while training.
        bytes_per_number: bytes of a parameter.
    """
    scales = [1.0 / variant.capacity if scaler else 1.0 for variant in variants]
    steps = {
        variant.capacity: count_step(workload, variant.layout, batch_size, scale, variant.algorithm)
        for variant, scale in zip(variants, scales, strict=True)
    }
    found = []
    for variant in variants:
        capacity, layout = variant.capacity, variant.layout
        size = layout.num_parameters * bytes_per_number
        passes = algorithm.mean_passes(list(steps), capacity)
        # At worst a step goes through the whole sub-model and then, if it makes two passes, through the next smaller.
        widest = sorted(passes, reverse=True)[: 1 if sum(passes.values()) < 1.5 else 2]
        found.append(
            VariantCosts(
                capacity=capacity,
                num_parameters=layout.num_parameters,
                bytes_up=sent_bytes(algorithm, layout.num_parameters, bytes_per_number),
                bytes_down=size * len(algorithm.traits.downlink)
                if algorithm.traits.downlink is not None
                else sent_bytes(algorithm, layout.num_parameters, bytes_per_number),
                flops_per_sample=sum(steps[width].flops_per_sample * times for width, times in passes.items()),
                memory_bytes=size + carried_bytes(algorithm, layout) + sum(steps[w].saved_bytes for w in widest),
            )
        )
    return found


def sent_bytes(algorithm: Algorithm, num_parameters: int, bytes_per_number: int = BYTES_PER_FLOAT) -> int:
    """Return the bytes of all payloads of a participant; of a joint mixing's two only one is sent in a round."""
    traits = algorithm.traits
    sizes = [
        bytes_per_number
        if name in traits.scalars
        else traits.codecs[name].row_bytes(num_parameters, bytes_per_number)
        if name in traits.codecs
        else num_parameters * bytes_per_number
        for name in traits.uplink
    ]
    return max(sizes) if traits.joint else sum(sizes)


def carried(algorithm: Algorithm, layout: Layout, dtype: torch.dtype = torch.float32) -> Arrays:
    """Return what local steps of one participant work on: a model of zeros, and whatever else `begin` makes."""
    x = torch.zeros(1, layout.d, dtype=dtype)
    state, downlink = algorithm.init(x), algorithm.traits.downlink
    received: Arrays = {name: state[name] for name in (state if downlink is None else downlink)}
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
        layout: layout of the (sub-)model that is trained.
        scale: factor of hidden activations, see `Workload.loss`.
        algorithm: algorithm of participants of this capacity; None: the loss is given the parameters themselves.
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
            given = leaves if algorithm is None else given_to_loss(algorithm, leaves, carries)
            loss = workload.loss(given, merged | {"scale": scale})
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return StepCosts(float(counter.total) / count, saved.total)
