"""Strike at runs at random, and compare what comes out with runs of the local engine that nobody touched.

With --engine ray (the default) actors, drivers and nodes are killed or stopped, see faults_on_ray.py; with --engine
collective ranks of torchrun are, or asked to stop, or refused by the disk, see faults_on_ranks.py; with --engine
network servers, clients and the line between them, see faults_on_network.py. The local engine has kill_and_resume.py.

A fault counts where it has fired. Each run must end with the hash and the metrics of its reference, and none may hang.
Prints one JSON object; exits with 1 if anything differs.

With --memory ROUNDS, prints instead how fast memory of runs on Ray grows over that many calm rounds, after
WARM_UP_ROUNDS: private memory, of one process only, and apart from it pages of the object store, which count for all
who have touched them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import kill_and_resume

ENGINES = {  # {engine: module with EXPERIMENTS, KINDS, NUM_FAULTS and `measure`}
    "ray": "faults_on_ray",
    "collective": "faults_on_ranks",
    "network": "faults_on_network",
}


def main() -> int:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="ray")
    parser.add_argument("--faults", type=int, help="default: 200, on ranks 40")
    parser.add_argument("--experiments", nargs="+", help="some of the engine's; default: all")
    parser.add_argument("--kinds", nargs="+", help="of faults, with --engine network; default: all")
    parser.add_argument("--memory", type=int, metavar="ROUNDS")
    parser.add_argument("--seed", type=int, default=0, help="of runs and faults; when one falls may also be chance")
    options = parser.parse_args()
    module = importlib.import_module(ENGINES[options.engine])
    if unknown := [name for name in options.experiments or () if name not in module.EXPERIMENTS]:
        parser.error(f"--experiments {unknown[0]}: name some of {', '.join(module.EXPERIMENTS)}")
    if options.kinds and options.engine != "network":
        parser.error("--kinds is for --engine network: leave it out")
    if unknown := [name for name in options.kinds or () if name not in module.KINDS]:
        parser.error(f"--kinds {unknown[0]}: name some of {', '.join(module.KINDS)}")
    if options.memory and options.engine != "ray":
        parser.error("--memory is about Ray: leave --engine out")
    options.faults = options.faults or module.NUM_FAULTS
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = module.measure(options, Path(folder))
    summary = {"benchmark": "faults", "engine": options.engine, **found, "versions": kill_and_resume.versions()}
    summary |= {"num_cpus": os.cpu_count(), "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(summary, indent=2))
    is_well = found.get("all_equal", True) and not found.get("left_behind") and not found.get("hung")
    return 0 if is_well and found.get("faults", options.faults) == options.faults else 1


if __name__ == "__main__":
    sys.exit(main())
