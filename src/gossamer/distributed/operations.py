"""Averages and gathers among neighbours, and among all; by the names that BlueFog gave them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from gossamer.distributed.agreement import agree, agree_on, device_of_messages, shapes
from gossamer.distributed.exchange import HALVES, Mixed
from gossamer.distributed.flat import Bucket
from gossamer.distributed.links import Exchange
from gossamer.distributed.neighbors import ALONE, Neighbors, of_round, of_weights
from gossamer.distributed.world import World, current
from gossamer.distributed.world import topology as build_topology
from gossamer.errors import ConfigError
from gossamer.topology import Topology

Tensors = TypeVar("Tensors", Tensor, list[Tensor])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEFAULT_TOPOLOGY = "static-exp"  # BlueFog's


class Handle(Generic[Tensors]):
    """An operation under way."""

    def __init__(self, finish: Callable[[], Tensors]) -> None:
        self._finish: Callable[[], Tensors] | None = finish
        self._result: Tensors | None = None

    def wait(self) -> Tensors:
        """Return the result, once it is there; call it once at least on every rank.

        Raises:
            EngineError: a neighbour is gone, or did not answer in time.
        """
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result


@overload
def neighbor_allreduce(
    tensor: Tensors,
    *,
    topology: Topology | None = ...,
    round: int | None = ...,
    self_weight: float | None = ...,
    src_weights: Mapping[int, float] | None = ...,
    dst_weights: Sequence[int] | Mapping[int, float] | None = ...,
    wire_dtype: torch.dtype | None = ...,
    async_op: Literal[False] = ...,
) -> Tensors:
    """Return the average."""
    ...


@overload
def neighbor_allreduce(
    tensor: Tensors,
    *,
    topology: Topology | None = ...,
    round: int | None = ...,
    self_weight: float | None = ...,
    src_weights: Mapping[int, float] | None = ...,
    dst_weights: Sequence[int] | Mapping[int, float] | None = ...,
    wire_dtype: torch.dtype | None = ...,
    async_op: Literal[True],
) -> Handle[Tensors]:
    """Return what is under way."""
    ...


@torch.no_grad()
def neighbor_allreduce(
    tensor: Tensors,
    *,
    topology: Topology | None = None,
    round: int | None = None,
    self_weight: float | None = None,
    src_weights: Mapping[int, float] | None = None,
    dst_weights: Sequence[int] | Mapping[int, float] | None = None,
    wire_dtype: torch.dtype | None = None,
    async_op: bool = False,
) -> Tensors | Handle[Tensors]:
    """Return the weighted average of this process's tensors and its neighbours': its row of W x.

    All ranks call it at the same time, with tensors of the same shapes. By `topology`, weights are those of its mixing
    of the round; over ``ceca`` a tensor holds x and y, [2, ...]. By weights of the call::

        self_weight * own + sum of src_weights[i] * (what rank i sends, times its dst_weights[this rank])

    Args:
        tensor: a tensor of any shape, or a list of them, which travel together; float16, bfloat16, float32 or float64.
        topology: a topology of as many peers as there are processes; None: a static exponential graph, as BlueFog has
            it, unless weights are given.
        round: number of the round, where mixings change from round to round.
        self_weight, src_weights: weights of this call, given together: that of its own tensor, and ``{rank: weight}``
            of those it hears. With `topology` they take the place of its weights: sources are to be among its
            neighbours of the round, and those left out count nothing.
        dst_weights: ranks to send to, or ``{rank: factor}`` by which what is sent is multiplied; None: told by those
            who want to hear, at the cost of a small collective, or by `topology` where it is given.
        wire_dtype: dtype of what travels, such as bfloat16; its own tensor keeps all digits. None: that of the tensor.
        async_op: whether to return a `Handle` at once; the tensors must not be changed before its `wait` returns.

    Returns:
        new tensors of the shapes and dtypes of what was given, or a `Handle`. Sums of halves are taken in float32.

    Raises:
        ConfigError: a dtype, weights or the topology do not fit, or ranks disagree on topology or shapes.
        EngineError: a neighbour is gone, or did not answer in time.
    """
    world = current()
    tensors: list[Tensor] = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    _check_floats(world, tensors)
    near = _neighbors(world, tensors, wire_dtype, topology, round, self_weight, src_weights, dst_weights)
    num_rows = len(near.self_weights)
    if any(each.shape[:1] != (2,) for each in tensors) and num_rows == 2:
        raise ConfigError(f"{shapes(tensors)}, but a joint mixing needs x and y: give tensors [2, ...]")
    buckets = Bucket.by_dtype(tensors)
    mixed = Mixed(world, [bucket.gather(num_rows) for bucket in buckets], near, wire_dtype)

    def finish() -> Tensors:
        """Wait, and return the averages in the shape of what was given."""
        found: list[Tensor] = [torch.empty(0)] * len(tensors)
        for bucket, row in zip(buckets, mixed.wait(), strict=True):
            for place, value in zip(bucket.places, bucket.views(row), strict=True):
                found[place] = value
        return found[0] if isinstance(tensor, Tensor) else found

    handle: Handle[Tensors] = Handle(finish)
    return handle if async_op else handle.wait()


def _neighbors(
    world: World,
    tensors: Sequence[Tensor],
    wire: torch.dtype | None,
    topology: Topology | None,
    round: int | None,
    self_weight: float | None,
    src_weights: Mapping[int, float] | None,
    dst_weights: Sequence[int] | Mapping[int, float] | None,
) -> Neighbors:
    """Return what this process does, by a topology or by weights of the call."""
    if (self_weight is None) != (src_weights is None) or (dst_weights is not None and src_weights is None):
        raise ConfigError("self_weight and src_weights belong together, and dst_weights to both: give them, or none")
    if self_weight is None or src_weights is None:
        graph = default_topology(world) if topology is None else topology
        if graph is None:
            return ALONE
        agree_on(world, graph, tensors, wire)
        return of_round(graph, round, world.rank)
    if topology is None:
        agree(world, f"{shapes(tensors, wire)} by weights", "give tensors of the same shapes and dtypes")
        known = _asked(world, src_weights) if dst_weights is None else dst_weights
        return of_weights(world.rank, world.size, self_weight, src_weights, known)
    agree_on(world, topology, tensors, wire)
    near = of_round(topology, round, world.rank)
    others = [rank for rank in src_weights if rank not in near.sources]
    if others or dst_weights is not None:
        raise ConfigError(
            f"rank {world.rank}: src_weights {dict(src_weights)} and dst_weights do not go with topology"
            f" {topology.name!r}, by which it hears {[*near.sources]}: leave dst_weights and others out, or topology"
        )
    return of_weights(
        world.rank, world.size, self_weight, dict.fromkeys(near.sources, 0.0) | dict(src_weights), [*near.destinations]
    )


def _asked(world: World, sources: Mapping[int, float]) -> list[int]:
    """Return who wants to hear from this process, as all tell each other."""
    import torch.distributed as dist

    wanted = torch.zeros(world.size, dtype=torch.uint8, device=device_of_messages(world))
    wanted[[rank for rank in sources if 0 <= rank < world.size]] = 1
    every = [torch.empty_like(wanted) for _ in range(world.size)]
    with world.links.waiting():
        dist.all_gather(every, wanted)
    return [rank for rank, theirs in enumerate(every) if theirs[world.rank] and rank != world.rank]


def default_topology(world: World) -> Topology | None:
    """Return the static exponential graph of the group; None if this process is alone."""
    if world.default_topology is None and world.size > 1:
        world.default_topology = build_topology(DEFAULT_TOPOLOGY)
    return world.default_topology


@torch.no_grad()
def neighbor_allgather(tensor: Tensor, *, topology: Topology | None = None, round: int | None = None) -> Tensor:
    """Return what the neighbours have, one after another by ascending rank, without this process's own.

    Args:
        tensor: [rows, ...] of any dtype; the number of rows may differ between ranks, nothing else.
        topology, round: see `neighbor_allreduce`.

    Returns:
        [rows of all neighbours, ...].

    Raises:
        ConfigError, EngineError: see `neighbor_allreduce`.
    """
    world = current()
    if tensor.ndim == 0:
        raise ConfigError("neighbor_allgather of a single number: give a tensor [rows, ...]")
    graph = default_topology(world) if topology is None else topology
    if graph is None:
        return tensor[:0].clone()
    agree_on(world, graph, [tensor[:0]])
    near = of_round(graph, round, world.rank)
    own, row = torch.tensor([len(tensor)], device=device_of_messages(world)), math.prod(tensor.shape[1:])
    sent, sources = tensor.contiguous(), [*near.sources]
    told = [(rank, own) for rank in near.destinations]
    with Exchange(world.links, told, [(rank, 1, own.dtype) for rank in sources], own.device) as counts:
        lengths = [int(count) for count in counts]
    incoming = [(rank, length * row, tensor.dtype) for rank, length in zip(sources, lengths, strict=True)]
    outgoing = [(rank, sent) for rank in near.destinations]
    with Exchange(world.links, outgoing, incoming, tensor.device) as parts:
        pieces = [
            part.view(-1, *tensor.shape[1:]) if row else tensor.new_empty(length, *tensor.shape[1:])
            for part, length in zip(parts, lengths, strict=True)
        ]
        return torch.cat([*(piece.to(tensor.device) for piece in pieces), tensor[:0]])


@torch.no_grad()
def pair_gossip(
    tensor: Tensor,
    target_rank: int,
    *,
    self_weight: float = 0.5,
    pair_weight: float = 0.5,
    wire_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the weighted average of this process's tensor and that of one other, which names this one in turn.

    Only the two take part. Their tensors must have one shape, which is not compared.

    Args:
        tensor, wire_dtype: see `neighbor_allreduce`.
        target_rank: the other.
        self_weight, pair_weight: weights of the own tensor and of the other's; they sum to 1.

    Raises:
        ConfigError, EngineError: see `neighbor_allreduce`.
    """
    world = current()
    _check_floats(world, [tensor])
    near = of_weights(world.rank, world.size, self_weight, {target_rank: pair_weight}, [target_rank])
    (mixed,) = Mixed(world, [tensor.reshape(1, -1).contiguous()], near, wire_dtype).wait()
    return mixed.view(tensor.shape)


