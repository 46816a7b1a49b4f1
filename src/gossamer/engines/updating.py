"""The update at the server, from the sums and rows of a phase."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import Part, combine
from gossamer.algorithms.base import Arrays
from gossamer.engines.task import KNOWN, Task, Variant
from gossamer.engines.training.compression import known_after
from gossamer.errors import ConfigError, nearest
from gossamer.plan import RoundPlan
from gossamer.profiling import recorder
from gossamer.threads import one_thread
from gossamer.workloads.base import add_sums

Inbox = dict[str, Tensor | None]


@dataclass
class Collected:
    """What the participants of a phase sent.

    Attributes:
        sums: ``{(variant, payload name): [d_sub]}``, weighted sums over a variant's survivors.
        rows: ``{(row of the plan, payload name): [d_sub]}``, of what is not added up within a variant.
    """

    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)


def update_(
    task: Task, state: Arrays, order: Mapping[str, Tensor], plan: RoundPlan, kept: NDArray[np.bool_], found: Collected
) -> None:
    """Update a server's state in place.

    Args:
        task: task of the run.
        state: the server's arrays, [1, d] each.
        order: the round's order of channels.
        plan: plan of the phase.
        kept: bool [p], whose update is used.
        found: what they sent.
    """
    apply_(task, state, plan, combined(task, state, order, plan, kept, found))


def combined(
    task: Task,
    state: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    plan: RoundPlan,
    kept: NDArray[np.bool_],
    found: Collected,
) -> Inbox | None:
    """Return the inbox of an update, see `combine` and `update_`; None: nobody's update is used."""
    parts = [part for one in task.variants for part in _parts(task, state, order, plan, one, kept, found)]
    if not parts:
        return None
    traits = task.phases[plan.phase].algorithm.traits
    num_bytes = task.cutter.layout.d * state["x"].itemsize * len(traits.uplink)
    with one_thread(), recorder.span("combine", num_bytes):  # memory-bound; threads would take time from workers
        return combine(task.cutter.layout, traits.uplink, parts, traits.scalars)


def apply_(task: Task, state: Arrays, plan: RoundPlan, inbox: Inbox | None) -> None:
    """Update a server's state in place by an inbox, see `update_`; None changes nothing."""
    if inbox is None:
        return
    with one_thread(), recorder.span("update"):
        algorithm = task.phases[plan.phase].algorithm
        traits = algorithm.traits
        apart = {"weights", *(name for name, kind in traits.uplink.items() if kind == "rows")}
        views: dict[str, Any] = {
            name: value if value is None or name in apart else value[None] for name, value in inbox.items()
        }
        if traits.scores_models:
            views["metrics"] = partial(metrics_of, task)
        own = {name: value for name, value in state.items() if not name.startswith(KNOWN)}
        _write(state, algorithm.update(own, views, task.workload.num_clients))
        _write(state, known_after(task, state, plan.round, plan.phase))


def metrics_of(task: Task, x: Tensor) -> dict[str, float]:
    """Return the metrics of a whole model x [d], computed here, with one thread: the same bits on every engine."""
    workload, params = task.workload, task.cutter.layout.views(x)
    with one_thread(), torch.no_grad(), recorder.span("evaluate"):
        parts = (workload.statistics(params, chunk) for chunk in range(workload.num_statistics_chunks))
        sums = add_sums([{name: value.numpy() for name, value in part.items()} for part in parts])
        statistics = {name: torch.from_numpy(np.asarray(value)) for name, value in sums.items()}
        chunks = range(workload.num_evaluation_chunks)
        return workload.metrics(add_sums([workload.evaluate(params, statistics, chunk) for chunk in chunks]))


def require_metric(task: Task, x: Tensor) -> None:
    """Refuse, before anything is trained, an algorithm that measures models x [d] by what the workload does not have.

    Raises:
        ConfigError: its metric is none of the workload's.
    """
    metric = task.algorithm.traits.scored_by
    if metric is None:
        return
    found = metrics_of(task, x)
    if not {metric, f"validation_{metric}"} & found.keys():
        known = tuple(dict.fromkeys(name.removeprefix("validation_") for name in found))
        raise ConfigError(
            f"algorithm.metric = {metric!r} is not measured{nearest(metric, known)} (there are: {', '.join(known)})"
        )


def _write(state: Arrays, new: Mapping[str, Tensor]) -> None:
    for name, value in new.items():
        if value is not state[name]:
            state[name].copy_(value)


def _parts(
    task: Task,
    state: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    plan: RoundPlan,
    variant: Variant,
    kept: NDArray[np.bool_],
    found: Collected,
) -> Iterator[Part]:
    """Yield what the survivors of one variant sent, with their weights."""
    rows = plan.variant_rows(variant.index)
    survivors = np.flatnonzero(kept[rows]) + rows.start
    if not len(survivors):
        return
    labels = None
    if task.count_labels:
        labels = task.workload.client_labels(plan.client[survivors]).numpy() * plan.weight[survivors, None]
    kinds, weight = task.phases[plan.phase].algorithm.traits.uplink, plan.weight
    unsummed = [name for name, kind in kinds.items() if kind == "rows"]
    if variant.shares_window:
        sums = {name: found.sums[variant.index, name] for name in kinds if name not in unsummed}
        sent = {name: [found.rows[row, name] for row in survivors.tolist()] for name in unsummed}
        label_weights = None if labels is None else torch.from_numpy(labels.sum(0)).to(state["x"])
        cut = task.cut(variant, plan.round, order=order)
        yield Part(cut, sums, math.fsum(weight[survivors]), label_weights, sent, weight[survivors].tolist())
        return
    for number, row in enumerate(survivors.tolist()):
        sums = {name: found.rows[row, name] for name in kinds if name not in unsummed}
        sent = {name: [found.rows[row, name]] for name in unsummed}
        label_weights = None if labels is None else torch.from_numpy(labels[number]).to(state["x"])
        cut = task.cut(variant, plan.round, int(plan.client[row]), order)
        yield Part(cut, sums, float(weight[row]), label_weights, sent, [float(weight[row])])
