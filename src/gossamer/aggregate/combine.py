"""From block sums to an algorithm's inbox: a pure function of a plan's results."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.aggregate.selective import SelectiveMean
from gossamer.submodel import Cut, Layout


@dataclass(frozen=True)
class Part:
    """The summed payload of participants that share a cut.

    Attributes:
        cut: their windows.
        sums: ``{name: tensor [d_sub]}``, [1] of scalars; weighted where the uplink says "mean".
        weight: their total weight.
        label_weights: [num_labels], the same per label, or None where labels are not told apart.
        rows: ``{name: every participant's tensor [d_sub]}`` where the uplink says "rows"; they are not weighted.
        weights: weight of each of them.
    """

    cut: Cut
    sums: Mapping[str, Tensor]
    weight: float
    label_weights: Tensor | None
    rows: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    weights: Sequence[float] = ()


def combine(
    layout: Layout, uplink: Mapping[str, str], parts: Sequence[Part], scalars: Collection[str] = ()
) -> dict[str, Tensor | None]:
    """Combine parts, in the order given, into an inbox.

    Args:
        layout: the whole model's layout.
        uplink: ``{name: "mean" | "sum" | "rows"}``: a mean divides by the holders of each coordinate, a sum does not,
            and rows stay apart.
        parts: parts, at least one.
        scalars: names among `uplink` that are one number a participant: a mean divides by the weight of all parts.

    Returns:
        ``{name: [d]}``, [1] of scalars, [p, d] of rows, which are 0 where a participant holds nothing; ``"held"``: bool
        [d] of the coordinates that somebody held, or None if all were; and, with rows, ``"weights"``: [p].
    """
    inbox: dict[str, Tensor | None] = {"held": None}
    for name, kind in uplink.items():
        if name in scalars:
            inbox[name] = _combine_scalar(name, kind, parts)
        elif kind == "rows":
            inbox[name] = rows = _padded_rows(layout, name, parts)
            inbox["weights"] = torch.tensor([weight for part in parts for weight in part.weights], dtype=rows.dtype)
        elif kind == "sum":
            total = parts[0].sums[name].new_zeros(layout.d)
            for part in parts:
                part.cut.add_(total, part.sums[name])
            inbox[name] = total
        elif len(parts) == 1 and parts[0].cut.is_full and parts[0].label_weights is None:
            inbox[name] = parts[0].sums[name].div_(parts[0].weight)
        else:
            mean = SelectiveMean(layout, parts[0].sums[name].dtype)
            for part in parts:
                mean.add(part.cut, part.sums[name], part.weight, part.label_weights)
            inbox[name], inbox["held"] = mean.result()
    if "weights" in inbox and inbox["held"] is None:
        inbox["held"] = _held(layout, parts)
    return inbox


def _padded_rows(layout: Layout, name: str, parts: Sequence[Part]) -> Tensor:
    sent = [(part.cut, row) for part in parts for row in part.rows[name]]
    rows = sent[0][1].new_zeros(len(sent), layout.d)
    for target, (cut, row) in zip(rows, sent, strict=True):
        cut.write(target, row)
    return rows


def _held(layout: Layout, parts: Sequence[Part]) -> Tensor | None:
    held = torch.zeros(layout.d, dtype=torch.bool)
    for part in parts:
        part.cut.write(held, torch.ones(part.cut.sub.d, dtype=torch.bool))
    return None if bool(held[layout.coordinates].all()) else held


def _combine_scalar(name: str, kind: str, parts: Sequence[Part]) -> Tensor:
    total = parts[0].sums[name].new_zeros(1)
    for part in parts:
        total += part.sums[name]
    return total if kind == "sum" else total / math.fsum(part.weight for part in parts)


def others_median(norms: Iterable[float]) -> float:
    """Return the (lower) median of the finite ones among `norms` without the largest; 0 where nothing is left."""
    known = sorted(norm for norm in norms if math.isfinite(norm))[:-1]
    return known[(len(known) - 1) // 2] if known else 0.0
