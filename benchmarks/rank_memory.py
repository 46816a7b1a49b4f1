"""Memory of the ranks of engine collective: its peak above that of a process that has imported torch.

``state``: peers that have a large model each, whose rows lie with their ranks. ``arrays`` and ``table``: peers of a
small model on memory-mapped arrays, and on a table in parquet, of which a rank keeps the samples of its own peers.
Each runs on 1, 2 and 4 ranks. Beside the largest peak of a rank stands a lower bound: the bytes of all rows, or of all
samples for training, divided by the ranks. Peaks are the kernel's (``VmHWM``), so pages of files that are mapped count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

RANKS = (1, 2, 4)
NUM_PEERS, HIDDEN = 64, 8000  # models of about 0.6 million parameters: 154 MB in all
NUM_SAMPLES, NUM_FEATURES = 200_000, 256  # 205 MB
NUM_TEST = 1000
Report = dict[str, Any]


def memory(name: str) -> int:
    """Return an entry of this process's memory in bytes, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


# ---- one rank


def run_rank(config: Path, out: Path) -> None:
    """Run an experiment on this rank, and write its memory beside it."""
    import torch

    torch.set_num_threads(1)
    before = memory("VmRSS")
    from gossamer import experiment

    experiment.run(json.loads(config.read_text()), out=out)
    found = {"before_bytes": before, "peak_bytes": memory("VmHWM")}
    (out.parent / f"{out.name}.{os.environ['RANK']}.json").write_text(json.dumps(found))


# ---- all of them


def write_samples(folder: Path) -> None:
    """Write the same samples as memory-mapped arrays and as a table of many row groups."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = np.random.default_rng(0)
    x = source.standard_normal((NUM_SAMPLES, NUM_FEATURES), dtype=np.float32)
    y = source.integers(0, 10, NUM_SAMPLES)
    (folder / "arrays").mkdir()
    for split, rows in {"train": slice(None), "test": slice(NUM_TEST)}.items():
        np.save(folder / "arrays" / f"x_{split}.npy", x[rows], allow_pickle=False)
        np.save(folder / "arrays" / f"y_{split}.npy", y[rows], allow_pickle=False)
        columns = {f"f{number}": x[rows, number] for number in range(NUM_FEATURES)} | {"label": y[rows]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet", row_group_size=5000)
    bounds = np.linspace(0, NUM_SAMPLES, NUM_PEERS + 1).astype(int).tolist()
    parts = [list(range(low, high)) for low, high in pairwise(bounds)]
    (folder / "parts.json").write_text(json.dumps(parts))


def configurations(folder: Path) -> dict[str, Report]:
    """Return an experiment of each case."""
    shared = {
        "rounds": 2,
        "algorithm": "dsgd",
        "train": {"lr": 0.1, "batch_size": 32, "steps": 2},
        "checkpoint": {"every_seconds": 0},
        "engine": {"name": "collective", "modes": {"stacked": False}},
    }
    peers = {"num": NUM_PEERS, "topology": "one-peer-exp"}
    in_order = peers | {"partition": {"name": "file", "path": str(folder / "parts.json")}}
    synthetic = {"name": "synthetic", "num_train": 2000, "num_test": 100}
    table = {"name": "table", "path": str(folder / "train.parquet"), "test_path": str(folder / "test.parquet")}
    arrays = {"name": "arrays", "path": str(folder / "arrays")}
    wide = {"name": "mlp", "hidden": [HIDDEN]}
    return {
        "state": shared | {"peers": peers, "workload": {"dataset": synthetic, "model": wide}},
        "arrays": shared | {"peers": in_order, "workload": {"dataset": arrays, "model": "softmax"}},
        "table": shared | {"peers": in_order, "workload": {"dataset": table, "model": "softmax"}},
    }


def peaks(folder: Path, name: str, config: Report, num_ranks: int) -> list[Report]:
    """Run a case on ranks that torchrun starts; return what each tells of its memory.

    Raises:
        SystemExit: the run failed.
    """
    out = folder / f"{name}-{num_ranks}"
    (folder / f"{name}.json").write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(folder / f"{name}.json"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return [json.loads((folder / f"{out.name}.{rank}.json").read_text()) for rank in range(num_ranks)]


def measure_memory() -> Report:
    """Return the largest peak of a rank in each case, and the least that it could be."""
    import gossamer

    cases: Report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder)
        for case, config in configurations(folder).items():
            cases[case] = {}
            for num_ranks in RANKS:
                found = peaks(folder, case, config, num_ranks)
                num_bytes = 4 * NUM_SAMPLES * NUM_FEATURES
                if case == "state":
                    params = gossamer.load(folder / f"{case}-{num_ranks}").params
                    num_bytes = 4 * NUM_PEERS * sum(value.numel() for value in params.values())
                above = [one["peak_bytes"] - one["before_bytes"] for one in found]
                cases[case][f"{num_ranks} ranks"] = {
                    "largest_peak_above_torch_mb": round(max(above) / 1e6, 1),
                    "peaks_above_torch_mb": [round(one / 1e6, 1) for one in above],
                    "bound_mb": round(num_bytes / num_ranks / 1e6, 1),
                }
    return {"cases": cases}


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))
