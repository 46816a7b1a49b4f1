"""How xdist hands out tests: in whole files, so that what the tests of a module share is made once; long ones first."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

# Fixtures of a session that take long to make: all files that use one go to the same worker.
SHARED = ("one_ray", "decoded_once")
# Files and folders that take longest, and so come first, in this order.
LONG = (
    "engines/ray",
    "engines/collective",
    "distributed",
    "faults",
    "transport",
    "test_sweep.py",
    "test_api.py",
    "test_plugin_errors.py",
    "engines",
    "workloads/multimodal",
    "test_p",
    "test_r",
    "cli",
    "algorithms",
    "results",
    "test_",
)


def turn(nodeid: str) -> int:
    """Return when a test has its turn: the lowest number first."""
    path = nodeid.removeprefix("tests/")
    return next((number for number, name in enumerate(LONG) if path.startswith(name)), len(LONG))


@cache
def shared(file: Path) -> str | None:
    """Return the name in `SHARED` that a file mentions; None if it mentions none."""
    text = file.read_text(encoding="utf-8")
    return next((name for name in SHARED if name in text), None)


class ByFile(LoadFileScheduling):
    """Hands out files; those that use the same of the `SHARED` fixtures together."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the unit that a test is handed out with."""
        file = str(super()._split_scope(nodeid))
        return shared(self.config.rootpath / file) or file
