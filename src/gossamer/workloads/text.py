"""Prediction of the next character over many clients: texts, a partition, a model, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer.workloads.base import ForwardContext, Params, Sums
from gossamer.workloads.label_sets import beaten_by
from gossamer.workloads.plugins import Spec
from gossamer.workloads.supervised import Ints, Supervised, SupervisedOptions, chunk_of, cross_entropies
from gossamer.workloads.texts import TextData

NOTHING = -1  # what follows the end of a text


class TextOptions(SupervisedOptions):
    """Options of `NextCharacter`, besides those of every `Supervised`.

    Attributes:
        context: characters of a window, the most that a prediction looks back on.
    """

    dataset: Spec = "shakespeare"
    model: Spec = "transformer"
    context: int = Field(64, ge=1)
    evaluation_chunk: int = Field(100, ge=1)


class NextCharacter(Supervised):
    """Language modelling by character.

    A sample is a window of `context` characters and the character that follows each of them. An owner's windows tile
    its text: every character but the first is predicted exactly once, from what stands before it in its window. The
    last window may be shorter. In a batch, ``"x"`` is int64 [s, m, context], and ``"y"``: int64 [s, m, context], the
    characters that follow, -1 beyond the end of the text.

    Partition ``"natural-id"`` makes every owner a client. To any other one, such as ``"iid"``, a window's label is its
    owner.
    """

    Options = TextOptions
    data_class, data_kind, model_kind = TextData, "text", "text-model"

    def _prepare(self) -> tuple[Ints, int, Ints | None]:
        self._input_size = context = self.options.context
        self._train, self._train_owner = _tiled([self.data.encode(text) for text in self.data.train], context)
        self._test, self._test_owner = _tiled([self.data.encode(text) for text in self.data.test], context)
        self._unigram_bits = unigram_bits(self._train[:, 1:], self._test[:, 1:], self.num_labels)
        self._num_test = len(self._test)
        self.traits = replace(self.traits, tokens_per_sample=context)
        return self._train_owner, len(self.data.owners), self._train_owner

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"vocabulary": self.data.vocabulary}

    def _find_labels(self) -> Tensor:
        """Return which characters each client's training windows hold, bool [num_clients, num_labels]."""
        held = torch.zeros(self.num_clients, self.num_labels + 1, dtype=torch.bool)  # the last one is padding
        client = torch.from_numpy(np.repeat(np.arange(self.num_clients), self.num_samples))
        held[client[:, None], self._train[torch.from_numpy(self.partition.indices)]] = True
        return held[:, :-1].contiguous()

    def _fetch(self, rows: Ints, padding: NDArray[np.bool_], round: int, phase: int) -> dict[str, Tensor]:
        windows = self._train[torch.from_numpy(rows)]
        windows[torch.from_numpy(padding)] = NOTHING
        return dict(zip("xy", _inputs_and_targets(windows), strict=True))

    def loss_of_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what `loss` does, from the batch's `logits`."""
        targets: Tensor = batch["y"]
        counts = targets != NOTHING
        if batch.get("mask") is not None:
            counts = counts & (batch["mask"] > 0)[..., None]
        losses = cross_entropies(logits, targets.clamp_min(0))
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over a chunk of the test windows, owner by owner.

        Returns:
            ``"loss"`` (nats), ``"correct"``, ``"count"`` (characters): float64 [owners].
        """
        part = chunk_of(self._num_test, self.num_evaluation_chunks, chunk)
        x, y = _inputs_and_targets(self._test[part])
        counts = y != NOTHING
        logits, targets = self.model.apply(params, x, ForwardContext(training=False))[counts], y[counts]
        owner = np.repeat(self._test_owner[part], counts.sum(1).numpy())
        values = {
            "loss": F.cross_entropy(logits, targets, reduction="none"),
            "correct": ~beaten_by(logits, targets).any(dim=1),
            "count": torch.ones(len(targets)),
        }
        num_owners = len(self.data.owners)
        sums = {name: np.bincount(owner, value.double().numpy(), num_owners) for name, value in values.items()}
        return {name: np.asarray(value, dtype=np.float64) for name, value in sums.items()}

    def measured(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics of the test data.

        Returns:
            ``accuracy``, ``loss`` (nats) and ``bits_per_character`` of all test characters alike;
            ``local_bits_per_character`` and ``worst_client_bits_per_character``, the mean and the largest over the
            owners, each on its own test text (the owners are the clients where the partition is natural); and the
            constant ``unigram_bits``, see `unigram_bits`.
        """
        found = super().measured(sums)
        local = sums["loss"] / math.log(2) / sums["count"]
        return found | {
            "bits_per_character": found["loss"] / math.log(2),
            "local_bits_per_character": float(local.mean()),
            "worst_client_bits_per_character": float(local.max()),
            "unigram_bits": self._unigram_bits,
        }

    def counted_of(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return (bits, characters) of a client's own test text, if each client is one owner; else nothing."""
        owners = np.unique(self._train_owner[self.partition.of_client(client)])
        if self.num_clients != len(self.data.owners) or len(owners) != 1 or not sums["count"][owners[0]]:
            return {}
        bits, number = sums["loss"][owners[0]] / math.log(2), sums["count"][owners[0]]
        return {"bits_per_character": (float(bits), float(number))}

    def measured_of(self, sums: Sums, client: int) -> dict[str, float]:
        """Return accuracy and bits per character on the test texts of the owners whose windows a client trains on.

        Owners count by their share of the client's training windows.
        """
        own = self.partition.of_client(client)
        share = np.bincount(self._train_owner[own], minlength=len(self.data.owners)) / len(own)
        tested = sums["count"] > 0
        share, count = share[tested] / share[tested].sum(), sums["count"][tested]
        found = {name: float(share @ (sums[name][tested] / count)) for name in ("correct", "loss")}
        return {"accuracy": found["correct"], "bits_per_character": found["loss"] / math.log(2)}


def unigram_bits(train: Tensor, test: Tensor, num_labels: int) -> float:
    """Return the bits per character of the best guess that ignores what stands before: what a model has to beat.

    It is the cross entropy of the test characters under the frequencies of the training characters, to each of which
    one is added (Laplace), so that a character of the test text alone does not cost infinitely many bits.

    Args:
        train, test: int64 of any shape, places in the vocabulary; -1 is padding.
        num_labels: size of the vocabulary.
    """
    seen, tested = (torch.bincount(codes[codes != NOTHING], minlength=num_labels).double() for codes in (train, test))
    bits = -torch.log2((seen + 1) / (seen.sum() + num_labels))
    return float((tested * bits).sum() / tested.sum())


def _tiled(texts: Sequence[Ints], context: int) -> tuple[Tensor, Ints]:
    """Cut texts into windows that overlap by one character, the last target of one and the first input of the next.

    Args:
        texts: int64 [two or more], places in the vocabulary.
        context: predictions of a window.

    Returns:
        int64 [windows, context + 1], padded by -1, and the number of each window's text, int64 [windows].
    """
    num_windows = np.array([-(-(len(text) - 1) // context) for text in texts], dtype=np.int64)
    windows = np.full((num_windows.sum(), context + 1), NOTHING, dtype=np.int64)
    row = 0
    for text in texts:
        for start in range(0, len(text) - 1, context):
            part = text[start : start + context + 1]
            windows[row, : len(part)] = part
            row += 1
    return torch.from_numpy(windows), np.repeat(np.arange(len(texts), dtype=np.int64), num_windows)


def _inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs, where padding is the first character of the vocabulary, and the targets, where it is -1.

    Args:
        windows: int64 [..., context + 1].
    """
    return windows[..., :-1].clamp_min(0), windows[..., 1:]
