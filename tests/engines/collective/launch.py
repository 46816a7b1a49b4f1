"""Starts ranks as torchrun does, but sooner: ``python launch.py SIZE ARGUMENT...``, with the arguments of ``python``.

They are forked from one process that has imported torch, because imports are most of what starting costs. If one fails,
the others are asked to stop.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist

PORT_DIGITS = 5


def become_rank(rank: int, size: int, port: int) -> None:
    """Set what torchrun sets."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )


def run(arguments: Sequence[str]) -> int:
    """Run a script, or a module after ``-m``, and return its exit code."""
    is_module = arguments[0] == "-m"
    name, *_ = sys.argv = list(arguments[is_module:])
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(name)
    try:
        (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Start the ranks and wait for them."""
    size, arguments = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    told, tell = os.pipe()
    for name in ("gossamer.cli.main", "gossamer.experiment", "gossamer.engines.collective.serving"):
        importlib.import_module(name)  # which every rank would do anew
    gc.freeze()  # or each process would look through all of that as it ends
    ranks, code = set[int](), 0
    for rank in range(size):
        process = os.fork()
        if process == 0:
            become_rank(rank, size, int(os.read(told, PORT_DIGITS)))
            ended = run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended)
        ranks.add(process)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after forks, for it has a thread
    os.write(tell, f"{store.port:0{PORT_DIGITS}d}".encode() * size)
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status and not code:
            code = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    sys.exit(code)


if __name__ == "__main__":
    main()
