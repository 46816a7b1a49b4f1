"""Test clips as they are measured besides: with their frames in another order, or without a modality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer import rng
from gossamer.workloads.base import Sums
from gossamer.workloads.multimodal.clips import PAD

SHUFFLED, WITHOUT = "shuffled", "without-"  # before the number of an order, or a modality, and a dot, in sums
TOKENS = ("caption", "question", "answer")
Metrics = dict[str, float]


def altered(
    batch: Mapping[str, Tensor], shuffles: int, without: Sequence[str], seed: int, chunk: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield prefixes of sums, and the clips of a chunk in each order of their frames, and without each modality.

    Args:
        batch: clips, with ``has_video`` and ``has_text``; what is missing is 0, or `PAD`.
        shuffles: random orders.
        without: modalities.
        seed, chunk: address of the orders.
    """
    for number in range(shuffles):
        source, (count, frames) = (
            rng.generator(seed, "shuffle-frames", number, participant=chunk),
            batch["video"].shape[:2],
        )
        orders = torch.from_numpy(source.permuted(np.tile(np.arange(frames), (count, 1)), axis=1))
        yield f"{SHUFFLED}{number}.", {**batch, "video": batch["video"][torch.arange(count)[:, None], orders]}
    for modality in without:
        blank = {name: torch.full_like(batch[name], PAD) for name in TOKENS}
        gone = blank if modality == "text" else {"video": torch.zeros_like(batch["video"])}
        yield f"{WITHOUT}{modality}.", {**batch, **gone, f"has_{modality}": torch.zeros_like(batch[f"has_{modality}"])}


def with_first_question(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return clips with the first of their questions, and its answer, alone."""
    return {**batch, "question": batch["question"][:, 0], "answer": batch["answer"][:, 0]}


def altered_metrics(
    found: Metrics, sums: Sums, shuffles: int, without: Sequence[str], metrics_of: Callable[[Sums], Metrics]
) -> Metrics:
    """Return ``<metric>_shuffled``, ``<metric>_drop`` and ``<metric>_without_<modality>``.

    Args:
        found: metrics of the clips as they are.
        sums: added-up sums, those with prefixes of `altered` among them.
        metrics_of: turns sums without prefixes into metrics.
    """

    def below(prefix: str) -> Metrics:
        """Return the metrics of sums with a prefix."""
        return metrics_of({name.removeprefix(prefix): v for name, v in sums.items() if name.startswith(prefix)})

    orders = [below(f"{SHUFFLED}{number}.") for number in range(shuffles)]
    means = {name: sum(one[name] for one in orders) / len(orders) for name in found} if orders else {}
    drops = {f"{name}_drop": found[name] - mean for name, mean in means.items()}
    lacking = {
        f"{name}_without_{modality}": value
        for modality in without
        for name, value in below(f"{WITHOUT}{modality}.").items()
        if not name.startswith("loss")  # a mean over clips of which none is left
    }
    return {f"{name}_shuffled": mean for name, mean in means.items()} | drops | lacking
