"""Which algorithms and codecs go with buffers that a forward pass changes."""

from __future__ import annotations

from typing import Any

from gossamer.algorithms.base import Algorithm
from gossamer.config.communication import make_communication
from gossamer.config.schema import Config
from gossamer.errors import ConfigError
from gossamer.workloads.base import Workload

WHERE = "workload.buffers"


def require_averages(config: Config, algorithm: Algorithm, workload: Workload) -> None:
    """Refuse what would do something else with buffers than average them, or leave them where they are.

    Raises:
        ConfigError: the algorithm or a codec would.
    """
    if not workload.buffers:
        return
    name, given = config.algorithm["name"], config.workload.get("buffers")
    if not algorithm.averages:
        remedy: Any = "fedavg" if config.peers is None else "dsgd"
        raise ConfigError(
            f"{WHERE} = {given!r} does not go with algorithm {name!r} and its options, because it does more with what"
            f" participants trained than to average it, and buffer {workload.buffers[0]!r} is no parameter: choose"
            f" {remedy}, or a model without such buffers"
        )
    made = make_communication(config.communication)
    if not workload.personal and (made.uplink is not None or made.downlink is not None):
        raise ConfigError(
            f"{WHERE} = {given!r} does not go with communication, whose codecs may make anything of them, such as"
            " variances below 0: leave it out, or keep the buffers personal"
        )
