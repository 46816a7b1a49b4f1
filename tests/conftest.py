"""Makes what the tests share importable by name, plug-ins included, and computes with one thread.

Several threads would fight with the workers that tests start, and with other tests, for the same few processors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent

sys.path[:0] = [str(HERE), str(HERE / "plugins")]
torch.set_num_threads(1)
