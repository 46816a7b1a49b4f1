"""What is counted from round to round, the record of a round, and who watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer.plan import RoundPlan

Record = dict[str, Any]


class Observer(Protocol):
    """Watches a run, for example to draw a progress bar."""

    def on_block(self, round: int, done: int, total: int) -> None:
        """`done` of `total` participants of a round (counted from 0) are trained."""
        ...

    def on_round(self, record: Mapping[str, Any]) -> None:
        """A round was logged; its ``"round"`` counts the rounds done."""
        ...


@dataclass
class Progress:
    """What the loop carries from round to round beside the engine's state; goes into every commit."""

    round: int = 0
    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    total_bytes_up: int = 0
    total_bytes_down: int = 0
    total_client_flops: float = 0.0

    def add(self, costs: RoundCosts, seconds: float) -> None:
        """Count one more round that cost `costs` and took `seconds` of wall-clock time."""
        self.round += 1
        self.wall_seconds += seconds
        self.simulated_seconds += costs.simulated_seconds
        self.total_bytes_up += costs.bytes_up
        self.total_bytes_down += costs.bytes_down
        self.total_client_flops += costs.client_flops


def round_record(
    progress: Progress,
    plan: RoundPlan,
    costs: RoundCosts,
    losses: NDArray[np.float64],
    seconds: float,
    phase_seconds: Mapping[str, float],
) -> Record:
    """Return a round's line of metrics.jsonl, without the workload's metrics.

    Args:
        progress: totals, this round included.
        plan: the round's plan; its participants are those that train, its dropped ones those that were late.
        costs: the round's own; the simulated seconds of transfers and computation are sums over devices, see
            `RoundCosts`.
        losses: float64 [p], NaN for participants whose update was dropped.
        seconds: wall-clock time of the round.
        phase_seconds: time of each span since the last record.
    """
    return {
        "round": progress.round,
        "wall_seconds": progress.wall_seconds,
        "round_seconds": seconds,
        "phase_seconds": dict(phase_seconds),
        "simulated_seconds": progress.simulated_seconds,
        "simulated_download_seconds": costs.download_seconds,
        "simulated_compute_seconds": costs.compute_seconds,
        "simulated_upload_seconds": costs.upload_seconds,
        "total_bytes_up": progress.total_bytes_up,
        "total_bytes_down": progress.total_bytes_down,
        "total_client_flops": progress.total_client_flops,
        "num_participants": len(plan.client),
        "num_survivors": int(np.isfinite(losses).sum()),
        "num_dropped": len(plan.dropped),
        "lr": plan.lr,
        "train_loss": float(np.nanmean(losses)),
    }


@dataclass(frozen=True)
class RoundCosts:
    """What one round costs.

    Attributes:
        bytes_up, bytes_down, client_flops: sums over all that were chosen. A late one counts its whole download, its
            FLOPs up to the end of the round, and no upload.
        simulated_seconds: advance of simulated time: the wait for an available participant, and the round, which lasts
            as long as its slowest survivor, or to its deadline where fewer survive than it waits for.
        download_seconds, compute_seconds, upload_seconds: simulated seconds that devices spend so, added up like the
            bytes; latency is in none of them.
    """

    bytes_up: int
    bytes_down: int
    client_flops: float
    simulated_seconds: float
    download_seconds: float
    compute_seconds: float
    upload_seconds: float
