"""What ranks find when they rebuild a task, and must find alike: the graph, and how much data there are."""

from __future__ import annotations

from collections.abc import Mapping

from gossamer.engines.task import Task
from gossamer.errors import ConfigError
from gossamer.workloads.digests import digest_of


def digests(task: Task) -> dict[str, str]:
    """Return digests, by part, of what a task read from files, or drew."""
    found = {"data": digest_of(task.workload.num_samples)}  # of all numbers it would take to read what others train on
    return found if task.topology is None else found | {"topology": task.topology.digest()}


def require_same(task: Task, expected: Mapping[str, str]) -> None:
    """Compare a task with that of rank 0.

    Args:
        task: as this rank has rebuilt it.
        expected: what rank 0 has, see `digests`.

    Raises:
        ConfigError: a part differs.
    """
    for part, digest in digests(task).items():
        if digest != expected[part]:
            raise ConfigError(
                f"its {part} has the digest {digest[:12]}, but rank 0's has {expected[part][:12]}: give all ranks the"
                " same files"
            )
