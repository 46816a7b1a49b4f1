"""Several tensors of one dtype and device as one row, which travels in one message."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Tensors that lie one after another in a row.

    Attributes:
        tensors: of one dtype and device.
        places: their numbers in the list that they come from.
    """

    tensors: tuple[Tensor, ...]
    places: tuple[int, ...]

    @classmethod
    def by_dtype(cls, tensors: Iterable[Tensor], max_bytes: float = math.inf) -> list[Bucket]:
        """Put tensors of one dtype and device together, in their order, in buckets of a limited size.

        Args:
            max_bytes: size of a bucket of several tensors at most.
        """
        full: list[list[tuple[int, Tensor]]] = []
        filling: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
        for place, each in enumerate(tensors):
            key = each.dtype, each.device
            bucket = filling.get(key)
            if bucket is None or sum(one.nbytes for _, one in bucket) + each.nbytes > max_bytes:
                bucket = filling[key] = []
                full.append(bucket)
            bucket.append((place, each))
        return [cls(tuple(each for _, each in one), tuple(place for place, _ in one)) for one in full]

    @torch.no_grad()
    def gather(self, num_rows: int = 1) -> Tensor:
        """Return the tensors as [num_rows, width]; of a single tensor, itself if it is contiguous.

        Args:
            num_rows: 1, or the size of the first dimension of all tensors.
        """
        parts = [each.detach().reshape(num_rows, -1) for each in self.tensors]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    def views(self, row: Tensor) -> list[Tensor]:
        """Return what `gather` made, in the shapes of the tensors; views if there is one row."""
        widths = [each.numel() // len(row) for each in self.tensors]
        parts = torch.split(row, widths, dim=1)
        return [part.reshape(each.shape) for part, each in zip(parts, self.tensors, strict=True)]

    @torch.no_grad()
    def scatter_(self, row: Tensor) -> None:
        """Overwrite the tensors."""
        for each, value in zip(self.tensors, self.views(row), strict=True):
            each.copy_(value)

    @torch.no_grad()
    def add_(self, row: Tensor) -> None:
        """Add to the tensors."""
        for each, value in zip(self.tensors, self.views(row), strict=True):
            each.add_(value)

    def gradients(self) -> Tensor:
        """Return the gradients as [1, width]; zeros where there is none."""
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.tensors]
        return torch.cat([each.detach().reshape(1, -1) for each in parts], dim=1)

    def set_gradients(self, row: Tensor) -> None:
        """Overwrite the gradients, and make those that are missing."""
        for each, value in zip(self.tensors, self.views(row), strict=True):
            if each.grad is None:
                each.grad = value.clone()
            else:
                each.grad.copy_(value)
