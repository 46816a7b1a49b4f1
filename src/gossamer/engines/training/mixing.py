"""Mixing of peers' rows inside a process."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.aggregate import tree_sum_rows
from gossamer.engines.task import Task
from gossamer.topology import BlockAverage, Mixing


def _mixing_of(task: Task, round: int, kind: str) -> Mixing:
    """Return what peers do in a round."""
    assert task.topology is not None
    if kind == "mean":
        return BlockAverage(1, task.topology.n, 1)
    mixing = task.topology.mixing(round)
    return mixing.lazy() if task.algorithm.traits.lazy else mixing


def column_sums(rows: Tensor) -> Tensor:
    """Return the sums over all rows [n, d], as float64 [d], added up pairwise.

    Blocks of rows that are aligned to a power of two, added up by the same tree, give the same bits.
    """
    return tree_sum_rows(rows.to(torch.float64, copy=True)).clone()  # sums overwrite their rows


def squared_distance(rows: Tensor, mean: Tensor) -> Tensor:
    """Return ``sum_i |rows[i] - mean|^2``, float64 [], the rows' own added up pairwise, as in `column_sums`."""
    return tree_sum_rows((rows - mean).double().square_().sum(1, keepdim=True))[0].clone()
