"""Classification of samples of several modalities, of which clients, and samples, have some: audio-visual digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import Layout
from gossamer.workloads.base import Batch, Blueprint, ForwardContext, Params, Sums, Workload
from gossamer.workloads.digests import digest_of
from gossamer.workloads.holdings import Holding, assigned
from gossamer.workloads.multimodal.architectures import ArchitectureOptions, Family
from gossamer.workloads.multimodal.audio_visual import AudioVisualOptions, audio_visual_digits
from gossamer.workloads.multimodal.encoders import FUSION, JOINED, Classifier
from gossamer.workloads.multimodal.labels import LabelOptions, given_labels, label_rates
from gossamer.workloads.multimodal.modalities import JOIN, MissingOptions, missing_rates, parse_shares, presence
from gossamer.workloads.multimodal.objectives import weighted_mean
from gossamer.workloads.multimodal.public import SERVER, PublicPairs
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.partitions import divide
from gossamer.workloads.plugins import Spec
from gossamer.workloads.samples import channel_moments
from gossamer.workloads.supervised import chunk_of, cross_entropies
from gossamer.workloads.traits import WorkloadTraits

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
ENCODERS: dict[str, Spec] = {name: {"name": "mlp", "hidden": [64]} for name in ("image", "audio")}
REPRESENTATIONS = "representations"
LABEL = "digit"
HAS = "has_"  # before a modality, in a batch
EVALUATED = 1000  # samples at a time


class AudioVisualDigitsOptions(Options):
    """Options of `AudioVisualDigits`.

    Attributes:
        dataset: see `gossamer.workloads.multimodal.audio_visual.AudioVisualOptions`.
        encoders: ``{modality: name of a model of images, or name and options}``.
        width: numbers of a representation.
        modalities: ``{names joined by +: share of the clients that have these}``. Of samples that lack a modality by
            themselves, a client has what is left.
        missing: modalities that samples lack besides.
        labels: labels of training samples that are missing or wrong; the only label is ``digit``.
        exchange: what clients send: parameters of the modules that they hold; or, for creamfl, representations of the
            ``dataset.num_public`` public pairs, while models stay with them.
        architectures: ``{name: {share: of the clients, encoders: {...}}}``: clients whose models differ; only where
            representations are exchanged. None: all have `encoders`.
        server_encoders: likewise for the server's own model, where representations are exchanged; None: as `encoders`.
    """

    dataset: AudioVisualOptions = Field(default_factory=lambda: AudioVisualOptions.model_validate({}))
    encoders: dict[str, Spec] = ENCODERS
    width: int = Field(32, ge=1)
    modalities: dict[str, float] = {"image+audio": 1.0}
    missing: MissingOptions = Field(default_factory=lambda: MissingOptions.model_validate({}))
    labels: LabelOptions = Field(default_factory=lambda: LabelOptions.model_validate({}))
    exchange: Literal["parameters", "representations"] = "parameters"
    architectures: dict[str, ArchitectureOptions] | None = Field(None, min_length=1)
    server_encoders: dict[str, Spec] | None = None


class AudioVisualDigits(Workload):
    """Pictures of digits and somebody who says them, of which a client has both, or one.

    A client holds the module of each modality that it has, and ``fusion`` if it has all.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a client without a modality.
        DataError: the data is missing or malformed, or cannot be divided as asked.
    """

    Options = AudioVisualDigitsOptions
    traits = WorkloadTraits(has_public_set=True)

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str,
        seed: int,
        data: MultimodalData | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the data, divide them and lay out the model, see `gossamer.workloads.multimodal.workload`."""
        self.options = parse_options(AudioVisualDigitsOptions, options, "workload")
        self.num_clients, self.seed, self.dtype = num_clients, seed, dtype
        self.data = audio_visual_digits(self.options.dataset.model_dump()) if data is None else data
        train, self.modalities = self.data.train, self.data.train.modalities
        owner = None if train.owner is None else train.owner.numpy()
        self.partition = divide(partition, num_clients, seed, train.labels.numpy(), self.data.num_labels, owner)
        self.num_samples, self.num_labels = self.partition.num_samples, self.data.num_labels
        self.model = self.build_model(options, self._facts(), seed)
        self._moments = {
            name: [torch.tensor(one, dtype=dtype)[:, None, None] for one in channel_moments(values)]
            for name, values in train.samples.items()
        }
        self._labels = self._given_labels()
        self._held = self._held_by_clients()
        self._present = self._present_in_samples()
        self._bind_layout()
        self.num_evaluation_chunks = -(-len(self.data.test.labels) // EVALUATED)

    # ---- what is asked for

    def _facts(self) -> dict[str, Any]:
        shapes = {name: list(values.shape[1:]) for name, values in self.data.train.samples.items()}
        return {"input_shapes": shapes, "num_labels": self.data.num_labels}

    @classmethod
    def build_model(cls, options: Mapping[str, Any], facts: Mapping[str, Any], seed: int) -> Any:
        """Build the model of clients without the data, see `Workload`."""
        parsed = parse_options(AudioVisualDigitsOptions, options, "workload")
        shapes = {name: tuple(shape) for name, shape in facts["input_shapes"].items()}
        given = shapes, parsed.width, facts["num_labels"]
        if parsed.architectures is not None:
            return Family(parsed.architectures, parsed.encoders, *given)
        return Classifier(parsed.encoders, *given, "workload.encoders")

    def blueprint(self) -> Blueprint:
        """Return what `build_model` takes of the data."""
        return Blueprint(self._facts())

    def _given_labels(self) -> Tensor:
        """Return the labels of training samples as they are given, int64 [N], -1 where there is none."""
        missing, wrong = (rates[LABEL] for rates in label_rates(self.options.labels, (LABEL,)))
        labels, sparsity = self.data.train.labels, self.options.labels.sparsity
        return given_labels(labels, self.num_labels, missing, wrong, sparsity, self.seed, f"label-{LABEL}")

    def _held_by_clients(self) -> Bools:
        """Return which modalities each client has, bool [num_clients, modalities].

        Raises:
            ConfigError: one has none.
        """
        kinds = parse_shares(self.options.modalities, self.modalities, "workload.modalities")
        given = kinds.holds[assigned(kinds.shares.tolist(), self.num_clients, self.seed, "assign-modalities")]
        present = self.data.train.present.numpy()
        offsets, indices = self.partition.offsets, self.partition.indices
        there = np.logical_or.reduceat(present[indices], offsets[:-1], axis=0)
        for client in np.flatnonzero(~(given & there).any(1)):
            wanted, found = (JOIN.join(self._named(one[client])) for one in (given, there))
            raise ConfigError(
                f"client {client} has no modality, because workload.modalities gives it {wanted}, and its"
                f" {offsets[client + 1] - offsets[client]} samples are of {found}: leave workload.modalities out, or"
                " choose another clients.partition"
            )
        held: Bools = given & there
        return held

    def _named(self, held: Bools | list[int]) -> tuple[str, ...]:
        return tuple(name for name, is_held in zip(self.modalities, held, strict=True) if is_held)

    def _present_in_samples(self) -> dict[str, Bools]:
        """Return which modalities each sample of a split has, bool [N, modalities]."""
        holder = np.empty(len(self.data.train.labels), dtype=np.int64)
        holder[self.partition.indices] = np.repeat(np.arange(self.num_clients), self.num_samples)
        missing, found = self.options.missing, dict[str, Bools]()
        for split, rates in (("train", missing.train), ("test", missing.test)):
            own: Bools = self._split(split).present.numpy()
            chances = missing_rates(rates, self.modalities, f"workload.missing.{split}")
            found[split] = presence(own, chances, self.seed, f"missing-{split}")
        found["train"] = found["train"] & self._held[holder]
        return found

    def _split(self, split: str) -> MultimodalSplit:
        return self.data.train if split == "train" else self.data.test

    def _bind_layout(self) -> None:
        """Lay out the modules, and find out which of them each client holds."""
        kinds, self._kind_of_client = self._kinds()
        shapes, axes, shared = dict(self.model.shapes), dict(self.model.axes), tuple[str, ...]()
        if self.options.exchange == REPRESENTATIONS:
            self._public = self._public_pairs()
            self.personal = tuple(shapes)
            shapes, axes = shapes | self._public.shapes, axes | self._public.axes
            shared = self._public.modules
        else:
            self._require_one_model()
        self.traits = WorkloadTraits(has_public_set=self.options.exchange == REPRESENTATIONS)
        self.layout = Layout.of(shapes, axes)
        holdings = list[Holding]()
        for architecture, *held in kinds.tolist():
            names, model = self._named(held), self._member(architecture)
            own = [model.prefix + name for name in (*names, *((FUSION,) if len(names) == 2 else ()))]
            called = model.prefix.removesuffix("_") + " " * bool(model.prefix) + JOIN.join(names)
            holdings.append(Holding(called, frozenset((*own, *shared))))
        self.holdings = tuple(holdings)

    def _kinds(self) -> tuple[Ints, Ints]:
        """Return the kinds of clients, int64 [kinds, 1 + modalities]: architecture, and what it has; and each one's."""
        shares = [one.share for one in (self.options.architectures or {}).values()] or [1.0]
        architectures = assigned(shares, self.num_clients, self.seed, "assign-architectures")
        kinds, found = np.unique(np.column_stack([architectures, self._held]), axis=0, return_inverse=True)
        return kinds, found

    def _member(self, architecture: int) -> Classifier:
        """Return the model of an architecture by its number."""
        return list(self.model.members.values())[architecture] if isinstance(self.model, Family) else self.model

    def _require_one_model(self) -> None:
        """Refuse several models where parameters are exchanged.

        Raises:
            ConfigError: the server, or some clients, would have another one.
        """
        if self.options.server_encoders is not None:
            raise ConfigError(
                "workload.server_encoders are those of a server with a model of its own: set workload.exchange to"
                " representations, or leave them out"
            )
        if self.options.architectures is not None:
            raise ConfigError(
                "workload.architectures differ, so that their parameters cannot be averaged: set workload.exchange to"
                " representations, with algorithm creamfl, or leave them out"
            )

    def _public_pairs(self) -> PublicPairs:
        """Return the public pairs, and a model of the server.

        Raises:
            ConfigError: there are no pairs.
        """
        public, options = self.data.public, self.options
        if public is None:
            raise ConfigError(
                "workload.exchange = 'representations' needs public pairs, of which there are none: set"
                " workload.dataset.num_public, to some hundreds"
            )
        samples = {name: self.normalised(name, values[:]) for name, values in public.samples.items()}
        shapes = {name: tuple(values.shape[1:]) for name, values in samples.items()}
        encoders = options.encoders if options.server_encoders is None else options.server_encoders
        where = "workload.encoders" if options.server_encoders is None else "workload.server_encoders"
        server = Classifier(encoders, shapes, options.width, self.num_labels, where, SERVER, is_cut=False)
        return PublicPairs(self.model, server, samples, public.labels)

    def public_set(self) -> PublicPairs:
        """Return the public pairs, which are there where representations are exchanged."""
        return self._public

    # ---- the contract

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat row [d]; representations of public samples are zeros."""
        params = self.model.init(rng.generator(seed, "init-model"))
        if self.traits.has_public_set:
            params |= self._public.init(seed)
        return self.layout.flatten(params).to(self.dtype)

    def digest(self) -> str:
        """Return a digest of the data, their partition, their labels, and who has what."""
        return digest_of(self.data, self.partition, self._labels, self._held, self._present)

    def client_labels(self, clients: Ints) -> Tensor:
        """Return bool [s, num_labels]: the labels of each client's training data."""
        held = torch.zeros(len(clients), self.num_labels, dtype=torch.bool)
        for row, client in zip(held, clients.tolist(), strict=True):
            labels = self._labels[torch.from_numpy(self.partition.of_client(client))]
            row[labels[labels >= 0]] = True
        return held

    def client_holdings(self, clients: Ints) -> NDArray[np.int16]:
        """Return int16 [s]: the number among `holdings` of what each client holds."""
        found: NDArray[np.int16] = self._kind_of_client[clients].astype(np.int16)
        return found

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients of the same holding, see `Workload`.

        Returns:
            samples, of the modalities that the clients have: ``"image"`` and ``"audio"``: float32 [s, m, 1, height,
            width], with ``"has_image"`` and ``"has_audio"``: float32 [s, m], 0 where a sample lacks it; ``"y"``: int64
            [s, m], -1 where it has no label; and, only where a row is padded, ``"mask"``.
        """
        rows = self.partition.indices[self.partition.offsets[clients][:, None] + np.maximum(positions, 0)]
        names = self._named(self._held[clients[0]])
        samples = self._fetch("train", torch.from_numpy(rows), names)
        samples["y"] = self._labels[torch.from_numpy(rows)]
        if (positions < 0).any():
            samples["mask"] = torch.from_numpy((positions >= 0).astype(np.float32))
        return Batch(samples, {})

    def _fetch(self, split: str, rows: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return samples of these modalities, zeros where they are missing, and which are there."""
        found = dict[str, Tensor]()
        for name in names:
            present = torch.from_numpy(self._present[split][:, self.modalities.index(name)])[rows].to(self.dtype)
            x = self.normalised(name, self._split(split).samples[name][rows.flatten()])
            found[name], found[HAS + name] = x.view(*rows.shape, *x.shape[1:]) * present[(...,) + (None,) * 3], present
        return found

    def normalised(self, name: str, values: Tensor) -> Tensor:
        """Return samples [b, channels, height, width] of a modality with mean 0 and deviation 1."""
        mean, deviation = self._moments[name]
        return (values.to(self.dtype) - mean).div_(deviation)

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the sum of the heads' mean cross entropies in nats, each over the samples that have what it needs."""
        context = ForwardContext(batch.get("scale", 1.0), key=batch.get("key"))
        logits = self.model.logits(params, batch, context)
        labels = batch["y"]
        counts = (labels >= 0).to(self.dtype) * batch.get("mask", 1.0)
        losses = [
            weighted_mean(cross_entropies(one, labels.clamp_min(0)), counts * self._needed(name, batch))
            for name, one in logits.items()
        ]
        return torch.stack(losses).sum()

    def _needed(self, head: str, batch: Mapping[str, Tensor]) -> Tensor:
        """Return which samples have what a head needs, 0 or 1, [b]."""
        needed = self.modalities if head == JOINED else (head,)
        return torch.stack([batch[HAS + name] for name in needed]).prod(0)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return, of each head, sums over the test samples that have what it needs; the server's heads if there are."""
        model = self._public.model_of(params) if self.traits.has_public_set else self.model
        part = chunk_of(len(self.data.test.labels), self.num_evaluation_chunks, chunk)
        rows = torch.arange(part.start, part.stop)
        batch, labels = self._fetch("test", rows, self.modalities), self.data.test.labels[rows]
        logits = model.logits(params, batch)
        found, best = Sums(), list[tuple[Tensor, Tensor]]()
        for name, one in sorted(logits.items(), key=lambda item: item[0] == JOINED):
            there = self._needed(name, batch) > 0
            found |= _sums(name, one[there], labels[there])
            best.append((there, one))
        chosen, known = torch.zeros_like(best[0][1]), torch.zeros(len(rows), dtype=torch.bool)
        for there, one in best:  # the head of all comes last
            chosen, known = torch.where(there[:, None], one, chosen), known | there
        return found | _sums("", chosen[known], labels[known])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics.

        ``accuracy`` and ``loss`` are those of the head of all modalities, where a sample has them, and else of the one
        that it has; samples that have lost everything do not count. ``accuracy_all``, ``accuracy_image`` and so on are
        those of one head, on the samples that have what it needs.
        """
        found = dict[str, float]()
        for key, value in sums.items():
            kind, _, head = key.partition(".")
            if kind != "count":
                metric = "accuracy" if kind == "correct" else kind
                found[metric + (f"_{head}" if head else "")] = float(value.sum() / max(sums[f"count.{head}"].sum(), 1))
        return found


def _sums(head: str, logits: Tensor, labels: Tensor) -> Sums:
    """Return what metrics of a head are made of."""
    values = {
        "correct": (logits.argmax(1) == labels).sum(),
        "loss": cross_entropies(logits, labels).double().sum(),
        "count": torch.tensor(len(labels)),
    }
    return {f"{name}.{head}": value.double().reshape(1).numpy() for name, value in values.items()}
