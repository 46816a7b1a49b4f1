"""What workloads of labelled samples share: a data set, a partition, a model, and the cross entropy of its logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError, DataError
from gossamer.options import Options, parse_options
from gossamer.registry import BUILTIN
from gossamer.submodel.layout import Axes, Layout
from gossamer.workloads.base import (
    Batch,
    Blueprint,
    ForwardContext,
    Model,
    Params,
    Sums,
    WithConstants,
    Workload,
    require_model,
)
from gossamer.workloads.digests import digest_of
from gossamer.workloads.functional import blueprint_of
from gossamer.workloads.label_sets import mask_logits
from gossamer.workloads.partitions import divide
from gossamer.workloads.parts import LoRAOptions, PartlyTrained
from gossamer.workloads.plugins import Spec, call_plug_in, plug_in
from gossamer.workloads.traits import WorkloadTraits

Ints = NDArray[np.int64]


class SupervisedOptions(Options):
    """Options of every `Supervised`.

    Attributes:
        dataset: name of a data set, or a mapping of ``name`` and its options.
        model: name of a model, or a mapping of ``name`` and its options.
        label_mask: treatment in the training loss of labels that the client does not hold: ``"none"`` (the default: all
            logits count), ``"zero"`` (their logits become 0, as in HeteroFL's code) or ``"minus-inf"`` (left out).
        evaluation_chunk: most samples that are evaluated at a time.
        validation: share of the training data that is held out and evaluated instead of the test data, by which to
            choose learning rates and the like. Metrics are then called ``validation_accuracy`` and so on.
        frozen: patterns of parameters that are constants, such as ``"backbone.*"``: neither trained, nor sent, nor cut.
        lora: low-rank factors that are trained in the place of all parameters, see `LoRAOptions`.
        buffers: what becomes of buffers that a module's forward pass changes while training, such as running moments of
            BatchNorm: ``"averaged"`` (they are sent and averaged as parameters are; those of whole numbers are rounded
            where they are used) or ``"personal"`` (they stay with each participant). Without it, BatchNorm has moments
            pooled over the training data instead, and other such buffers are refused.
    """

    dataset: Spec
    model: Spec
    label_mask: Literal["none", "zero", "minus-inf"] = "none"
    evaluation_chunk: int = Field(1000, ge=1)
    validation: float | None = Field(None, gt=0, lt=1)
    frozen: tuple[str, ...] = ()
    lora: LoRAOptions | None = None
    buffers: Literal["averaged", "personal"] | None = None


class Request(NamedTuple):
    """What a model is made of.

    Attributes:
        function: the plug-in.
        params: its options.
        size: shape of a sample, or what else `Supervised._prepare` says of its size.
        facts: those of the data, see `Supervised.build_model`.
        seed: of the run.
        keeps_buffers: whether buffers that the forward pass changes are entries of the model.
    """

    function: Callable[..., Any]
    params: Mapping[str, Any]
    size: Any
    facts: Mapping[str, Any]
    seed: int
    keeps_buffers: bool = False


class Supervised(Workload):
    """Base of workloads whose model returns logits; see `base.Workload` for the attributes and methods.

    Attributes:
        Options: of the workload.
        data_class: class of data sets, with the attribute `num_labels` and a method ``hold_out(share, seed)``, which
            returns the data set whose test data are a share of the training data, taken out of these.
        data_kind, model_kind: kinds of plug-ins that data sets and models are, see `gossamer.registry`.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a plug-in that does not take it.
        DataError: the data is missing or malformed, or cannot be divided as asked.
    """

    Options: ClassVar[type[SupervisedOptions]]
    data_class: ClassVar[type[Any]]
    data_kind: ClassVar[str]
    model_kind: ClassVar[str]
    traits = WorkloadTraits()
    _num_test: int
    _input_size: Any

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str,
        seed: int,
        data: Any = None,
        whole_models: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the data, divide it and lay out the model.

        Args:
            options: see `Options`.
            num_clients: number of clients that share the training data.
            partition: name of a partition, or a mapping of ``name`` and its parameters.
            seed: seed of the partition and of augmentation.
            data: a `data_class`, if it is loaded already.
            whole_models: whether nobody will cut the model, so that axes that must be traced need not be.
            dtype: that of parameters, and of samples that are no whole numbers, in a batch.
        """
        self.options: Any = parse_options(self.Options, options, "workload")
        self.num_clients, self.seed, self.dtype = num_clients, seed, dtype
        self.data = self._load_data() if data is None else data
        self.num_labels = self.data.num_labels
        self.partition = divide(partition, num_clients, seed, *self._prepare())
        self.num_samples = self.partition.num_samples
        name, _, params = plug_in(self.model_kind, self.options.model, "workload.model")
        self.model = self.build_model(options, self._facts(), seed)
        if dtype != torch.float32 and isinstance(self.model, WithConstants):
            self.model.convert(dtype)
        self.norms = tuple(self.model.norms)
        self.buffers = self.model.buffers if isinstance(self.model, WithConstants) else ()
        self.personal = self.buffers if self.options.buffers == "personal" else ()
        self.layout = Layout.of(self.model.shapes, self._axes(whole_models))
        is_built_in = name in BUILTIN[self.model_kind]
        if params.get("width", 1.0) != 1.0 and is_built_in and not self.layout.cut_axes:
            self.warnings += (f"workload.model.width changes nothing, because model {name!r} has no hidden width",)
        if not is_built_in and "dataset" not in self.options.model_fields_set:
            self.warnings += (
                f"no data are given, so the model {name!r} is trained on {self.options.dataset!r}: give data=... in"
                " Python, or workload.dataset",
            )
        own, model = type(self), self.model.traits
        self.traits = replace(
            self.traits,
            supports_padding=self.traits.supports_padding and not (self.model.norms or self.buffers),
            supports_stacking=self.traits.supports_stacking and model.supports_stacking,
            stacks_natively=model.stacks_natively,
            has_images=model.has_images,
            uses_key=model.uses_key,
            merges_parameters=self.options.lora is not None,
            # whether the loss is this class's own, which asks for no gradient itself
            leaves_products=own.loss is Supervised.loss and own.logits is Supervised.logits,
        )
        self.num_evaluation_chunks = -(-self._num_test // self.options.evaluation_chunk)
        self._holds_label = self._find_labels()

    @abstractmethod
    def _prepare(self) -> tuple[Ints, int, Ints | None]:
        """Make samples of the data; set `_num_test`, how many of them are for testing, and `_input_size`, of one.

        Returns:
            what partitions divide by: a class of each training sample, the number of classes, an owner of each or None.
        """

    @classmethod
    def build_model(cls, options: Mapping[str, Any], facts: Mapping[str, Any], seed: int) -> Model:
        """Build the model without the data, see `base.Workload`."""
        parsed: Any = parse_options(cls.Options, options, "workload")
        name, function, params = plug_in(cls.model_kind, parsed.model, "workload.model")
        size = facts["input_size"]
        keeps = parsed.buffers is not None
        size = tuple(size) if isinstance(size, list) else size
        model = cls._make_model(Request(function, params, size, facts, seed, keeps))
        require_model(f"workload.model {name!r}", model)
        frozen = parsed.frozen if parsed.lora is not None else (*parsed.frozen, *model.traits.always_frozen)
        if frozen or parsed.lora is not None:
            source = partial(rng.generator, seed, "init-model")
            parted: Any = PartlyTrained(model, frozen, parsed.lora, source)
            model = parted
        if keeps and not (isinstance(model, WithConstants) and model.buffers):
            raise ConfigError(
                f"workload.buffers = {parsed.buffers!r}, but the forward pass of model {name!r} changes none: leave it"
                " out"
            )
        return model

    def blueprint(self) -> Blueprint:
        """Return what `build_model` takes of the data, and what is constant in the model."""
        return blueprint_of(self.model, self._facts())

    def _facts(self) -> dict[str, Any]:
        """Return what `build_model`, and who uses the model, must know of the data, as JSON values."""
        return {"input_size": self._input_size, "num_labels": self.num_labels}

    @classmethod
    def _make_model(cls, asked: Request) -> Model:
        labels = asked.facts["num_labels"]
        model: Model = call_plug_in(asked.function, "workload.model", asked.size, labels, **asked.params)
        return model

    def _axes(self, whole_models: bool) -> Axes:
        return self.model.axes

    @abstractmethod
    def _find_labels(self) -> Tensor:
        """Return which labels each client's training data holds, bool [num_clients, num_labels]."""

    @abstractmethod
    def _fetch(self, rows: Ints, padding: NDArray[np.bool_], round: int, phase: int) -> dict[str, Tensor]:
        """Return ``"x"`` and ``"y"`` of a batch.

        Args:
            rows: int64 [s, m], numbers of training samples.
            padding: bool [s, m], whose samples are to be replaced by nothing.
            round, phase: numbers of the round and the phase, by which augmentation is drawn.
        """

    @abstractmethod
    def loss_of_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what `loss` does, from the batch's `logits`."""

    def _load_data(self) -> Any:
        name, function, params = plug_in(self.data_kind, self.options.dataset, "workload.dataset")
        data = call_plug_in(function, "workload.dataset", params)
        if not isinstance(data, self.data_class):
            wanted = f"{self.data_class.__module__}.{self.data_class.__name__}"
            raise DataError(f"data set {name!r} returned {type(data).__name__}: return {wanted}")
        return data if self.options.validation is None else data.hold_out(self.options.validation, self.seed)

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat row [d]; in float64 they are those of float32."""
        return self.layout.flatten(self.model.init(rng.generator(seed, "init-model"))).to(self.dtype)

    def digest(self) -> str:
        """Return a digest of the data set, its partition, and what is constant in the model."""
        constants = self.model.constants if isinstance(self.model, WithConstants) else {}
        found = digest_of(self.data, self.partition)
        return digest_of(found, constants) if constants else found

    def params_of(self, row: Tensor) -> dict[str, Tensor]:
        """Return the whole model of a flat row [d]: frozen parameters included, low-rank factors merged."""
        params = super().params_of(row)
        return self.model.whole(params) if isinstance(self.model, WithConstants) else params

    def client_labels(self, clients: Ints) -> Tensor:
        """Return bool [s, num_labels]: the labels of each client's training data."""
        return self._holds_label[torch.from_numpy(clients)]

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients.

        Args:
            clients: int64 [s].
            positions: int64 [s, m], sample numbers within each client's own data; -1 is padding.
            round, phase: by which augmentation is drawn.

        Returns:
            samples ``"x"``: [s, m, ...] and ``"y"``: int64 [s, m, ...], see the class, and, only where a row is padded,
            ``"mask"``: float32 [s, m]; client constants ``"labels"``: bool [s, num_labels], see `client_labels`.

        Raises:
            IndexError: a position beyond the client's samples.
        """
        if (positions >= self.num_samples[clients][:, None]).any():
            raise IndexError(
                f"a position exceeds the samples {self.num_samples[clients].tolist()} of clients {clients.tolist()}"
            )
        padding = positions < 0
        rows = self.partition.indices[self.partition.offsets[clients][:, None] + np.maximum(positions, 0)]
        samples = self._fetch(rows, padding, round, phase)
        if padding.any():
            samples["mask"] = torch.from_numpy((~padding).astype(np.float32))
        return Batch(samples, {"labels": self.client_labels(clients)})

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross entropy in nats, averaged over what is not padding (0 if there is nothing).

        Args:
            params: parameters of the (sub-)model.
            batch: ``"x"``, ``"y"``, ``"labels"`` and optionally ``"mask"`` of `batch`, without the leading s, and
                optionally ``"scale"`` and ``"key"``.
        """
        share, terms = self.model.traits.terms_share, dict[str, Tensor]()
        loss = self.loss_of_logits(self.logits(params, batch, terms), batch)
        if not share:
            return loss
        return (1 - share) * loss + share * sum(mean_of_term(term, batch.get("mask")) for term in terms.values())

    def logits(self, params: Params, batch: Mapping[str, Any], terms: dict[str, Tensor] | None = None) -> Tensor:
        """Return the logits [..., num_labels] of a training batch, masked as the option `label_mask` says.

        Args:
            params, batch: see `loss`.
            terms: receives what the model adds to the loss.

        Raises:
            ConfigError: the model adds something, but nobody asks what.
        """
        if terms is None and self.model.traits.terms_share:
            raise ConfigError(
                f"model {self.options.model!r} adds terms to the loss, which an algorithm with a loss of its own leaves"
                " out: choose fedavg, fedrolex or the like"
            )
        updates: dict[str, Tensor] = {}
        context = ForwardContext(batch.get("scale", 1.0), key=batch.get("key"), updates=updates, terms=terms)
        logits: Tensor = self.model.apply(params, batch["x"], context)
        for name, value in updates.items():
            params[name].data.copy_(value.detach())  # other entries of the row are still to be differentiated by
        return mask_logits(logits, batch["labels"].unsqueeze(-2), self.options.label_mask)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics, see `measured`, whose names say where it is not the test data."""
        prefix = "" if self.options.validation is None else "validation_"
        return {prefix + name: value for name, value in self.measured(sums).items()}

    def client_metrics(self, sums: Sums, client: int) -> dict[str, float]:
        """Turn added-up sums of a client's own model into its metrics, named as `metrics` are."""
        prefix = "" if self.options.validation is None else "validation_"
        return {prefix + name: value for name, value in self.measured_of(sums, client).items()}

    def client_counts(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return what `counted_of` does, named as `metrics` are: ``local_<metric>``."""
        prefix = "" if self.options.validation is None else "validation_"
        return {f"{prefix}local_{name}": counts for name, counts in self.counted_of(sums, client).items()}

    def counted_of(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return ``{metric: (sum, number of samples)}`` of a client's share of the test data, by default of nothing."""
        return {}

    def measured_of(self, sums: Sums, client: int) -> dict[str, float]:
        """Return the metrics of one client's share of the test data, by default of all."""
        return self.measured(sums)

    def measured(self, sums: Sums) -> dict[str, float]:
        """Return ``accuracy`` and ``loss`` on the whole test data, given ``"loss"``, ``"correct"`` and ``"count"``."""
        loss, correct, count = (float(sums[name].sum()) for name in ("loss", "correct", "count"))
        return {"accuracy": correct / count, "loss": loss / count}


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return losses [...] of logits [..., num_labels]: F.cross_entropy, which under vmap is made of slow parts."""
    if logits.dtype.itemsize < 4:  # train.precision is half
        logits = logits.float()
    return -F.log_softmax(logits, dim=-1).gather(-1, labels[..., None]).squeeze(-1)


def mean_of_term(term: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of a term of the loss, [b] or [], over what is not padding (0 if there is nothing)."""
    if mask is None or not term.dim():
        return term.mean()
    return torch.where(mask > 0, term, 0.0).sum() / mask.sum().clamp_min(1.0)


def chunk_of(total: int, num_chunks: int, chunk: int) -> slice:
    """Return one of `num_chunks` slices of ``range(total)`` whose sizes differ by one at most."""
    return slice(total * chunk // num_chunks, total * (chunk + 1) // num_chunks)
