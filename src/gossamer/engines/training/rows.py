"""Rows of participants: what tensors they consist of, their norms, and which of them are usable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = Tensor | list[Tensor]  # [s, d], or s tensors [1, d]


def numbers(values: Tensor) -> Any:
    """Return a number, or a list of them."""
    return values.tolist()


def on_processor(arrays: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return rows in this process's own memory."""
    return {
        name: rows.cpu() if isinstance(rows, Tensor) else [row.cpu() for row in rows] for name, rows in arrays.items()
    }


def equal_runs(steps: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return the ``[low, high)`` runs of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    return list(itertools.pairwise(edges))


def chunks(rows: Rows) -> list[tuple[slice, Tensor]]:
    """Return the tensors [k, d] that `rows` consists of, each with its rows."""
    if isinstance(rows, Tensor):
        return [(slice(0, len(rows)), rows)]
    return [(slice(i, i + 1), row) for i, row in enumerate(rows)]


def row_norms(payload: Mapping[str, Rows]) -> list[float]:
    """Return the Euclidean norm of all that each participant has in `payload`, NaN where not all of it is finite.

    A sum of squares shows every NaN and infinity at memory speed; only where it is not finite are the values looked at
    one by one, because large finite values may overflow it.
    """
    found = []
    for rows in payload.values():
        present = rows if isinstance(rows, Tensor) else [row for one in rows for row in one]
        norm = torch.linalg.vector_norm
        quick = norm(rows, dim=1) if isinstance(rows, Tensor) else torch.stack([norm(row) for row in present])
        norms = zip(quick.tolist(), present, strict=True)
        found.append([value if math.isfinite(value) else _large_norm(row) for value, row in norms])
    return [math.hypot(*parts) for parts in zip(*found, strict=True)]


def _large_norm(row: Tensor) -> float:
    largest = float(row.abs().max())
    return largest * float(torch.linalg.vector_norm(row.double() / largest)) if math.isfinite(largest) else math.nan


def usable(norms: Iterable[float], bounds: Iterable[float]) -> list[bool]:
    """Say whose norm is finite and within its bound."""
    return [math.isfinite(norm) and norm <= bound for norm, bound in zip(norms, bounds, strict=False)]


def stack_rows(rows: list[Tensor]) -> Tensor:
    """Return rows [1, d] as [s, d], without a copy where they are one and the same."""
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1)
    return torch.cat(rows)
