"""What a codec makes of payloads before they are weighted, and of the server's arrays before they are received."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from gossamer import rng
from gossamer.algorithms.base import Arrays
from gossamer.engines.task import KNOWN, Task
from gossamer.engines.training.job import Job
from gossamer.engines.training.rows import Rows
from gossamer.profiling import recorder


def compress_(task: Task, job: Job, payload: Mapping[str, Rows], residuals: Mapping[str, Tensor]) -> Arrays:
    """Put what the server decodes in the place of payloads, in place; return what is lost, to be sent later.

    With p the payload and e the residual of a client, q = Q(p + e) is sent and p + e - q is the next residual (error
    feedback); without residuals q = Q(p). Rows are compressed one by one, so that bits do not depend on blocks, and
    without their padding. One that is not finite becomes NaN, even where a codec would not have sent those entries.

    Args:
        payload: rows in the order of the variant's working layout.
        residuals: ``{name: [s, d_sub]}``, see `Task.residuals`; they are in the order of its layout.

    Returns:
        The new residuals, under the same names.
    """
    variant, kept = task.variants[job.block.variant], Arrays()
    layout, working, real = variant.layout, variant.working_layout, variant.sent_coordinates
    for name, codec in variant.uplink.items():
        residual = residuals.get(task.residuals.get(name, ""))
        seed, lost = rng.stable_hash(task.seed, "uplink", name), []
        for i, row in enumerate(row for rows in payload[name] for row in rows.view(-1, layout.d)):
            wanted = working.reorder_(row, layout)[None, real]
            if residual is not None:
                wanted = wanted + residual[i : i + 1, real]
            if bool(wanted.isfinite().all()):
                client = job.client[i : i + 1]
                with recorder.span("compress", wanted.nbytes):
                    sent = codec.compress(wanted, seed=seed, round=job.round, phase=job.phase, peers=client)
            else:
                sent = torch.full_like(wanted, torch.nan)
            if residual is not None:
                lost.append(torch.zeros_like(row))
                lost[-1][real] = (wanted - sent)[0]
            row[real] = sent[0]
            layout.reorder_(row, working)
        if residual is not None:
            kept[task.residuals[name]] = torch.stack(lost)
    return kept


def decoded_downlink(task: Task, state: Mapping[str, Tensor], names: Iterable[str], round: int, phase: int) -> Arrays:
    """Return some of the server's arrays [1, d] as every participant of a phase has them, once decoded."""
    if task.communication.downlink is None:
        return {name: state[name] for name in names}
    if task.communication.sends_changes:
        return {name: state[KNOWN + name] for name in names}
    return {name: _sent_by_server(task, name, state[name], round, phase) for name in names}


def known_after(task: Task, state: Mapping[str, Tensor], round: int, phase: int) -> Arrays:
    """Return what clients know once the server has sent, after a phase, by how much its arrays differ from that.

    With x the server's array, ``known <- known + Q(x - known)``: what a codec loses stays in the difference.
    """
    if not task.communication.sends_changes:
        return {}
    names, found = task.phases[(phase + 1) % task.num_phases].algorithm.traits.downlink, Arrays()
    for name in names or ():
        known = state[KNOWN + name]
        found[KNOWN + name] = known + _sent_by_server(task, name, state[name] - known, round, phase)
    return found


def _sent_by_server(task: Task, name: str, rows: Tensor, round: int, phase: int) -> Tensor:
    """Return what a codec makes of an array [1, d] that goes to all clients."""
    codec, layout, found = task.communication.downlink, task.cutter.layout, rows.clone()
    assert codec is not None
    seed, real = rng.stable_hash(task.seed, "downlink", name), layout.coordinates
    found[:, real] = codec.of_shapes(layout.shapes).compress(
        rows[:, real], seed=seed, round=round, phase=phase, peers=np.zeros(1, dtype=np.int64)
    )
    return found
