"""What is checked on four real ranks, in this order; see launch.py."""

from __future__ import annotations

import io
import os
import re
import runpy
import socket
import struct
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gossamer.distributed as gd
from gossamer.distributed.world import current
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN

SIZE = 4
EXAMPLE = Path(__file__).parents[2] / "experiments" / "own-loop" / "train.py"
TOO_FEW = ("torus",)  # it needs nine peers: test_neighbors.py
WITH_DEGREE = ("random-regular", "small-world", "el-oracle", "el-local")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TIMEOUT_SECONDS = 30.0
TCP_INFO = 11  # Linux: option of a socket; uint64 at 200 and 208: bytes sent, and of these again


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Return what all ranks have, [SIZE, *shape], the same on each."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((SIZE, *shape)))


def bytes_of_sockets() -> int:
    """Return how many bytes this process has sent over its connections, as the operating system counts them."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as one:
            sent, again = struct.unpack_from("QQ", one.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256), 200)
            total += sent - again
    return total


def check_the_example(rank: int) -> None:
    """In a group of its own, which it leaves."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("MASTER_PORT", os.environ["PORTS"])
        patch.setattr(sys, "argv", ["train.py", "40"])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (re.search(r"accuracy 0\.[3-9].* 38480 bytes a step", printed.getvalue()) is not None) == (rank == 0)


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
        for round in range(1 if graph.schedule.cycle == 1 else 2):
            mixing = graph.mixing(round)
            given = pairs if mixing.kind == "joint" else x
            num_rows = 2 * SIZE if mixing.kind == "joint" else SIZE
            flat = given.reshape(num_rows, -1)
            expected = (torch.from_numpy(mixing.dense()) @ flat).view_as(given)[rank]
            found = gd.neighbor_allreduce(given[rank], topology=graph, round=round)
            assert torch.allclose(found, expected, rtol=0, atol=1e-12), f"{name} in round {round}"


