"""Run a script that times rounds, and wait before each of them; see revisions.py.

turns.py GO DONE SCRIPT ...: the script of the working directory runs as it is, but at the end of each round its seconds
are written to the file descriptor DONE, and the next round starts once a byte can be read from GO.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import time

sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "rivals")]
common = importlib.import_module("common")

_tick = common.RoundClock.tick
_began = [time.perf_counter()]


def tick(clock: object) -> None:
    """End a round, tell, and wait."""
    seconds = time.perf_counter() - _began[0]
    _tick(clock)
    os.write(int(done), f"{seconds}\n".encode())
    os.read(int(go), 1)
    _began[0] = time.perf_counter()


_, go, done, *sys.argv = sys.argv
common.RoundClock.tick = tick
runpy.run_path(sys.argv[0], run_name="__main__")