@torch.no_grad()
def allreduce(tensor: Tensors) -> Tensors:
    """Return the mean over all processes, the same bits on each.

    Args:
        tensor: a tensor, or a list of them; float16 and bfloat16, which are added in float32, float32 or float64.

    Raises:
        ConfigError, EngineError: see `neighbor_allreduce`.
    """
    import torch.distributed as dist

    world = current()
    tensors: list[Tensor] = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    _check_floats(world, tensors)
    agree(world, f"{shapes(tensors)} of all", "give tensors of the same shapes and dtypes")
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for bucket in Bucket.by_dtype(tensors):
        row = bucket.gather()
        total = row.float() if row.dtype in HALVES else row.clone()
        if world.size > 1:
            with world.links.waiting():
                dist.all_reduce(total)
            total /= world.size
        for place, value in zip(bucket.places, bucket.views(total.to(row.dtype)), strict=True):
            found[place] = value
    return found[0] if isinstance(tensor, Tensor) else found


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], root: int = 0) -> None:
    """Overwrite the tensors, such as ``[*model.parameters()]``, of all processes by those of one.

    Args:
        tensors: of the same shapes and dtypes on all ranks.
        root: rank whose tensors all get.

    Raises:
        ConfigError: shapes or dtypes differ, or there is no such rank.
    """
    import torch.distributed as dist

    world, tensors = current(), list(tensors)
    if not 0 <= root < world.size:
        raise ConfigError(f"root = {root} is none of the ranks 0 to {world.size - 1}")
    agree(world, f"{shapes(tensors)} from rank {root}", "give tensors of the same shapes and dtypes")
    for each in tensors:
        value = each.detach().contiguous()
        with world.links.waiting():
            dist.broadcast(value.view(-1).view(torch.uint8), root)  # gloo does not know every dtype
        each.detach().copy_(value)


