"""From block sums to an algorithm's inbox: a pure function of a plan's results."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
        label_weights: float32 [num_labels], the same per label, or None where labels are not told apart.
    """

    cut: Cut
    sums: Mapping[str, Tensor]
    weight: float
    label_weights: Tensor | None


def combine(
    layout: Layout, uplink: Mapping[str, str], parts: Sequence[Part], scalars: Collection[str] = ()
) -> dict[str, Tensor | None]:
    """Combine parts, in the order given, into an inbox.

    Args:
        layout: the whole model's layout.
        uplink: ``{name: "mean" | "sum"}``: a mean divides by the holders of each coordinate, a sum does not.
        parts: parts, at least one.
        scalars: names among `uplink` that are one number a participant: a mean divides by the weight of all parts.

    Returns:
        ``{name: [d]}``, [1] of scalars, and ``"held"``: bool [d] of the coordinates that somebody held, or None if all
        were.
    """
    inbox: dict[str, Tensor | None] = {"held": None}
    for name, kind in uplink.items():
        if name in scalars:
            inbox[name] = _combine_scalar(name, kind, parts)
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
    return inbox


def _combine_scalar(name: str, kind: str, parts: Sequence[Part]) -> Tensor:
    total = parts[0].sums[name].new_zeros(1)
    for part in parts:
        total += part.sums[name]
    return total if kind == "sum" else total / math.fsum(part.weight for part in parts)


def others_median(norms: Iterable[float]) -> float:
    """Return the (lower) median of the finite ones among `norms` without the largest; 0 where nothing is left."""
    known = sorted(norm for norm in norms if math.isfinite(norm))[:-1]
    return known[(len(known) - 1) // 2] if known else 0.0
