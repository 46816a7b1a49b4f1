"""Run experiments/engines on each engine; plot, and compare final parameters.

    python experiments/engines/compare.py OUT [--figure FILE]

Prints a table: for each method the SHA-256 of its final parameters on each engine. Of engine network, the federation is
a server and five processes that dial it, the peers five processes that dial each other. Ends with exit code 1 if two
differ.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import gossamer

HERE = Path(__file__).parent
GOSSAMER = ("-m", "gossamer")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
ENGINES = {
    "local": (GOSSAMER, ("engine.workers=2",)),
    "ray": (GOSSAMER, ("--engine", "ray", "engine.workers=2")),
    "collective": ((*TORCHRUN, "--rdzv-endpoint", "127.0.0.1:0", *GOSSAMER), ("--engine", "collective")),
    "network": (GOSSAMER, ("--engine", "network", "engine.workers=5")),
}
METHODS = ("federation", "peers")


def digest(directory: Path) -> str:
    """Return the SHA-256 of a run's final parameters."""
    found = hashlib.sha256()
    for name, value in sorted(gossamer.load(directory).state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    """Run, plot and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    for name, (command, options) in ENGINES.items():
        run = [sys.executable, *command, "run", str(HERE / "config.yaml"), *options]
        subprocess.run([*run, "--out", str(given.out / name), "--quiet"], check=True)
    figure = given.figure or given.out / "engines.png"
    directories = [str(given.out / name) for name in ENGINES]
    plot = [sys.executable, *GOSSAMER, "plot", *directories, "--spec", str(HERE / "plot.yaml"), "-o", str(figure)]
    subprocess.run(plot, check=True)
    same = True
    for method in METHODS:
        hashes = {name: digest(given.out / name / method) for name in ENGINES}
        same &= len(set(hashes.values())) == 1
        print(method, *(f"{name} {value[:16]}" for name, value in hashes.items()))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
