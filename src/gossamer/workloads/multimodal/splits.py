"""Samples of several modalities, as plain arrays: what data sets of this package return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads.samples import Samples


@dataclass(frozen=True, eq=False)
class MultimodalSplit:
    """Samples of several modalities.

    Attributes:
        samples: ``{modality: [N, ...]}``, tensors or samples that are read when they are needed; the row of a sample
            that lacks a modality holds anything.
        present: bool [N, modalities], which ones each sample has, in the order of `samples`.
        labels: int64 [N].
        owner: int64 [N], natural owner of each sample, or None.

    Raises:
        DataError: lengths or types differ from these.
    """

    samples: Mapping[str, Samples]
    present: Tensor
    labels: Tensor
    owner: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        lengths = {name: len(values) for name, values in self.samples.items()}
        lengths |= {} if self.owner is None else {"owner": len(self.owner)}
        wrong = [f"{length} of {name!r}" for name, length in lengths.items() if length != count]
        if wrong or not count or self.present.shape != (count, len(self.samples)):
            raise DataError(
                f"a split has {count} labels, {', '.join(wrong) or 'samples'} and presence of shape"
                f" {tuple(self.present.shape)}: give one of each to every sample, and at least one sample"
            )
        if self.present.dtype != torch.bool or self.labels.dtype != torch.int64:
            raise DataError(
                f"a split has presence of type {self.present.dtype} and labels of type {self.labels.dtype}: give bool"
                " and int64"
            )

    def __getitem__(self, rows: slice) -> MultimodalSplit:
        """Return a split of some samples."""
        samples = {name: values[:][rows] for name, values in self.samples.items()}
        owner = None if self.owner is None else self.owner[rows]
        return MultimodalSplit(samples, self.present[rows], self.labels[rows], owner)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.samples)


@dataclass(frozen=True, eq=False)
class MultimodalData:
    """Training and test samples of several modalities.

    Attributes:
        name: name in messages.
        train, test: of the same modalities.
        num_labels: number of classes.
        vocabulary: tokens of the modality ``text`` by their numbers, or ().
        public: samples that everybody has, and which are neither in `train` nor in `test`; None: there are none.
    """

    name: str
    train: MultimodalSplit
    test: MultimodalSplit
    num_labels: int
    vocabulary: tuple[str, ...] = ()
    public: MultimodalSplit | None = None
