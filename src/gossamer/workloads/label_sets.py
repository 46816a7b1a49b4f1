"""Local accuracy of many clients from one pass over the test data.

A client that holds a set of classes is tested on the test samples of those classes, with the prediction restricted to
them (HeteroFL, arXiv 2010.01264). Clients with equal sets share the work: a sample is right for a set exactly if its
own class is in the set and no class that beats it is, which one matrix product answers for all sets at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_COUNTS = 1 << 18  # of sets and classes, which every chunk of test data returns
SETS_AT_A_TIME = 512


def mask_logits(logits: Tensor, held: Tensor, label_mask: str) -> Tensor:
    """Return logits [..., num_labels] in which the classes that a client does not hold are as `label_mask` says.

    Args:
        held: bool, broadcasts to the logits.
        label_mask: "none" (as they are), "zero" (0, as in HeteroFL's code) or "minus-inf" (left out).
    """
    if label_mask == "none":
        return logits
    return torch.where(held, logits, 0.0 if label_mask == "zero" else -torch.inf)


def beaten_by(logits: Tensor, labels: Tensor) -> Tensor:
    """Tell which classes an argmax would prefer to the right one: bool [b, num_labels].

    Among equals the first class wins; a class whose comparison is undecided (NaN) counts as preferred.

    Args:
        logits: float [b, num_labels].
        labels: int64 [b].
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1])
    tied_later = (logits == own) & (classes >= labels[:, None])
    return ~((logits < own) | tied_later)


@dataclass(frozen=True, eq=False)
class LabelSets:
    """The distinct label sets of clients.

    Attributes:
        sets: float32 [sets, num_labels], 1 where the class belongs to the set.
        set_of_client: int64 [num_clients].
        histogram: int [num_clients, num_labels], training samples of each client and class.
    """

    sets: Tensor
    set_of_client: NDArray[np.int64]
    histogram: NDArray[np.int32]

    @classmethod
    def of(cls, histogram: NDArray[np.int32]) -> LabelSets | None:
        """Group clients by the classes that they hold; None if there are more than `MAX_COUNTS` sets times classes."""
        packed = np.packbits(histogram > 0, axis=1)
        _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        if len(first) * histogram.shape[1] > MAX_COUNTS:
            return None
        sets = torch.from_numpy((histogram[first] > 0).astype(np.float32))
        return cls(sets, inverse.reshape(-1).astype(np.int64), histogram)

    def correct(self, beaten: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Count right predictions of each set and class.

        Args:
            beaten: bool [b, num_labels], see `beaten_by`.
            labels: int64 [b].

        Returns:
            float64 [sets, num_labels]; zero where the class is not in the set.
        """
        beating = beaten.to(torch.float32)
        of_class = torch.nn.functional.one_hot(labels, beaten.shape[1]).to(torch.float32)
        counts = []
        for start in range(0, len(self.sets), SETS_AT_A_TIME):
            sets = self.sets[start : start + SETS_AT_A_TIME]
            right = (beating @ sets.T == 0).to(torch.float32)
            counts.append((right.T @ of_class) * sets)
        return np.asarray(torch.cat(counts).numpy(), dtype=np.float64)

    def counts(
        self, correct: NDArray[np.float64], tested: NDArray[np.float64], clients: slice = slice(None)
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return right predictions, and their number, of every client: as many of a class as it has training samples.

        Args:
            correct: float64 [sets, num_labels], sums of `correct`.
            tested: float64 [num_labels], test samples of each class; a class without any is left out.
            clients: those that are asked for.

        Returns:
            float64 [clients] each; of one without a tested class, 0. The quotient is the client's accuracy.
        """
        by_class = correct / np.maximum(tested, 1)
        weight = self.histogram[clients] * (tested > 0)
        total = weight.sum(axis=1)
        hits = np.einsum("nk,nk->n", weight, by_class[self.set_of_client[clients]])
        return np.asarray(hits, dtype=np.float64), np.asarray(total, dtype=np.float64)
