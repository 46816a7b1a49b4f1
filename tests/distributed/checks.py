"""What is checked on four real ranks, in this order; see launch.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import gossamer.distributed as gd
from gossamer.registry import BUILTIN

SIZE = 4
TOO_FEW = ("torus",)  # it needs nine peers: test_neighbors.py
WITH_DEGREE = ("random-regular", "small-world", "el-oracle", "el-local")
TIMEOUT_SECONDS = 30.0


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Return what all ranks have, [SIZE, *shape], the same on each."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((SIZE, *shape)))


def check_init(rank: int) -> None:
    world = gd.init(timeout_seconds=TIMEOUT_SECONDS)
    assert (world.rank, world.size, world.local_rank, str(world.device)) == (rank, SIZE, rank, "cpu")
    assert (gd.rank(), gd.size(), world.backend) == (rank, SIZE, "gloo")


def check_every_topology_is_its_matrix(rank: int) -> None:
    x, pairs = rows(2, 3), rows(2, 5, seed=1)
    for name in BUILTIN["topology"]:
        if name in ("file", *TOO_FEW):
            continue
        graph = gd.topology(name, **({"degree": 2} if name in WITH_DEGREE else {}))
        for round in range(4):
            mixing = graph.mixing(round)
            given = pairs if mixing.kind == "joint" else x
            num_rows = 2 * SIZE if mixing.kind == "joint" else SIZE
            flat = given.reshape(num_rows, -1)
            expected = (torch.from_numpy(mixing.dense()) @ flat).view_as(given)[rank]
            found = gd.neighbor_allreduce(given[rank], topology=graph, round=round)
            assert torch.allclose(found, expected, rtol=0, atol=1e-12), f"{name} in round {round}"


def check_adapt_then_combine_on_the_complete_graph_is_data_parallel(rank: int) -> None:
    x, y = rows(8, 5, seed=2).float(), rows(8, 2, seed=3).float()

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))

    ours, theirs = model(), torch.nn.parallel.DistributedDataParallel(model())
    inner = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer = gd.DecentralizedOptimizer(inner, gd.topology("complete"))
    other = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(50):
        for one, step in ((ours, optimizer), (theirs, other)):
            step.zero_grad()
            torch.nn.functional.mse_loss(one(x[rank]), y[rank]).backward()
            step.step()
    for mine, other_one in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other_one, rtol=0, atol=1e-6)
    assert optimizer.rounds == 50
