"""The federation of benchmarks/rivals on machines: this process is the server, and each client a process that dials it.

The data are those of gossamer_round.py; every client makes all of them, and keeps its part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gossamer_round
from building import initial_model, parts_of, read_config
from gossamer import experiment
from gossamer.workloads.datasets import ImageData
from networks import free_port

HERE = Path(__file__).parent
VARIABLE = "GOSSAMER_BENCHMARK_DATA"  # clients, samples of each and seed


def dataset(options: Mapping[str, Any]) -> ImageData:
    """Make the data of all clients."""
    return gossamer_round.make_data(*map(int, os.environ[VARIABLE].split()))


def client(number: int, address: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a client."""
    command = [sys.executable, "-m", "gossamer", "node", "client", "--server", address, "--simulate", str(number)]
    command += ["--trust", "--linger", "0", "--directory", str(folder / f"client-{number}")]
    with (folder / f"client-{number}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    from common import RoundClock, flatten, make_parser, read_options, report

    parser = make_parser("FedAvg by gossamer's server and clients.")
    gossamer_round.add_options(parser)
    options, own = read_options(parser)
    os.environ[VARIABLE] = f"{options.clients} {options.samples} {options.seed}"
    paths = (str(HERE), str(HERE / "rivals"), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.modules.setdefault("gossamer_network", sys.modules["__main__"])
    torch.set_num_threads(1)
    address = f"127.0.0.1:{free_port()}"
    config = gossamer_round.configuration(options, own)
    config["workload"]["dataset"] = "gossamer_network:dataset"
    config["engine"] = {"name": "network", "address": address}
    with tempfile.TemporaryDirectory() as directory:
        folder, clock = Path(directory), RoundClock(options)
        clients = [client(number, address, folder) for number in range(options.clients)]
        hooks = experiment.Hooks(observer=lambda name, rounds: gossamer_round.Watch(clock))
        try:
            run = experiment.run(config, out=folder / "run", hooks=hooks, trust=True)
            codes = [process.wait(30) for process in clients]
        finally:
            for process in clients:
                process.kill()
        assert not any(codes)
        clock.ended.pop()
        resolved = read_config(run.directory)
        before = flatten(initial_model(parts_of(resolved), options.seed).values())
        after, packages = flatten(run.params.values()), ("torch", "numpy", "grpcio")
        report("gossamer", options, clock, before, after, packages, processes=options.clients)


if __name__ == "__main__":
    main()
