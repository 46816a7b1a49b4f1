"""What is checked on ranks with tensors on CUDA devices; see test_cuda.py and tests/distributed/launch.py."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

import gossamer.distributed as gd
from gossamer.distributed.world import current

BACKEND = os.environ.get("BACKEND", "nccl")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
METHODS: dict[str, dict[str, Any]] = {
    "atc": {},
    "awc": {"mode": "combine-while-adapt", "every": 2, "bucket_bytes": 100},
    "tracking": {"mode": "gradient-tracking"},
    "diffusion": {"mode": "exact-diffusion"},
    "gasloc": {"outer": "gasloc", "every": 2},
    "diloco": {"outer": "diloco", "every": 2, "topology": None},
    "streaming": {"outer": {"name": "streaming-diloco", "fragments": 2}, "topology": None},
}


def rows(*shape: int) -> Tensor:
    """Return what all ranks have, [ranks, *shape], on the processor."""
    return torch.randn(gd.size(), *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check_init(rank: int) -> None:
    world = gd.init("nccl") if BACKEND == "nccl" else gd.init("gloo", device="cuda:0")
    assert (world.rank, world.backend, world.device.type) == (rank, BACKEND, "cuda")
    assert world.device.index == (rank if BACKEND == "nccl" else 0)


def check_two_of_them_come_first(rank: int) -> None:
    """Messages between a few, before there was any of all."""
    if rank < 2:
        found = gd.pair_gossip(torch.full((3,), float(rank), device=current().device), 1 - rank)
        assert torch.equal(found.cpu(), torch.full((3,), 0.5))


def check_averages(rank: int) -> None:
    x, device = rows(5), current().device
    for name in ("ring", "one-peer-exp") if gd.size() > 2 else ("complete",):
        graph = gd.topology(name)
        matrix = torch.from_numpy(graph.mixing(0).dense())
        handles = [
            gd.neighbor_allreduce(x[rank].to(device, dtype), topology=graph, round=0, async_op=True) for dtype in DTYPES
        ]
        for dtype, handle in zip(DTYPES, handles, strict=True):
            found, expected = handle.wait(), (matrix @ x.to(dtype).double())[rank]
            assert (found.device, found.dtype) == (device, dtype)
            assert torch.allclose(found.double().cpu(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    own = x[rank].to(device)
    assert torch.allclose(gd.allreduce(own).cpu(), x.mean(0))
    other = (rank - 1) % gd.size()
    found = gd.neighbor_allreduce(own, self_weight=0.5, src_weights={other: 0.5})
    assert torch.allclose(found.cpu(), (x[rank] + x[other]) / 2)
    counts = torch.arange(rank + 1, device=device)
    expected = [torch.arange(n + 1) for n in range(gd.size()) if n != rank]
    assert torch.equal(gd.neighbor_allgather(counts, topology=gd.topology("complete")).cpu(), torch.cat(expected))
    gd.broadcast([own])
    assert gd.consensus_distance(own) == 0.0


def check_every_method_is_that_of_processors(rank: int) -> None:
    for name, arguments in METHODS.items():
        models = []
        for device in ("cpu", current().device):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double().to(device)
            inner = torch.optim.AdamW(model.parameters(), lr=0.01)
            optimizer = gd.DecentralizedOptimizer(inner, **{"topology": gd.topology("complete")} | arguments)
            for seed in range(6):
                source = torch.Generator().manual_seed(10 * seed + rank)
                x, y = (torch.randn(8, n, generator=source, dtype=torch.float64).to(device) for n in (5, 2))
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            models.append([each.detach().cpu() for each in model.parameters()])
        for one, other in zip(*models, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-9), name


def check_a_round_copies_nothing_to_the_processor(rank: int) -> None:
    """Where the backend is nccl; torch raises an error where a stream would be waited for."""
    if BACKEND != "nccl":
        return
    device = current().device
    model = nn.Linear(5, 2).to(device)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    optimizer = gd.DecentralizedOptimizer(inner, gd.topology("complete"))
    x = torch.zeros(8, 5, device=device)
    for mode in ("default", "error"):  # what is made and compared at first is not of interest
        torch.cuda.set_sync_debug_mode(mode)
        try:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
