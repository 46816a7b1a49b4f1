"""Classification of images, or other samples, over many clients: data, a partition, a model, what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.submodel.layout import Axes
from gossamer.workloads.augment import crop_flip
from gossamer.workloads.base import ForwardContext, Model, Params, Sums, require_model
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.label_sets import MAX_COUNTS, LabelSets, beaten_by
from gossamer.workloads.models import Fitting
from gossamer.workloads.modules import TRIED, ModuleModel
from gossamer.workloads.parts import PartlyTrained
from gossamer.workloads.plugins import Spec, with_sizes
from gossamer.workloads.sample_data import OwnTestData
from gossamer.workloads.seeding import seed_of, seeded
from gossamer.workloads.supervised import Ints, Request, Supervised, SupervisedOptions, chunk_of, cross_entropies

NUM_TOKENS = "num_tokens"  # parameter of models that take the size of the vocabulary
CACHED_IMAGES = 128  # images that are normalised at a time
MANY_SETS = (
    "local_accuracy and worst_client_accuracy are not measured: the clients' distinct sets of classes, times the number"
    f" of classes, are more than {MAX_COUNTS}; set workload.local_evaluation to false to silence this warning"
)


class ImageOptions(SupervisedOptions):
    """Options of `ImageClassification`, besides those of every `Supervised`.

    Attributes:
        model: a `torch.nn.Module` class of your own is a model, too, see `gossamer.workloads.modules.ModuleModel`. It
            is called with the shape of a sample and the number of classes, see `with_sizes`; where samples are tokens
            and it has a parameter `num_tokens` without a default, that is the size of the vocabulary.
        augment: ``"none"`` or ``"crop-flip"``.
        statistics_chunk: most samples by whose moments a static-BatchNorm pass normalises at a time.
        local_evaluation: whether each client's accuracy on its own classes is measured.
    """

    dataset: Spec = "digits"
    model: Spec = "mlp"
    augment: Literal["none", "crop-flip"] = "none"
    statistics_chunk: int = Field(500, ge=1)
    local_evaluation: bool = True


class ImageClassification(Supervised):
    """Classification of images, or of other samples, see `gossamer.workloads.sample_data.SampleData`.

    In a batch, ``"x"`` is float32 [s, m, channels, height, width], normalised, and ``"y"``: int64 [s, m]. A padded
    sample is a zero image of class 0. Other samples are float32 or int64 [s, m, ...]. Where training is in float64,
    samples are converted batch by batch, and normalised in it.
    """

    Options: ClassVar[type[SupervisedOptions]] = ImageOptions
    data_class, data_kind, model_kind = ImageData, "dataset", "model"

    def _prepare(self) -> tuple[Ints, int, Ints | None]:
        self._num_test, self._input_size = len(self.data.test_labels), self.data.shape
        along = (-1, *(1 for _ in self.data.shape[1:]))
        self._mean = torch.tensor(self.data.mean, dtype=self.dtype).view(along)
        self._inverse_std = 1 / torch.tensor(self.data.std, dtype=self.dtype).view(along)
        if self.options.augment == "crop-flip" and len(self.data.shape) != 3:
            raise ConfigError(
                f"workload.augment = 'crop-flip' is for images, but samples have the shape {self.data.shape}: leave it"
                " out"
            )
        self._is_normal = set(self.data.mean) == {0.0} and set(self.data.std) == {1.0}
        owner = None if self.data.owner is None else self.data.owner.numpy()
        return self.data.train_labels.numpy(), self.num_labels, owner

    @classmethod
    def _make_model(cls, asked: Request) -> Model:
        size, facts = asked.size, asked.facts
        params = {**asked.params, **_vocabulary_size(asked.function, asked.params, facts)}
        function, source = with_sizes(asked.function, params), partial(rng.generator, asked.seed, "init-model")
        with (
            seeded(seed_of(source())),
            Fitting("workload.model"),
        ):  # what is made only to see what it is leaves no trace
            model = super()._make_model(asked._replace(function=function, params=params))
        if isinstance(model, nn.Module):
            build = partial(function, size, facts["num_labels"], **params)
            few = torch.tensor(facts["tokens"]) if "tokens" in facts else None
            return ModuleModel(
                build,
                size,
                facts["num_labels"],
                seed=seed_of(source()),
                samples=few,
                keeps_buffers=asked.keeps_buffers,
            )
        if "tokens" in facts and not isinstance(model, ModuleModel):
            require_model("workload.model", model)
            if not model.traits.takes_tokens:
                raise ConfigError(
                    "workload.model takes no samples of whole numbers: take transformer, or a module of your own"
                )
        if isinstance(model, ModuleModel):
            model.reseed(source())
        return model

    def _axes(self, whole_models: bool) -> Axes:
        if whole_models and isinstance(self.model, ModuleModel | PartlyTrained):
            return self.model.whole_axes
        return self.model.axes

    @property
    def _has_tokens(self) -> bool:
        return self.data.train_images.dtype == torch.int64  # type: ignore[no-any-return]

    def _facts(self) -> dict[str, Any]:
        found = super()._facts() | {"mean": list(self.data.mean), "std": list(self.data.std)}
        if self._has_tokens:
            found |= {"tokens": self.data.train_images[:TRIED].tolist(), NUM_TOKENS: self.data.num_tokens}
        return found

    @torch.no_grad()
    def warnings_of(self, batch_size: int) -> tuple[str, ...]:
        """Warn of batches of one sample where BatchNorm would get a single value a channel."""
        alone = int(((self.num_samples - 1) % batch_size == 0).sum())
        if not alone or not self.model.norms:
            return ()
        sums: dict[str, Tensor] = {}
        one = self._forward_only(self.data.train_images[:1])
        self.model.apply(self.layout.views(self.init(self.seed)), one, ForwardContext(record=sums))
        single = [name for name in self.model.norms if f"{name}.count" in sums and float(sums[f"{name}.count"]) == 1]
        if not single:
            return ()
        return (
            f"{alone} of {self.num_clients} clients have a batch of one sample, whose channels BatchNorm {single[0]!r}"
            f" turns into their bias: choose another train.batch_size than {batch_size}, or another norm",
        )

    def _find_labels(self) -> Tensor:
        """Count the training samples of each client and class, int32 [num_clients, num_labels]."""
        client = np.repeat(np.arange(self.num_clients), self.num_samples)
        cell = client * self.num_labels + self.data.train_labels.numpy()[self.partition.indices]
        counts = np.bincount(cell, minlength=self.num_clients * self.num_labels)
        is_partial = len(self.partition.indices) < len(self.data.train_labels)
        self._held = torch.from_numpy(np.sort(self.partition.indices)) if is_partial else None
        self._histogram = counts.astype(np.int32).reshape(self.num_clients, self.num_labels)
        is_local = self.options.local_evaluation
        self._client_of_test = self._find_owners() if is_local else None
        self._label_sets = LabelSets.of(self._histogram) if is_local and self._client_of_test is None else None
        if is_local and self._client_of_test is None and self._label_sets is None:
            self.warnings += (MANY_SETS,)
        if "statistics_chunk" in self.options.model_fields_set and not self.model.norms:
            self.warnings += (
                "workload.statistics_chunk changes nothing, because the model has no BatchNorm: leave it out",
            )
        return torch.from_numpy(self._histogram > 0)

    def _find_owners(self) -> Ints | None:
        """Return the client of each test sample, -1 for none; None where clients are no owners of test samples."""
        if not isinstance(self.data, OwnTestData):
            return None
        assert self.data.owner is not None
        assert self.data.test_owner is not None
        owners = self.data.owner.numpy()[self.partition.indices]
        first = owners[self.partition.offsets[:-1]]
        if not np.array_equal(owners, np.repeat(first, self.num_samples)) or len(set(first)) != len(first):
            return None
        client = np.full(int(max(owners.max(), self.data.test_owner.max())) + 1, -1)
        client[first] = np.arange(self.num_clients)
        found: Ints = client[self.data.test_owner.numpy()]
        return found

    @property
    def num_statistics_chunks(self) -> int:  # type: ignore[override]
        """Pieces into which the training data is divided for the statistics of BatchNorm layers, if there are any."""
        return -(-len(self.partition.indices) // self.options.statistics_chunk) if self.model.norms else 0

    def _fetch(self, rows: Ints, padding: NDArray[np.bool_], round: int, phase: int) -> dict[str, Tensor]:
        picked = torch.from_numpy(rows.reshape(-1))
        images = self.data.train_images.index_select(0, picked)
        if self.options.augment == "crop-flip":
            images = crop_flip(images, rows.reshape(-1), self.seed, round, phase)
        samples = {
            "x": self._normalised(images, is_own=True).view(*rows.shape, *self.data.shape),
            "y": self.data.train_labels.index_select(0, picked).view(rows.shape),
        }
        if padding.any():
            absent = torch.from_numpy(np.flatnonzero(padding))
            samples["x"].view(rows.size, -1).index_fill_(0, absent, 0)
            samples["y"].view(-1).index_fill_(0, absent, 0)
        return samples

    def hold(self, clients: Ints, chunks: Ints) -> None:
        """Read the samples of clients, and of chunks of the test data, now, if they would be read while training."""
        own = [self.partition.of_client(client) for client in clients.tolist()]
        total, num_chunks = len(self.data.test_labels), self.num_evaluation_chunks
        tested = [np.arange(total)[chunk_of(total, num_chunks, chunk)] for chunk in chunks.tolist()]
        numbers = (np.concatenate([np.empty(0, np.int64), *some]) for some in (own, tested))
        self.data = self.data.holding(*(torch.from_numpy(some) for some in numbers))

    def _normalised(self, images: Tensor, *, is_own: bool = False, channels_last: bool = False) -> Tensor:
        """Return images of mean 0 and deviation 1 a channel, made in pieces that stay in the cache.

        Args:
            is_own: `images` may be overwritten.
        """
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if (self._is_normal and images.dtype == self.dtype) or images.dtype == torch.int64:
            return images.contiguous(memory_format=memory_format)
        in_place = is_own and images.dtype == self.dtype and images.is_contiguous(memory_format=memory_format)
        normal = images if in_place else torch.empty(images.shape, dtype=self.dtype, memory_format=memory_format)
        for start in range(0, len(images), CACHED_IMAGES):
            part = slice(start, start + CACHED_IMAGES)
            piece = normal[part] if in_place else normal[part].copy_(images[part])
            piece.sub_(self._mean).mul_(self._inverse_std)
        return normal

    def loss_of_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what `loss` does, from the batch's `logits`."""
        losses = cross_entropies(logits, batch["y"])
        mask: Tensor | None = batch.get("mask")
        if mask is None:
            return losses.mean(-1)
        return torch.where(mask > 0, losses, 0.0).sum(-1) / mask.sum(-1).clamp_min(1.0)

    @torch.no_grad()
    def statistics(self, params: Params, chunk: int) -> dict[str, Tensor]:
        """Return BatchNorm sums over a chunk of the training data, see `ForwardContext`; {} without BatchNorm.

        The chunk itself is normalised by its own moments on its way through the network.
        """
        sums: dict[str, Tensor] = {}
        if self.num_statistics_chunks:
            part = chunk_of(len(self.partition.indices), self.num_statistics_chunks, chunk)
            rows = part if self._held is None else self._held[part]
            self.model.apply(params, self._forward_only(self.data.train_images[rows]), ForwardContext(record=sums))
        return sums

    @torch.no_grad()
    def client_statistics(self, params: Params, client: int) -> dict[str, Tensor]:
        """Return what `statistics` does, over the training data of one client, all of them normalised together."""
        own = self.partition.of_client(client)
        sums: dict[str, Tensor] = {}
        images = self._forward_only(self.data.train_images[torch.from_numpy(own)])
        self.model.apply(params, images, ForwardContext(record=sums))
        return sums

    def _forward_only(self, images: Tensor) -> Tensor:
        """Return normalised images in the memory format in which convolutions are quicker without gradients."""
        return self._normalised(images, channels_last=self.traits.has_images)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over a chunk of the test data.

        Returns:
            ``"loss"``, ``"correct"``, ``"count"``: float64 [1]; with local evaluation also ``"tested"``: float64
            [num_labels] and ``"local_correct"``: float64 [label sets, num_labels], see `LabelSets`; or
            ``"own_tested"`` and ``"own_correct"``: float64 [num_clients], of each client's own test samples.
        """
        part = chunk_of(len(self.data.test_labels), self.num_evaluation_chunks, chunk)
        labels = self.data.test_labels[part]
        context = ForwardContext(statistics=statistics, training=False)
        logits = self.model.apply(params, self._forward_only(self.data.test_images[part]), context)
        beaten = beaten_by(logits, labels)
        sums = {
            "loss": F.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64),
            "correct": (~beaten).all(dim=1).sum(),
            "count": torch.tensor(len(labels)),
        }
        arrays: Sums = {name: value.to(torch.float64).reshape(1).numpy() for name, value in sums.items()}
        if self._client_of_test is not None:
            client, right = self._client_of_test[part], (~beaten).all(dim=1).numpy()
            arrays["own_tested"] = _count(client[client >= 0], self.num_clients)
            arrays["own_correct"] = _count(client[(client >= 0) & right], self.num_clients)
        elif self._label_sets is not None:
            arrays["tested"] = np.bincount(labels.numpy(), minlength=self.num_labels).astype(np.float64)
            arrays["local_correct"] = self._label_sets.correct(beaten, labels)
        return arrays

    def measured(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics of the test data.

        Returns:
            ``accuracy`` and ``loss`` on the whole test data; with local evaluation also ``local_accuracy`` and
            ``worst_client_accuracy``, the mean and the least of the clients' accuracies on their own classes. These two
            are left out where distinct label sets are too many, see `warnings`. Clients that are the owners of data
            with test samples of each owner (`OwnTestData`) are tested on these, on all classes.
        """
        found, local = super().measured(sums), self._accuracies(sums)
        if len(local):
            found |= {"local_accuracy": float(local.mean()), "worst_client_accuracy": float(local.min())}
        return found

    def measured_of(self, sums: Sums, client: int) -> dict[str, float]:
        """Return the accuracy of a client on its own classes, or its own test samples; where there are none, nothing.

        Without local evaluation it is the accuracy on all of the test data.
        """
        if not self.options.local_evaluation:
            return {"accuracy": super().measured(sums)["accuracy"]}
        found = self._accuracies(sums, slice(client, client + 1))
        return {"accuracy": float(found[0])} if len(found) else {}

    def counted_of(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return (right predictions, samples) of a client: of its own test samples, or see `LabelSets.counts`."""
        right, number = self._counts(sums, slice(client, client + 1))
        return {"accuracy": (float(right[0]), float(number[0]))} if number.any() else {}

    def _accuracies(self, sums: Sums, clients: slice = slice(None)) -> NDArray[np.float64]:
        """Return the accuracies of clients on their own share of the test data, of those that have some."""
        right, number = self._counts(sums, clients)
        return np.asarray(right[number > 0] / number[number > 0])

    def _counts(self, sums: Sums, clients: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return right predictions and samples of clients, on their own share of the test data."""
        if self._client_of_test is not None:
            return sums["own_correct"][clients], sums["own_tested"][clients]
        if self._label_sets is None:
            return np.zeros(0), np.zeros(0)
        return self._label_sets.counts(sums["local_correct"], sums["tested"], clients)


def _vocabulary_size(
    function: Callable[..., Any], params: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the argument `num_tokens` of a model that takes it and was not given it, where samples are tokens.

    Raises:
        ConfigError: it was given, but is too small.
    """
    known = facts.get(NUM_TOKENS)
    given = params.get(NUM_TOKENS)
    if known is not None and isinstance(given, int) and given < known:
        raise ConfigError(f"workload.model.{NUM_TOKENS} = {given}, but the data have {known} tokens: raise it")
    try:
        parameter = inspect.signature(function).parameters.get(NUM_TOKENS)
    except ValueError:  # some built-in types have no signature
        return {}
    is_open = parameter is not None and parameter.default in (inspect.Parameter.empty, None)
    return {NUM_TOKENS: known} if is_open and NUM_TOKENS not in params and known is not None else {}


def _count(clients: Ints, num_clients: int) -> NDArray[np.float64]:
    """Return how often each client occurs, [num_clients]."""
    return np.bincount(clients, minlength=num_clients).astype(np.float64)