def check_a_list_travels_together_in_its_dtypes(rank: int) -> None:
    graph, x = gd.topology("ring"), rows(6)
    matrix = torch.from_numpy(graph.mixing(0).dense())
    before = gd.bytes_sent()
    given = [x[rank].to(dtype).view(2, 3) for dtype in DTYPES]
    handle = gd.neighbor_allreduce(given, topology=graph, async_op=True)
    found = handle.wait()
    assert handle.wait() is found
    assert gd.bytes_sent() - before == 2 * 6 * sum(each.itemsize for each in given)
    for dtype, value, own in zip(DTYPES, found, given, strict=True):
        expected = (matrix @ x.to(dtype).double())[rank].view(2, 3)
        assert value.dtype == dtype
        assert value is not own
        assert torch.allclose(value.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def check_handles_in_any_order(rank: int) -> None:
    graph, x = gd.topology("ring"), rows(3, 5)
    handles = [gd.neighbor_allreduce(each, topology=graph, async_op=True) for each in x[rank]]
    matrix = torch.from_numpy(graph.mixing(0).dense())
    for number in (2, 0, 1):
        expected = (matrix @ x[:, number])[rank]
        assert torch.allclose(handles[number].wait(), expected, rtol=0, atol=1e-12)


def check_half_the_bytes_on_the_wire(rank: int) -> None:
    graph, x, before = gd.topology("ring"), rows(5).float(), gd.bytes_sent()
    found = gd.neighbor_allreduce(x[rank], topology=graph, wire_dtype=torch.bfloat16)
    assert gd.bytes_sent() - before == 2 * 5 * 2
    mixing = graph.mixing(0)
    rounded = x.to(torch.bfloat16).double()
    rounded[rank] = x[rank].double()  # which does not travel
    assert torch.allclose(found.double(), (torch.from_numpy(mixing.dense()) @ rounded)[rank], rtol=0, atol=1e-6)


def check_the_default_is_bluefogs_exponential_graph(rank: int) -> None:
    x = rows(3)
    expected = gd.topology("static-exp").mixing(0).dense() @ x.numpy()
    assert np.allclose(gd.neighbor_allreduce(x[rank]), expected[rank], rtol=0, atol=1e-12)


def check_weights_of_a_call(rank: int) -> None:
    x, left, right = rows(3), (rank - 1) % SIZE, (rank + 1) % SIZE
    expected = 0.25 * x[rank] + 0.75 * x[left]
    told = gd.neighbor_allreduce(x[rank], self_weight=0.25, src_weights={left: 0.75})
    given = gd.neighbor_allreduce(x[rank], self_weight=0.25, src_weights={left: 0.75}, dst_weights=[right])
    pushed = gd.neighbor_allreduce(x[rank], self_weight=0.25, src_weights={left: 1.0}, dst_weights={right: 0.75})
    for found in (told, given, pushed):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    ring = gd.topology("ring")
    half = gd.neighbor_allreduce(x[rank], topology=ring, self_weight=0.25, src_weights={left: 0.75})
    assert torch.allclose(half, expected, rtol=0, atol=1e-12)
    alone = {"self_weight": 1.0, "src_weights": {}}
    idle = (
        gd.neighbor_allreduce(x[rank], **alone)
        if rank < 2
        else gd.neighbor_allreduce(x[rank], self_weight=0.5, src_weights={5 - rank: 0.5})
    )
    assert torch.allclose(idle, x[rank] if rank < 2 else x[2:].mean(0), rtol=0, atol=1e-12)


def check_all_of_the_neighbours(rank: int) -> None:
    own = torch.arange(rank + 1)[:, None] + 10 * rank  # int64 [rank + 1, 1]
    found = gd.neighbor_allgather(own, topology=gd.topology("ring"))
    others = sorted({(rank - 1) % SIZE, (rank + 1) % SIZE})
    expected = torch.cat([torch.arange(other + 1)[:, None] + 10 * other for other in others])
    assert torch.equal(found, expected)
    nobody = gd.neighbor_allgather(torch.zeros(0, 2), topology=gd.topology("one-peer-exp"), round=1)
    assert nobody.shape == (0, 2)


def check_every_dtype_that_is_not_averaged(rank: int) -> None:
    for dtype in (*DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool):
        own = torch.tensor([[rank, 1]]).to(dtype)
        expected = torch.tensor([[other, 1] for other in sorted({(rank - 1) % SIZE, (rank + 1) % SIZE})]).to(dtype)
        assert torch.equal(gd.neighbor_allgather(own, topology=gd.topology("ring")), expected)
        gd.broadcast([own], root=3)
        assert torch.equal(own, torch.tensor([[3, 1]]).to(dtype))


def check_pairs(rank: int) -> None:
    x = rows(2, 2)
    if rank < 3:  # the last one does not take part
        other = {0: 2, 2: 0}.get(rank)
        if other is not None:
            found = gd.pair_gossip(x[rank], other, self_weight=0.25, pair_weight=0.75)
            assert torch.allclose(found, 0.25 * x[rank] + 0.75 * x[other], rtol=0, atol=1e-12)


def check_means_of_all(rank: int) -> None:
    x, y = rows(2, 2), rows(3, seed=1).float()
    mean, other, large = gd.allreduce([x[rank], y[rank], torch.full((2,), 4e4, dtype=torch.float16)])
    assert torch.allclose(mean, x.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(other, y.mean(0), rtol=0, atol=1e-6)
    assert torch.equal(large, torch.full((2,), 4e4, dtype=torch.float16))  # the sum is beyond its range
    distance = gd.consensus_distance([x[rank], y[rank]])
    squares = (x - x.mean(0)).square().sum() + (y - y.mean(0)).double().square().sum()
    assert abs(distance - float((squares / SIZE).sqrt())) < 1e-6
    own = [x[rank].clone(), y[rank].clone()]
    gd.broadcast(own, root=2)
    assert torch.equal(own[0], x[2])
    assert gd.consensus_distance(own) == 0.0


def check_bytes_are_those_of_the_sockets(rank: int) -> None:
    """Without the memory that the processes of one machine share, whose messages are the same."""
    graph, x = gd.topology("one-peer-exp"), torch.full((250_000,), float(rank))
    expected, links = gd.neighbor_allreduce(x, topology=graph, round=1), current().links
    memory, links.memory = links.memory, None
    assert memory is not None
    assert torch.equal(gd.neighbor_allreduce(x, topology=graph, round=1), expected)
    gd.neighbor_allreduce(x, topology=graph, round=0)  # which compares and connects
    gd.allreduce(torch.zeros(1))  # everything has left once everybody is here
    counted, sent = gd.bytes_sent(), bytes_of_sockets()
    for round in range(2):
        gd.neighbor_allreduce(x, topology=graph, round=round)
    gd.allreduce(torch.zeros(1))
    counted, sent = gd.bytes_sent() - counted, bytes_of_sockets() - sent
    assert counted == 2 * 1_000_000
    assert abs(sent - counted) < 0.01 * counted, f"{sent} of {counted}"
    links.memory = memory


def check_what_one_rank_alone_can_refuse(rank: int) -> None:
    cases = [
        ("int64 cannot be averaged", lambda: gd.neighbor_allreduce(torch.arange(3))),
        ("an empty list", lambda: gd.neighbor_allreduce([])),
        ("belong together", lambda: gd.neighbor_allreduce(torch.zeros(1), self_weight=1.0)),
        ("sum to 1.5, not 1", lambda: gd.pair_gossip(torch.zeros(1), (rank + 1) % SIZE, self_weight=1.0)),
        ("give ranks of others", lambda: gd.pair_gossip(torch.zeros(1), rank)),
        ("has 5 peers, but the group has 4", lambda: gd.topology("ring", n=5)),
        ("unknown topology", lambda: gd.topology("rings")),
        ("root = 4", lambda: gd.broadcast([torch.zeros(1)], root=4)),
        ("single number", lambda: gd.neighbor_allgather(torch.tensor(1.0))),
    ]
    for words, call in cases:
        with pytest.raises(ConfigError, match=words):
            call()


def check_ranks_that_disagree(rank: int) -> None:
    graph = gd.topology("ring")
    with pytest.raises(ConfigError, match=r"ranks 0, 1, 3 have float32 \[2, 2\] .*; rank 2 has float32 \[4\] "):
        gd.neighbor_allreduce(torch.zeros(4) if rank == 2 else torch.zeros(2, 2), topology=graph)
    other = gd.topology("od-equidyn", seed=1 if rank == 3 else 2)
    with pytest.raises(ConfigError, match=r"ranks 0, 1, 2 have topology od-equidyn\(seed=2\).*rank 3 has .*seed=1"):
        gd.neighbor_allreduce(torch.zeros(1), topology=other, round=0)
    joint = gd.topology("ceca")
    with pytest.raises(ConfigError, match="needs x and y"):
        gd.neighbor_allreduce(torch.zeros(3), topology=joint, round=0)
