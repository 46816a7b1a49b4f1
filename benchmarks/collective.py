"""Neighbours instead of all: one message to one peer against an all-reduce, on real processes over gloo.

``exchange``: `neighbor_allreduce` of 10^6 floats over a one-peer graph, another peer every round, against
`torch.distributed.all_reduce` of as many, with 4 and with 16 processes. ``training``: `DecentralizedOptimizer` over the
one-peer exponential graph against DistributedDataParallel, the same model and batches, 4 processes: samples a second,
and, over sockets, the bytes that a process sends, as the operating system counts those of its connections and as
gossamer does.
``sums``: the exchange of engine collective, sums completed in shards in the order of a tree, against `all_reduce` of
as many floats, 4 processes. ``round``: a round of the CNN of federated_round.py on 2 ranks of engine collective, on 2
workers of the local engine, and by pfl under torchrun. ``memory``: the peak memory of a rank, by the number of ranks.

Contenders run in turn, each in processes of its own, which all are of one machine and talk over loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

from harness import HERE, RIVALS, Gate, Report, contenders, interleave, machine, summary

sys.path.insert(0, str(RIVALS))

import torch
import torch.distributed as dist
from common import RoundClock
from torch import Tensor, nn

import gossamer.distributed as gd
from gossamer.aggregate import TreeSum
from gossamer.engines.collective.clients import sums_of_all
from gossamer.engines.collective.group import Group
from gossamer.memory import keep_freed_memory
from rank_memory import measure_memory

NUM_FLOATS = 1_000_000
EXCHANGES = {"one-peer-exp": "one-peer-exp", "od-equidyn": "od-equidyn-complete"}  # contenders, and their topologies
GOALS = {4: 0.6, 16: 0.25}  # of exchange / all-reduce, by processes
SOCKETS = " over sockets"  # of the name of a contender that does without shared memory
BATCH_SIZE, WIDTH = 32, 700  # of a model of about 1.05 million parameters
PORT_DIGITS = 5
TCP_INFO = 11  # Linux: option of a socket; uint64 at 200 and 208: bytes sent, and of these again
Round = Callable[[int], object]


@dataclass(frozen=True)
class Rounds:
    """How many rounds a process runs.

    Attributes:
        rounds: timed ones.
        warmup: rounds before.
    """

    rounds: int
    warmup: int

    @property
    def total_rounds(self) -> int:
        """All of them."""
        return self.rounds + self.warmup


# ---- one process of a contender


def exchange(contender: str) -> Round:
    """Return what exchanges 10^6 floats once."""
    own = torch.zeros(NUM_FLOATS)  # whose sums stay finite
    if contender == "sums_of_all":
        keep_freed_memory()  # as ranks do
        group = Group.of_environment()

        def add_up(number: int) -> None:
            """Complete the sum of all ranks once."""
            tree = TreeSum(group.size)
            tree.add(group.rank, own)
            sums_of_all(group, {(0, "x"): tree})

        return add_up
    if contender == "all_reduce":
        return lambda number: dist.all_reduce(own)
    graph = gd.topology(EXCHANGES[contender])
    return lambda number: gd.neighbor_allreduce(own, topology=graph, round=number)


def training(contender: str) -> Round:
    """Return what takes one training step."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    mode = contender.removesuffix(SOCKETS)
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if mode != "ddp":
        optimizer = gd.DecentralizedOptimizer(optimizer, gd.topology("one-peer-exp"), mode)  # type: ignore[arg-type]
    x, y = torch.rand(BATCH_SIZE, 784), torch.randint(10, (BATCH_SIZE,))

    def step(number: int) -> None:
        """Take one training step."""
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def bytes_of_sockets() -> int:
    """Return how many bytes this process has sent over its connections, as the operating system counts them."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as one:
                sent, again = struct.unpack_from("QQ", one.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256), 200)
                total += sent - again
    return total


def run_rank(kind: str, contender: str, options: Rounds) -> None:
    """Run all rounds; rank 0 prints their JSON."""
    world = gd.init(timeout_seconds=120, shared_memory=not contender.endswith(SOCKETS))
    one_round = (training if kind == "training" else exchange)(contender)
    clock = RoundClock(options) if world.rank == 0 else None
    counted = sent = 0
    for number in range(options.total_rounds):
        if number == options.warmup:
            dist.barrier()  # what was sent before has left
            counted, sent = gd.bytes_sent(), bytes_of_sockets()
        one_round(number)
        if clock is not None:
            clock.tick()
    dist.barrier()
    every = torch.tensor([gd.bytes_sent() - counted, bytes_of_sockets() - sent], dtype=torch.float64)
    dist.all_reduce(every)
    if clock is not None:
        per_rank: Tensor = every / world.size / options.rounds
        report = {
            "contender": contender,
            "round_seconds": clock.round_seconds()[options.warmup :],
            "first_round_seconds": clock.round_seconds()[0],
            "readings": clock.readings,
            "counted_bytes": float(per_rank[0]),
            "system_bytes": float(per_rank[1]),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
        }
        print(json.dumps(report), flush=True)
    gd.shutdown()


def run_ranks(kind: str, contender: str, size: int, options: Rounds) -> None:
    """Fork the processes of a contender, in the environment that torchrun would give them, and wait for them.

    Raises:
        SystemExit: one of them failed.
    """
    torch.set_num_threads(1)
    told, tell = os.pipe()
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            port = os.read(told, PORT_DIGITS).decode()
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            os.environ.update(shared | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            code = 1
            try:
                run_rank(kind, contender, options)
                code = 0
            except Exception as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
            os._exit(code)
        processes.append(process)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after forks, for it has a thread
    os.write(tell, f"{store.port:0{PORT_DIGITS}d}".encode() * size)
    if sum(os.waitpid(process, 0)[1] for process in processes):
        raise SystemExit(1)


# ---- all contenders


def measured(kind: str, sizes: Mapping[str, int], arguments: argparse.Namespace, gate: Gate) -> dict[str, Report]:
    """Run contenders, ``{name: processes}``, in turn and sum up."""
    rounds = ["--rounds", str(arguments.rounds), "--warmup", str(arguments.warmup)]
    commands = {
        name: [sys.executable, str(HERE / "collective.py"), "rank", kind, name, str(size), *rounds]
        for name, size in sizes.items()
    }
    trials = interleave(commands, arguments.repeats, gate)
    found = summary(trials)
    for name, of_one in trials.items():
        for key in ("counted_bytes", "system_bytes"):
            found[name][key] = statistics.median(run[key] for run in of_one.results)
    return found


def measure_exchange(arguments: argparse.Namespace, gate: Gate) -> Report:
    """Return the exchange of 10^6 floats with one neighbour against the all-reduce, and whether goals are met."""
    cases, goals = {}, {}
    for size, most in GOALS.items():
        case = f"{NUM_FLOATS:,} floats, {size} processes"
        found = cases[case] = measured("exchange", dict.fromkeys([*EXCHANGES, "all_reduce"], size), arguments, gate)
        for name in EXCHANGES:
            ratio = found[name]["seconds_per_round"] / found["all_reduce"]["seconds_per_round"]
            goals[f"{case}: {name} / all_reduce"] = gate.goal(ratio, most)
    return {"cases": cases, "goals": goals}


def measure_training(arguments: argparse.Namespace, gate: Gate, size: int = 4) -> Report:
    """Return samples a second and bytes a step of a process, of our optimizer and of DistributedDataParallel."""
    modes = ["adapt-then-combine", "combine-while-adapt"]
    names = [*modes, *(mode + SOCKETS for mode in modes), "ddp"]
    found = measured("training", dict.fromkeys(names, size), arguments, gate)
    goals = {}
    for name, one in found.items():
        one["samples_per_second"] = size * BATCH_SIZE / one["seconds_per_round"]
        if name.endswith(SOCKETS):
            excess = abs(one["system_bytes"] / one["counted_bytes"] - 1)
            goals[f"{name}: bytes of the system against those counted, relative difference"] = gate.goal(excess, 0.01)
    return {"cases": {f"{size} processes, batches of {BATCH_SIZE}": found}, "goals": goals}


def measure_sums(arguments: argparse.Namespace, gate: Gate, size: int = 4) -> Report:
    """Return the sums of engine collective against the all-reduce."""
    found = measured("sums", dict.fromkeys(["sums_of_all", "all_reduce"], size), arguments, gate)
    ratio = found["sums_of_all"]["seconds_per_round"] / found["all_reduce"]["seconds_per_round"]
    case = f"{NUM_FLOATS:,} floats, {size} processes"
    return {"cases": {case: found}, "goals": {f"{case}: sums_of_all / all_reduce": gate.goal(ratio, 1.2)}}


def measure_round(arguments: argparse.Namespace, gate: Gate) -> Report:
    """Return a round of a federation on two ranks against two workers of the local engine, and pfl on two ranks."""
    options = ["--model", "cnn", "--rounds", str(min(arguments.rounds, 10))]
    ours = [sys.executable, str(HERE / "gossamer_round.py"), *options]
    commands = {
        "collective": [*ours, "--ranks", "2"],
        "local": [*ours, "--workers", "2"],
        "pfl": contenders(options)["pfl"],
    }
    found = summary(interleave(commands, arguments.repeats, gate))
    seconds = found["collective"]["seconds_per_round"]
    goals = {
        f"collective / {name}": gate.goal(seconds / found[name]["seconds_per_round"], most)
        for name, most in {"local": 1.05, "pfl": 0.85}.items()
    }
    return {"cases": {"cnn, 10 of 100 clients, 2 processes": found}, "goals": goals}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["exchange", "training", "sums", "round", "memory"]
    parser.add_argument("--only", choices=parts, help="measure one")
    parser.add_argument("--repeats", type=int, default=3, help="times that each contender is started")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds each time")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    measures = {
        "exchange": measure_exchange,
        "training": measure_training,
        "sums": measure_sums,
        "round": measure_round,
        "memory": lambda arguments, gate: measure_memory(),
    }
    found = {name: measure(arguments, gate) for name, measure in measures.items() if arguments.only in (None, name)}
    print(json.dumps({"benchmark": "collective", "machine": before, **gate.report(), **found}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        kind, contender, size, _, rounds, _, warmup = sys.argv[2:]
        run_ranks(kind, contender, int(size), Rounds(rounds=int(rounds), warmup=int(warmup)))
    else:
        main()