@torch.no_grad()
def consensus_distance(tensor: Tensor | Sequence[Tensor]) -> float:
    """Return the root mean square distance of the processes' tensors from their mean, the same on each.

    It is ``sqrt(1/n sum_i |x_i - mean|^2)``, of all tensors together, such as ``[*model.parameters()]``.

    Raises:
        ConfigError, EngineError: see `neighbor_allreduce`.
    """
    import torch.distributed as dist

    tensors = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    means = allreduce([each.detach() for each in tensors])
    world = current()
    squares = [(own - mean).double().square().sum() for own, mean in zip(tensors, means, strict=True)]
    total = torch.stack([each.to(world.device) for each in squares]).sum()
    if world.size > 1:
        with world.links.waiting():
            dist.all_reduce(total)
    return float((total / world.size).sqrt())


def _check_floats(world: World, tensors: Sequence[Tensor]) -> None:
    """Refuse what cannot be averaged.

    Raises:
        ConfigError: there are no tensors, or one is not of floats, or lies elsewhere than others.
    """
    if not tensors:
        raise ConfigError("an empty list has nothing to average: give tensors")
    wrong = [each.dtype for each in tensors if each.dtype not in FLOATS]
    if wrong:
        raise ConfigError(
            f"rank {world.rank}: {wrong[0]} cannot be averaged: give float16, bfloat16, float32 or float64"
        )
