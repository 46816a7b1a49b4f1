"""gossamer: decentralized and federated training of one model over many machines that do not share their data.

Public names are loaded when they are first used, so that ``import gossamer`` costs little more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer import aggregate, distributed, submodel, sweep, testing, topology
    from gossamer.api import resume, run
    from gossamer.experiment import Run
    from gossamer.results.loading import LoadedRun, load

__version__ = "0.1.0"
__all__ = [
    "LoadedRun",
    "Run",
    "__version__",
    "aggregate",
    "distributed",
    "load",
    "resume",
    "run",
    "submodel",
    "sweep",
    "testing",
    "topology",
]

_MODULES = ("aggregate", "distributed", "submodel", "sweep", "testing", "topology")
_HOMES = {
    "run": "gossamer.api",
    "resume": "gossamer.api",
    "Run": "gossamer.experiment",
    "load": "gossamer.results.loading",
    "LoadedRun": "gossamer.results.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gossamer.{name}")
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)
