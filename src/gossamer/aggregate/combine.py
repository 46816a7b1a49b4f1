"""From block sums to an algorithm's inbox: a pure function of a plan's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.aggregate.selective import SelectiveMean
from gossamer.submodel import Cut, Layout


@dataclass(frozen=True)
class Part:
    """The summed payload of participants that share a cut.

    Attributes:
        cut: their windows.
        sums: ``{name: tensor [d_sub]}``, weighted where the uplink says "mean".
        weight: their total weight.
        label_weights: float32 [num_labels], the same per label, or None where labels are not told apart.
    """

    cut: Cut
    sums: Mapping[str, Tensor]
    weight: float
    label_weights: Tensor | None


def combine(layout: Layout, uplink: Mapping[str, str], parts: Sequence[Part]) -> dict[str, Tensor | None]:
    """Combine parts, in the order given, into an inbox.

    Args:
        layout: the whole model's layout.
        uplink: ``{name: "mean" | "sum"}``: a mean divides by the holders of each coordinate, a sum does not.
        parts: at least one.

    Returns:
        ``{name: [d]}``, and ``"held"``: bool [d] of the coordinates that somebody held, or None if all were.
    """
    inbox: dict[str, Tensor | None] = {"held": None}
    for name, kind in uplink.items():
        if kind == "sum":
            total = torch.zeros(layout.d)
            for part in parts:
                part.cut.add_(total, part.sums[name])
            inbox[name] = total
        elif len(parts) == 1 and parts[0].cut.is_full and parts[0].label_weights is None:
            inbox[name] = parts[0].sums[name].div_(parts[0].weight)
        else:
            mean = SelectiveMean(layout)
            for part in parts:
                mean.add(part.cut, part.sums[name], part.weight, part.label_weights)
            inbox[name], inbox["held"] = mean.result()
    return inbox
