"""What goes wrong on real ranks, each on two of its own: ``python endings.py FOLDER``; the environment is torchrun's.

Ranks are forked from one process, as in launch.py, and end as any program does: nothing here catches what they raise.
Writes FOLDER/endings.json: ``{name: [[exit code, what was said on standard error] of each rank]}``; null: it hung.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import become_rank

import gossamer.distributed as gd
from gossamer.cli.main import main as command_line
from gossamer.engines.collective import serving
from gossamer.registry import resolve

SIZE = 2
LIMIT_SECONDS = 40.0
CLIENTS: dict[str, Any] = {
    "rounds": 1,
    "workload": {"name": "least-squares", "dim": 3, "num_samples": 4},
    "clients": {"num": 4, "per_round": 4},
    "train": {"steps": 1, "batch_size": 4, "lr": 0.1},
    "algorithm": "fedavg",
}
PEERS = {name: value for name, value in CLIENTS.items() if name != "clients"} | {"algorithm": "dsgd"}
LINKS = ("0 1\n1 2\n2 3\n3 0\n", "0 1\n1 2\n2 3\n")


def run(config: dict[str, Any], *arguments: str) -> None:
    """Be the command line, with a configuration."""
    Path(f"{os.environ['RANK']}.yaml").write_text(json.dumps(config))
    sys.argv = ["gossamer", "run", f"{os.environ['RANK']}.yaml", "--engine", "collective", "--out", "out", *arguments]
    command_line()


def another_file(rank: int) -> None:
    """Run with another seed on each rank."""
    try:
        run(CLIENTS | {"seed": rank})
    finally:
        assert not Path("out").exists()


def another_version(rank: int) -> None:
    """Run with another version of a package on one rank."""
    if rank:
        serving.version = lambda name: "0.0.1"  # type: ignore[attr-defined]
    run(CLIENTS)


def another_topology(rank: int) -> None:
    """Run with other links on each rank."""
    folder = Path(str(rank))
    folder.mkdir()
    os.chdir(folder)
    Path("links.edges").write_text(LINKS[rank])
    run(PEERS | {"peers": {"num": 4, "topology": {"name": "file", "path": "/proc/self/cwd/links.edges"}}})


def other_data(rank: int) -> None:
    """Run with more samples on one rank."""
    problem = resolve("workload", "least-squares")
    make = problem.__init__

    def made(self: Any, *arguments: Any, **named: Any) -> None:
        """Have more samples on one rank."""
        make(self, *arguments, **named)
        self.num_samples = self.num_samples + rank

    problem.__init__ = made
    run(CLIENTS)


def more_ranks_than_clients(rank: int) -> None:
    """Run one client on several ranks."""
    run(CLIENTS | {"clients": {"num": 1, "per_round": 1}})


def no_such_interface(rank: int) -> None:
    """Run over a network interface that does not exist."""
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    run(CLIENTS)


def no_cuda_device(rank: int) -> None:
    """Run on a CUDA device."""
    run(CLIENTS, "--device", "cuda")


def without_torchrun(rank: int) -> None:
    """Begin without what torchrun sets."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ["RANK"] = str(rank)  # by which this file tells its own ranks
    gd.init()


def nccl_without_devices(rank: int) -> None:
    """Begin with NCCL."""
    gd.init("nccl")


def no_interface_of_ones_own(rank: int) -> None:
    """Begin with an interface that does not exist."""
    gd.init(interface="nowhere0")


def weights_that_do_not_sum(rank: int) -> None:
    """Give one rank weights that do not sum to 1."""
    gd.init(timeout_seconds=10)
    own, other = torch.zeros(2), 1 - rank
    gd.neighbor_allreduce(own, self_weight=0.5, src_weights={other: 0.7 if rank else 0.5})


def shapes_that_differ(rank: int) -> None:
    """Give each rank a tensor of another shape."""
    gd.init(timeout_seconds=10)
    gd.neighbor_allreduce(torch.zeros(2 + rank), topology=gd.topology("complete"))


def a_rank_that_ends(rank: int) -> None:
    """Let the ranks do different numbers of exchanges."""
    gd.init(timeout_seconds=10)
    gd.allreduce(torch.zeros(2))
    if rank == 0:
        gd.allreduce(torch.zeros(2))


def a_world_that_changed(rank: int) -> None:
    """Exchange after the process group was destroyed."""
    gd.init(timeout_seconds=10)
    dist.destroy_process_group()
    gd.allreduce(torch.zeros(2))


def an_error_of_ones_own(rank: int) -> None:
    """Raise an error that is none of gossamer's."""
    gd.init(timeout_seconds=10)
    raise ArithmeticError("cannot count")


CASES: list[Callable[[int], None]] = [
    another_file,
    another_version,
    another_topology,
    other_data,
    more_ranks_than_clients,
    no_such_interface,
    no_cuda_device,
    without_torchrun,
    nccl_without_devices,
    no_interface_of_ones_own,
    weights_that_do_not_sum,
    shapes_that_differ,
    a_rank_that_ends,
    a_world_that_changed,
    an_error_of_ones_own,
]


def stores(num: int) -> tuple[int, list[int]]:
    """Fork a process that holds torch's stores; returns it, and their ports."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(num)]
        os.write(writing, json.dumps([store.port for store in held]).encode())
        os.close(writing)
        signal.pause()
    os.close(writing)
    with open(reading) as file:
        return pid, json.load(file)


def start(case: Callable[[int], None], port: int, folder: Path) -> list[int] | None:
    """Fork the ranks of a case; returns their processes, and None in each of them, once it has become a rank."""
    folder.mkdir()
    found = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, SIZE, [port])
            os.environ |= {"TORCHELASTIC_RUN_ID": "endings", "TORCHELASTIC_RESTART_COUNT": "0"}
            os.chdir(folder)
            errors = os.open(f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(errors, 2)
            return None
        found.append(pid)
    return found


def ended(pids: list[int], folder: Path) -> list[tuple[int, str]] | None:
    """Wait for ranks; returns how each ended, or None if they had to be killed."""
    deadline, codes = time.monotonic() + LIMIT_SECONDS, dict[int, int]()
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        time.sleep(0.01)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if len(codes) < len(pids):
        return None
    return [(codes[pid], (folder / f"{rank}.txt").read_text()) for rank, pid in enumerate(pids)]


torch.set_num_threads(1)
for name in ("gossamer.experiment", "networkx", "rich.console", "torch._dynamo"):
    importlib.import_module(name)  # which every rank would do anew
gc.freeze()  # or each would look through all that was imported as it ends, for most of its time
results: dict[str, list[tuple[int, str]] | None] = {}
holder, ports = stores(len(CASES))
for case, port in zip(CASES, ports, strict=True):
    where = Path(sys.argv[1]) / case.__name__
    processes = start(case, port, where)
    if processes is None:
        case(int(os.environ["RANK"]))
        sys.exit(0)
    results[case.__name__] = ended(processes, where)
os.kill(holder, signal.SIGKILL)
os.waitpid(holder, 0)
(Path(sys.argv[1]) / "endings.json").write_text(json.dumps(results))
