"""Decentralized training in a loop of one's own, started by torchrun: averages among neighbours, and an optimizer.

    import gossamer.distributed as gd

    world = gd.init()
    graph = gd.topology("one-peer-exp")
    optimizer = gd.DecentralizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), graph)

The names are BlueFog's where it has them. See docs/distributed.md.
"""

from __future__ import annotations

from gossamer.distributed.operations import (
    Handle,
    allreduce,
    broadcast,
    consensus_distance,
    neighbor_allgather,
    neighbor_allreduce,
    pair_gossip,
)
from gossamer.distributed.optimizer import DecentralizedOptimizer
from gossamer.distributed.world import World, bytes_sent, init, rank, shutdown, size, topology

__all__ = [
    "DecentralizedOptimizer",
    "Handle",
    "World",
    "allreduce",
    "broadcast",
    "bytes_sent",
    "consensus_distance",
    "init",
    "neighbor_allgather",
    "neighbor_allreduce",
    "pair_gossip",
    "rank",
    "shutdown",
    "size",
    "topology",
]
