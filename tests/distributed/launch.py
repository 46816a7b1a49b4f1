"""Runs checks on several real ranks: ``python launch.py SIZE FOLDER MODULE...``; the environment is that of torchrun.

Ranks are forked from one process that has imported torch, because imports are most of what starting costs. Each writes
FOLDER/RANK.json: ``{name of a check: what went wrong, or ""}``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
NUM_STORES, PORT_DIGITS = 2, 5


def become_rank(rank: int, size: int, ports: list[int]) -> None:
    """Set what torchrun sets; PORTS are those of further groups, one after another."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(ports[0]),
        TORCHELASTIC_USE_AGENT_STORE="True",
        PORTS=",".join(map(str, ports[1:])),
    )


def run_checks(rank: int, folder: Path, modules: list[str]) -> None:
    """Run all checks of some modules in their order, and write down what went wrong."""
    found: dict[str, str] = {}
    checks = {name: each for module in modules for name, each in vars(importlib.import_module(module)).items()}
    for name in [name for name in checks if name.startswith("check_")]:
        try:
            checks[name](rank)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))


def main() -> None:
    """Start the ranks and wait for them."""
    size, folder, modules = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.path[:0] = [str(HERE), str(HERE.parent / "algorithms" / "decentralized")]
    torch.set_num_threads(1)
    told, tell = os.pipe()
    for name in ("gossamer.build", "scipy.sparse.csgraph", "networkx", "torch._dynamo"):
        importlib.import_module(name)  # which every rank would do anew
    gc.freeze()  # or this process would look through all of that as it ends
    ranks = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                ports = os.read(told, NUM_STORES * PORT_DIGITS).decode()
                become_rank(rank, size, [int(ports[:PORT_DIGITS]), int(ports[PORT_DIGITS:])])
                run_checks(rank, folder, modules)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks.append(process)
    # After forks, for stores have threads.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(NUM_STORES)]
    os.write(tell, "".join(f"{store.port:0{PORT_DIGITS}d}" for store in stores).encode() * size)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0 for process in ranks))


if __name__ == "__main__":
    main()
