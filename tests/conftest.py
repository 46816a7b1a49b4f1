"""Makes what the tests share importable by name: `federation`, `contract`, and the plug-ins that configurations name."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

sys.path[:0] = [str(HERE), str(HERE / "plugins")]
