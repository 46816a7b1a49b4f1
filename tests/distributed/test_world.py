"""Joining a group: what is refused without any other process, and a group of one."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest
import torch

import gossamer.distributed as gd
from gossamer.distributed import environment as module
from gossamer.errors import ConfigError, EngineError

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Set what torchrun sets for a single process; leave the group in the end."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(module.INTERFACE, "")  # restored in the end, whatever is set meanwhile
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # too
    yield monkeypatch
    gd.shutdown()


def test_torchrun_has_not_started_it(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("RANK")
    with pytest.raises(ConfigError, match="RANK is not set in the environment, so torchrun has not started"):
        gd.init()
    environment.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR are not set"):
        gd.init()
    with pytest.raises(ConfigError, match="joined no group yet"):
        gd.topology("ring")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "one", "no whole number"),
        ("RANK", "3", "RANK = 3 is not below WORLD_SIZE = 1"),
        (module.INTERFACE, "nowhere0", "GLOO_SOCKET_IFNAME = 'nowhere0' is no network interface of .*: name one of"),
    ],
)
def test_an_environment_that_does_not_fit(environment: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        gd.init()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "mpi"}, "backend = 'mpi' is neither 'gloo' nor 'nccl'"),
        ({"interface": "nowhere0"}, "interface = 'nowhere0' is no network interface"),
        ({"timeout_seconds": 0}, "timeout_seconds = 0"),
    ],
)
def test_arguments_that_do_not_fit(environment: pytest.MonkeyPatch, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gd.init(**arguments)  # type: ignore[arg-type]


def test_nccl_without_devices(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="backend = 'nccl' needs CUDA devices, of which there are none"):
        gd.init("nccl")


def test_several_machines_name_a_private_network(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"listen on every network of .*: give interface, or set GLOO_SOCKET_IFNAME"):
        gd.init()


def test_others_do_not_come(environment: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}.items():
        environment.setenv(name, value)
    with pytest.raises(EngineError, match=rf"rank 0 found no group of 2 processes at 127.0.0.1:{port} within 1 s"):
        gd.init(timeout_seconds=1)


def test_a_group_of_one(environment: pytest.MonkeyPatch) -> None:
    world = gd.init()
    assert (world.rank, world.size, world.backend, world.device.type) == (0, 1, "gloo", "cpu")
    with pytest.raises(ConfigError, match="topology 'ring' needs several processes"):
        gd.topology("ring")
    x = torch.arange(3.0)
    assert torch.equal(gd.neighbor_allreduce(x), x)
    assert torch.equal(gd.allreduce(x), x)
    assert len(gd.neighbor_allgather(x)) == gd.bytes_sent() == 0
    assert gd.consensus_distance(x) == 0.0
    for arguments in ({}, {"mode": "combine-while-adapt"}, {"mode": "gradient-tracking"}, {"outer": "fedavg"}):
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = gd.DecentralizedOptimizer(torch.optim.SGD([parameter], lr=0.5), **arguments)  # type: ignore[arg-type]
        parameter.square().sum().backward()
        optimizer.step()
        assert float(parameter.detach()) == 0.0
    assert gd.init() == world  # torch's group is there already, and taken as it is
    with pytest.raises(ConfigError, match="backend = 'nccl', but the process group has 'gloo'"):
        gd.init("nccl")
