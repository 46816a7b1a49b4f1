"""What every engine of peers does."""

from __future__ import annotations

from typing import Any

import numpy as np

from gossamer.engines.base import Record
from gossamer.engines.task import Task, Variant
from gossamer.plan import Block, RoundPlan

BLOCK_BYTES = 4 << 20  # of models, and of samples, that are trained at once: to stay in cache
MAX_ROWS = 1 << 12
ROWS_ONE_BY_ONE = 16
Message = dict[str, Any]


def rows_of_block(task: Task, variant: Variant, itemsize: int, num_sample_bytes: int) -> int:
    """Return how many peers of a variant to train together, so that their models and samples stay in cache."""
    if not variant.mode.stacked:
        return ROWS_ONE_BY_ONE
    model_bytes = variant.layout.d * itemsize
    batch_bytes = num_sample_bytes * task.batch_size
    return max(2, min(BLOCK_BYTES // model_bytes, 4 * BLOCK_BYTES // batch_bytes, MAX_ROWS))


def job_message(plan: RoundPlan, block: Block) -> Message:
    """Describe the training of a block, as `PeerWorker.train` takes it."""
    return {
        "kind": "train",
        "round": plan.round,
        "phase": plan.phase,
        "variant": block.variant,
        "first": block.rows.start,
        "peers": plan.client[block.rows].tolist(),
        "steps": plan.steps[block.rows].tolist(),
        "lr": plan.lr,
    }


def distance_record(squares: float, num_peers: int) -> Record:
    """Return how far peers are apart, given the sum of their squared distances from the mean."""
    return {"consensus_distance": float(np.sqrt(squares / num_peers))}


def peers_record(found: list[dict[str, float]]) -> Record:
    """Return mean, min and max of each metric over several peers."""
    record: Record = {}
    for name in found[0]:
        values = [metrics[name] for metrics in found]
        record[f"{name}_peers"] = {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
    return record
