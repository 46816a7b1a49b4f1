"""A round with the backend nccl, on device meta in the place of a GPU: it has no numbers to copy to the processor.

Whatever would copy or read a tensor of a device within a round raises an error there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gossamer.distributed as gd
from gossamer.distributed import agreement, links, optimizer, world
from gossamer.distributed.flat import Bucket

RANK, SIZE = 1, 4
METHODS: dict[str, dict[str, Any]] = {
    "atc": {},
    "bf16": {"wire_dtype": torch.bfloat16},
    "awc": {"mode": "combine-while-adapt", "every": 2, "bucket_bytes": 100},
    "tracking": {"mode": "gradient-tracking"},
    "diffusion": {"mode": "exact-diffusion"},
    "gasloc": {"outer": "gasloc", "every": 2},
    "noloco": {"outer": "noloco"},
    "diloco": {"outer": "diloco", "topology": None},
    "streaming": {"outer": {"name": "streaming-diloco", "fragments": 3}, "topology": None},
}


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Join a group of others that are not there; returns the messages that are sent to them, and received."""
    device, found = torch.device("meta"), list[Tensor]()

    def posted(sent: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]]) -> list[Any]:
        found.extend(value for _, value in (*sent, *received))
        return []

    ways = links.Links(None, RANK, SIZE, 1.0, "", has_nccl=True)
    monkeypatch.setattr(world, "_joined", [world.World(RANK, SIZE, RANK, device, "nccl", 1.0, ways)])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: SIZE)
    monkeypatch.setattr(dist, "all_reduce", found.append)
    monkeypatch.setattr(agreement, "_gathered", lambda group, message: [message] * SIZE)
    monkeypatch.setattr(optimizer, "_digest", lambda tensors: "")  # which is taken once, before all rounds
    monkeypatch.setattr(links, "_posted", posted)
    return found


def test_an_average(messages: list[Tensor]) -> None:
    given = [torch.zeros(3, 2, device="meta"), torch.zeros(4, device="meta", dtype=torch.bfloat16)]
    found = gd.neighbor_allreduce(given, topology=gd.topology("ring"), async_op=True).wait()
    assert [(each.shape, each.dtype, each.device.type) for each in found] == [
        (each.shape, each.dtype, "meta") for each in given
    ]
    assert [(value.device.type, value.nbytes) for value in messages] == [("meta", 24), ("meta", 8)] * 4
    assert gd.bytes_sent() == 2 * (24 + 8)
    assert all(each.device.type == "meta" for each in gd.allreduce(given))
    weighted = gd.neighbor_allreduce(given[0], self_weight=0.5, src_weights={0: 0.5}, dst_weights=[2])
    assert weighted.device.type == "meta"


@pytest.mark.parametrize("name", METHODS)
def test_rounds(messages: list[Tensor], name: str) -> None:
    arguments = {"topology": gd.topology("ring")} | METHODS[name]
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to("meta")
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = gd.DecentralizedOptimizer(inner, buffers=model.buffers(), **arguments)
    for _ in range(2 * arguments.get("every", 1)):
        wrapped.zero_grad()
        model(torch.zeros(8, 5, device="meta")).sum().backward()
        wrapped.step()
    assert wrapped.rounds == 2
    assert messages
    assert all(value.device.type == "meta" for value in messages)
    wrapped.load_state_dict(wrapped.state_dict())
    assert all(each.device.type == "meta" for each in model.parameters())


def test_buckets() -> None:
    tensors = [
        torch.zeros(size, device="meta", dtype=dtype) for size, dtype in ((3, torch.float32), (2, torch.float64))
    ]
    tensors += [torch.zeros(2, 5), torch.zeros(4, device="meta"), torch.zeros(7, 3, device="meta")]
    buckets = Bucket.by_dtype(tensors, max_bytes=28)
    assert [bucket.places for bucket in buckets] == [(0, 3), (1,), (2,), (4,)]
    for bucket in buckets:
        row = bucket.gather()
        assert row.shape == (1, sum(each.numel() for each in bucket.tensors))
        assert row.device == bucket.tensors[0].device
        assert [view.shape for view in bucket.views(row)] == [each.shape for each in bucket.tensors]
        bucket.scatter_(row)
