"""Parameters that stay with a client: put into what it receives, kept after training, left out of what it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.task import PERSONAL, Variant
from gossamer.engines.training.rows import Rows, chunks


def with_own(received: Sequence[Arrays], own: Tensor, mask: Tensor) -> list[Arrays]:
    """Return what each client starts from: what it received, and what is its own.

    Args:
        received: ``{name: [1, d_sub]}`` of each of s clients; not written to.
        own: [s, d_sub], see `PERSONAL`.
        mask: bool [d_sub], the personal coordinates.
    """
    has_own = mask & ~own.isnan()
    return [
        {**arrays, "x": torch.where(here[None], row[None], arrays["x"])}
        for arrays, row, here in zip(received, own, has_own, strict=True)
    ]


def own_part(variant: Variant, x: Tensor) -> Arrays:
    """Return what clients keep of their trained models [s, d_sub], under `PERSONAL`, where they keep something."""
    return {PERSONAL: torch.where(variant.personal_mask.to(x.device), x, torch.nan)} if variant.personal else {}


def leave_out_(payload: Mapping[str, Rows], scalars: Sequence[str], mask: Tensor) -> None:
    """Set personal coordinates of payloads to 0; a row in which one is not finite becomes NaN there, to be dropped."""
    for name, rows in payload.items():
        for _, chunk in chunks(rows) if name not in scalars else ():
            chunk.mul_(~mask)
