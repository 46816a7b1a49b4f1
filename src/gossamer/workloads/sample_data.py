"""Labelled samples that are no images: rows of a table, tokens, time series."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads.datasets import ImageData, require_tensors
from gossamer.workloads.samples import pieces


@dataclass(frozen=True, eq=False)
class SampleData(ImageData):
    """Samples that are no images, such as rows of a table or tokens, with their labels; else as `ImageData`.

    Attributes:
        train_images, test_images: samples [N, ...]: float32 or uint8, normalised by `mean` and `std` of each entry of
            their second dimension (such as the features of a table), or int64, which are given to models as they are.
    """

    def _check_samples(self, where: str, images: Any, labels: Any) -> None:
        require_tensors(where, images, labels)
        if images.dim() < 2 or 0 in images.shape[1:] or images.dtype not in (torch.uint8, torch.float32, torch.int64):
            raise DataError(
                f"{where} has samples of type {images.dtype} and shape {tuple(images.shape)}: give float32, uint8 or"
                " int64 [N, ...]"
            )

    def _check_moments(self) -> None:
        if self.train_images.dtype == torch.int64:  # of tokens
            object.__setattr__(self, "mean", (0.0,) * self.shape[0])
            object.__setattr__(self, "std", (1.0,) * self.shape[0])
        super()._check_moments()

    def _check_units(self, given_std: tuple[float, ...] | None) -> None:
        """Check nothing: features may be rare."""

    @cached_property
    def num_tokens(self) -> int | None:
        """One more than the largest of samples that are whole numbers; None where others, or some are below 0."""
        if self.train_images.dtype != torch.int64:
            return None
        ends = [piece.aminmax() for split in (self.train_images, self.test_images) for piece in pieces(split)]
        is_counted = all(int(end.min) >= 0 for end in ends)
        return 1 + max(int(end.max) for end in ends) if is_counted else None


@dataclass(frozen=True, eq=False)
class OwnTestData(SampleData):
    """Samples whose owners have test samples of their own, on which local accuracy is measured; else as `SampleData`.

    Attributes:
        test_owner: int64 [N], owner of each test sample, by the same numbers as `owner`.
    """

    test_owner: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.owner is None or self.test_owner is None or self.test_owner.shape != self.test_labels.shape:
            raise DataError(f"data set {self.name!r} has no owner for each sample: give owner and test_owner")

    def split(self, kept: Tensor, out: Tensor) -> dict[str, Any]:
        """Return what changes where training samples take the place of the test samples."""
        assert self.owner is not None
        return {**super().split(kept, out), "test_owner": self.owner[out]}
