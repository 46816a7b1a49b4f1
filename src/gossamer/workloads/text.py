"""Prediction of the next character over many clients: texts, a partition, a model, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import DataError
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import Layout
from gossamer.workloads.base import Batch, ForwardContext, Params, Sums, Workload, require_model
from gossamer.workloads.label_sets import beaten_by, mask_logits
from gossamer.workloads.partitions import Partition
from gossamer.workloads.plugins import Spec, call_plug_in, plug_in
from gossamer.workloads.texts import TextData
from gossamer.workloads.traits import WorkloadTraits

NOTHING = -1  # what follows the end of a text
Ints = NDArray[np.int64]


class TextOptions(Options):
    """Options of `NextCharacter`.

    Attributes:
        dataset: name of a text data set, or a mapping of ``name`` and its options.
        model: name of a text model, or a mapping of ``name`` and its options.
        context: characters of a window, the most that a prediction looks back on.
        label_mask: what the training loss does with characters that the client's text lacks: ``"none"`` (the default:
            all logits count), ``"zero"`` (their logits become 0, as in HeteroFL's code) or ``"minus-inf"`` (left out).
        evaluation_chunk: most windows that are evaluated at a time.
    """

    dataset: Spec = "shakespeare"
    model: Spec = "transformer"
    context: int = Field(64, ge=1)
    label_mask: Literal["none", "zero", "minus-inf"] = "none"
    evaluation_chunk: int = Field(100, ge=1)


class NextCharacter(Workload):
    """Language modelling by character; see `base.Workload` for the attributes and methods.

    A sample is a window of `context` characters and the character that follows each of them. An owner's windows tile
    its text: every character but the first is predicted exactly once, from what stands before it in its window. The
    last window may be shorter.

    Partition ``"natural-id"`` makes every owner a client. To any other one, such as ``"iid"``, a window's label is its
    owner.

    Raises (when built):
        ConfigError: an unknown or wrong option.
        DataError: the data is missing or malformed, or cannot be divided as asked.
    """

    Options = TextOptions
    traits = WorkloadTraits()

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str,
        seed: int,
        data: TextData | None = None,
    ) -> None:
        """Load the texts, divide them and lay out the model.

        Args:
            options: see `TextOptions`.
            num_clients: how many clients share the training texts.
            partition: name of a partition, or a mapping of ``name`` and its parameters.
            seed: of the partition.
            data: if it is loaded already.
        """
        self.options = parse_options(TextOptions, options, "workload")
        self.num_clients = num_clients
        self.data = self._load_data() if data is None else data
        self.num_labels = len(self.data.vocabulary)
        context = self.options.context
        self._train, owner = _tiled([self.data.encode(text) for text in self.data.train], context)
        self._test, self._test_owner = _tiled([self.data.encode(text) for text in self.data.test], context)
        self.partition = self._divide(partition, owner, seed)
        self.num_samples = self.partition.num_samples
        name, model_class, params = plug_in("text-model", self.options.model, "workload.model")
        self.model = call_plug_in(model_class, "workload.model", context, self.num_labels, **params)
        require_model(f"workload.model {name!r}", self.model)
        model = self.model.traits
        self.traits = replace(
            self.traits,
            supports_stacking=self.traits.supports_stacking and model.supports_stacking,
            stacks_natively=model.stacks_natively,
        )
        self.layout = Layout.of(self.model.shapes, self.model.axes)
        self.num_evaluation_chunks = -(-len(self._test) // self.options.evaluation_chunk)
        self._has_character = self._find_characters()
        self._unigram_bits = unigram_bits(self._train[:, 1:], self._test[:, 1:], self.num_labels)

    def _load_data(self) -> TextData:
        name, function, params = plug_in("text", self.options.dataset, "workload.dataset")
        data = call_plug_in(function, "workload.dataset", params)
        if not isinstance(data, TextData):
            raise DataError(
                f"data set {name!r} returned {type(data).__name__}: return gossamer.workloads.texts.TextData"
            )
        return data

    def _divide(self, spec: Mapping[str, Any] | str, owner: Ints, seed: int) -> Partition:
        name, function, params = plug_in("partition", spec, "clients.partition")
        num_owners = len(self.data.owners)
        made = call_plug_in(function, "clients.partition", owner, self.num_clients, num_owners, seed, owner, **params)
        if not isinstance(made, Partition):
            raise DataError(
                f"partition {name!r} returned {type(made).__name__}: return gossamer.workloads.partitions.Partition"
            )
        return made.checked(name, self.num_clients, len(owner))

    def _find_characters(self) -> Tensor:
        """Return which characters each client's training windows hold, bool [num_clients, num_labels]."""
        held = torch.zeros(self.num_clients, self.num_labels + 1, dtype=torch.bool)  # the last one is padding
        client = torch.from_numpy(np.repeat(np.arange(self.num_clients), self.num_samples))
        held[client[:, None], self._train[torch.from_numpy(self.partition.indices)]] = True
        return held[:, :-1].contiguous()

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat float32 row [d]."""
        return self.layout.flatten(self.model.init(rng.generator(seed, "init-model")))

    def client_labels(self, clients: Ints) -> Tensor:
        """Return bool [s, num_labels]: the characters of each client's training text."""
        return self._has_character[torch.from_numpy(clients)]

    def batch(self, clients: Ints, positions: Ints, round: int = 0) -> Batch:
        """Assemble windows for a block of clients.

        Args:
            clients: int64 [s].
            positions: int64 [s, m], window numbers within each client's own data; -1 is padding.
            round: not used.

        Returns:
            samples ``"x"``: int64 [s, m, context], ``"y"``: int64 [s, m, context], the characters that follow, -1
            beyond the end of the text, and, only where a row is padded, ``"mask"``: float32 [s, m]; client constants
            ``"labels"``: bool [s, num_labels], the characters of the client's text.

        Raises:
            IndexError: a position beyond the client's windows.
        """
        if (positions >= self.num_samples[clients][:, None]).any():
            raise IndexError(
                f"a position exceeds the samples {self.num_samples[clients].tolist()} of clients {clients.tolist()}"
            )
        rows = self.partition.indices[self.partition.offsets[clients][:, None] + np.maximum(positions, 0)]
        windows = self._train[torch.from_numpy(rows)]
        padding = positions < 0
        windows[torch.from_numpy(padding)] = NOTHING
        samples = dict(zip("xy", _inputs_and_targets(windows), strict=True))
        if padding.any():
            samples["mask"] = torch.from_numpy((~padding).astype(np.float32))
        return Batch(samples, {"labels": self.client_labels(clients)})

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross entropy in nats, averaged over the characters that are not padding (0 if there are none).

        Args:
            params: parameters of the (sub-)model.
            batch: ``"x"``, ``"y"``, ``"labels"`` and optionally ``"mask"`` of `batch`, without the leading s, and
                optionally ``"scale"``.
        """
        return self.loss_of_logits(self.logits(params, batch), batch)

    def logits(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits float32 [b, n, num_labels] of a training batch, masked as `TextOptions.label_mask` says."""
        logits: Tensor = self.model.apply(params, batch["x"], ForwardContext(batch.get("scale", 1.0)))
        return mask_logits(logits, batch["labels"], self.options.label_mask)

    def loss_of_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what `loss` does, from the batch's `logits`."""
        targets: Tensor = batch["y"]
        counts = targets != NOTHING
        if batch.get("mask") is not None:
            counts = counts & (batch["mask"] > 0)[..., None]
        # The same as F.cross_entropy, which under vmap is put together from slow parts.
        losses = -F.log_softmax(logits, dim=-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over a chunk of the test windows, owner by owner.

        Args:
            params: parameters of the (sub-)model.
            statistics: not used.
            chunk: number of the chunk.

        Returns:
            ``"loss"`` (nats), ``"correct"``, ``"count"`` (characters): float64 [owners].
        """
        low, high = (len(self._test) * (chunk + end) // self.num_evaluation_chunks for end in (0, 1))
        x, y = _inputs_and_targets(self._test[low:high])
        counts = y != NOTHING
        logits, targets = self.model.apply(params, x)[counts], y[counts]
        owner = np.repeat(self._test_owner[low:high], counts.sum(1).numpy())
        values = {
            "loss": F.cross_entropy(logits, targets, reduction="none"),
            "correct": ~beaten_by(logits, targets).any(dim=1),
            "count": torch.ones(len(targets)),
        }
        num_owners = len(self.data.owners)
        sums = {name: np.bincount(owner, value.double().numpy(), num_owners) for name, value in values.items()}
        return {name: np.asarray(value, dtype=np.float64) for name, value in sums.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics.

        Returns:
            ``accuracy``, ``loss`` (nats) and ``bits_per_character`` of all test characters alike;
            ``local_bits_per_character`` and ``worst_client_bits_per_character``, the mean and the largest over the
            owners, each on its own test text (the owners are the clients where the partition is natural); and the
            constant ``unigram_bits``, see `unigram_bits`.
        """
        loss, correct, count = (float(sums[name].sum()) for name in ("loss", "correct", "count"))
        local = sums["loss"] / sums["count"] / math.log(2)
        return {
            "accuracy": correct / count,
            "loss": loss / count,
            "bits_per_character": loss / count / math.log(2),
            "local_bits_per_character": float(local.mean()),
            "worst_client_bits_per_character": float(local.max()),
            "unigram_bits": self._unigram_bits,
        }


def unigram_bits(train: Tensor, test: Tensor, num_labels: int) -> float:
    """Return the bits per character of the best guess that ignores what stands before: what a model has to beat.

    It is the cross entropy of the test characters under the frequencies of the training characters, to each of which
    one is added (Laplace), lest a character that occurs only in the test text cost infinitely many bits.

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
