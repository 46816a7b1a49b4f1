"""What a workload is: data of many clients, a model in a `Layout`, a loss and metrics.

A whole workload, for ``workload: "toy:Points"`` if it stands in a file ``toy.py``:

    >>> import numpy as np
    >>> import torch
    >>> from gossamer.submodel import Layout
    >>> from gossamer.workloads.base import Batch, Workload
    >>> from gossamer.workloads.traits import WorkloadTraits
    >>> class Points(Workload):  # the model is the point of the plane that is nearest to all clients' points
    ...     traits = WorkloadTraits()
    ...
    ...     def __init__(self, options, *, num_clients, partition, seed):
    ...         self.num_clients, self.num_samples = num_clients, np.full(num_clients, 4, dtype=np.int64)
    ...         self.layout = Layout.of({"x": (2,)}, {"x": (None,)})
    ...         self.points = 1 + torch.randn(num_clients, 4, 2, generator=torch.Generator().manual_seed(seed))
    ...
    ...     def init(self, seed):
    ...         return torch.zeros(self.layout.d)
    ...
    ...     def batch(self, clients, positions, round=0, phase=0):
    ...         held = torch.from_numpy(positions >= 0)
    ...         points = self.points[torch.from_numpy(clients)[:, None], torch.from_numpy(positions)]
    ...         return Batch({"points": points} if held.all() else {"points": points, "mask": held.float()}, {})
    ...
    ...     def loss(self, params, batch):
    ...         squares = (params["x"] - batch["points"]).square().sum(-1)
    ...         weights = batch.get("mask", torch.ones_like(squares))
    ...         return (squares * weights).sum() / weights.sum().clamp_min(1)
    ...
    ...     def evaluate(self, params, statistics, chunk):
    ...         squares = (params["x"] - self.points).double().square().sum(-1)
    ...         return {"loss": squares.sum().reshape(1).numpy(), "count": np.array([float(squares.numel())])}
    ...
    ...     def metrics(self, sums):
    ...         return {"loss": float(sums["loss"][0] / sums["count"][0])}

It keeps its contract; what becomes of a misspelt trait:

    >>> from gossamer.testing import check_workload
    >>> check_workload(Points({}, num_clients=3, partition="iid", seed=0))
    >>> WorkloadTraits(support_stacking=False)
    Traceback (most recent call last):
    gossamer.errors.ConfigError: WorkloadTraits has no trait 'support_stacking'; did you mean 'supports_stacking'? ...
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import ConfigError, require_attributes
from gossamer.options import check_traits
from gossamer.registry import resolve_function
from gossamer.submodel.layout import Layout
from gossamer.workloads.digests import digest_of
from gossamer.workloads.holdings import Holding
from gossamer.workloads.traits import ModelTraits, WorkloadTraits

Params = Mapping[str, Tensor]
Sums = dict[str, NDArray[np.float64]]


class Batch(NamedTuple):
    """Training data of a block of s clients, m samples each.

    Attributes:
        samples: per-sample tensors, each [s, m, ...]. Where a row is padded, key ``"mask"`` (float32 [s, m]) is 0.
        client: constants of each client, each [s, ...], such as ``"labels"``: bool [s, num_labels], the classes it has.
    """

    samples: dict[str, Tensor]
    client: dict[str, Tensor]


@dataclass(frozen=True)
class Blueprint:
    """What a model needs, besides its options, its seed and its trained parameters, to be built without the data.

    Attributes:
        facts: JSON values that `Workload.build_model` takes, such as the shape of an input.
        constants: ``{name: tensor}`` of frozen parameters and of buffers.
        aliases: ``{name: another one}`` of parameters that are the same as another one.
        merging: ``{weight: (A, B, factor)}``: names of low-rank factors of which ``factor B A`` is added to a weight.
        norms: names of the BatchNorm layers that are normalised by pooled moments, see `ForwardContext`.
        integers: names of the buffers that change and are whole numbers.
    """

    facts: Mapping[str, Any]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    merging: Mapping[str, tuple[str, str, float]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()


class Workload(Protocol):
    """Data, model, loss and metrics, made as ``cls(options, num_clients=..., partition=..., seed=...)``.

    To write one, derive it from this class: what is abstract must be written, the rest has defaults.

    If a class takes the argument ``data``, it is what the attribute ``data`` of an equal workload holds, a dataclass
    that another process loaded and several share: its tensors must not be written to. If it takes the argument
    ``whole_models``, that says whether nobody will cut the model, so that axes need not be found. If it takes the
    argument ``dtype``, it is given torch.float64 where all of training shall be in that precision: then `init`, and
    the floating-point samples of `batch`, must be float64.

    Attributes:
        traits: what it can and cannot do.
        layout: how the model lies in a flat row.
        num_clients: registered clients.
        num_samples: int64 [num_clients], training samples of each client, all >= 1.
        num_labels: entries of the label axes, 0 if there is none; of several, see `Layout.labels`, all together.
        norms: names of the BatchNorm layers that are trained, and evaluated by pooled moments.
        buffers: names of the layout's entries that are no parameters, but buffers that `loss` changes.
        personal: names of the layout's entries that stay with participants by the workload's own options.
        holdings: sets of modules, of which each participant holds one, see `client_holdings`; (): all hold all.
        num_statistics_chunks: fixed pieces into which the training data is divided for `statistics`; 0: none needed.
        num_evaluation_chunks: fixed pieces into which the test data is divided for `evaluate`.
        warnings: what is allowed, but hardly meant, a sentence each; logged when the run starts.
        passes: what came of going through all samples as they were loaded, see `gossamer.workloads.samples.telling`.
    """

    traits: WorkloadTraits
    layout: Layout
    num_clients: int
    num_samples: NDArray[np.int64]
    num_labels: int = 0
    norms: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    holdings: tuple[Holding, ...] = ()
    num_statistics_chunks: int = 0
    num_evaluation_chunks: int = 1
    warnings: tuple[str, ...] = ()
    passes: tuple[Any, ...] = ()

    @abstractmethod
    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat row [d], float32, or float64 if all of the training shall be."""
        ...

    def digest(self) -> str:
        """Return a digest of the data and their partition, see `digest_of`; by default of `num_samples` alone.

        A run resumes only on data of the digest that it began with.
        """
        return digest_of(self.num_samples)

    def client_labels(self, clients: NDArray[np.int64]) -> Tensor:
        """Return bool [s, num_labels]: the labels that each client's training data holds; by default all of them."""
        return torch.ones(len(clients), self.num_labels, dtype=torch.bool)

    def client_holdings(self, clients: NDArray[np.int64]) -> NDArray[np.int16]:
        """Return int16 [s], which of `holdings` each client holds: nothing else is sent, trained or counted."""
        return np.zeros(len(clients), dtype=np.int16)

    @abstractmethod
    def batch(self, clients: NDArray[np.int64], positions: NDArray[np.int64], round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients.

        Args:
            clients: int64 [s], who hold the same modules.
            positions: int64 [s, m], sample numbers within each client's own data; -1 is padding.
            round, phase: address of random augmentation.
        """
        ...

    @abstractmethod
    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean training loss (scalar) of one client's batch; write what becomes of `buffers` into `params`.

        Args:
            params: ``{name: tensor}`` of the (sub-)model, without those of modules that the participant lacks.
            batch: per-sample tensors [b, ...] and client constants of a `Batch`, merged; plus ``"scale"`` (float): the
                factor of a sub-model's hidden activations while training (1 / capacity; 1.0 is off); and, where traits
                say `uses_key`, ``"key"``: int64 [], random bits of this participant's very step.
        """
        ...

    def statistics(self, params: Params, chunk: int) -> dict[str, Tensor]:
        """Return additive float64 sums over a chunk of the training data for static BatchNorm; {} if none is needed."""
        return {}

    @abstractmethod
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return additive sums over chunk `chunk` of the test data; they are added up in order for `metrics`."""
        ...

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics such as ``{"accuracy": ..., "loss": ...}``."""
        ...

    def client_statistics(self, params: Params, client: int) -> dict[str, Tensor]:
        """Return what `statistics` does, over one client's own training data."""
        return {}

    def client_metrics(self, sums: Sums, client: int) -> dict[str, float]:
        """Turn added-up sums of a client's own model into metrics of its share of the test data; by default of all."""
        return self.metrics(sums)

    def client_counts(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return ``{"local_<metric>": (sum, number of samples)}`` of a client's share of the test data; default: {}."""
        return {}

    def hold(self, clients: NDArray[np.int64], chunks: NDArray[np.int64]) -> None:
        """Read now what would be read while training of these, where a process has hardly any others; default: not."""

    def params_of(self, row: Tensor) -> dict[str, Tensor]:
        """Return the whole model of a flat row [d]: what is trained, as views, and whatever is constant beside it."""
        return self.layout.views(row)

    def blueprint(self) -> Blueprint:
        """Return what `build_model` takes of the data, and what is constant in the model."""
        return Blueprint({})

    @classmethod
    def build_model(cls, options: Mapping[str, Any], facts: Mapping[str, Any], seed: int) -> Model:
        """Build the model without the data, for who takes it home; by default it is refused.

        Args:
            options: of the workload.
            facts: those of `blueprint`.
            seed: of the run.
        """
        raise ConfigError(
            f"workload {cls.__name__!r} says not how its model is built without the data: use its parameters"
        )

    def warnings_of(self, batch_size: int) -> tuple[str, ...]:
        """Return what is hardly meant about batches of this size, a sentence each."""
        return ()

    def peer_init(self, seed: int) -> Tensor:
        """Return the model that each peer starts from, [num_clients, d]; traits must say `has_peer_init`."""
        return self.init(seed).expand(self.num_clients, -1)

    def peer_metrics(self, rows: Tensor) -> dict[str, float]:
        """Return metrics of all peers' models, [num_clients, d]; traits must say `has_peer_metrics`."""
        return {}

    def public_set(self) -> Any:
        """Return samples that everybody has, see `gossamer.algorithms.creamfl`; traits must say `has_public_set`."""


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass depends on besides parameters and inputs.

    Attributes:
        scale: factor of hidden activations while training, 1 / capacity or 1.0: HeteroFL's Scaler (arXiv 2010.01264).
        statistics: added-up sums as `record` receives them, by which BatchNorm normalises (static BatchNorm, same
            paper); None or empty: the moments of the batch.
        record: receives of every BatchNorm layer's input, per channel, ``"<layer>.sum"`` and ``"<layer>.squares"``
            (float64 [channels]) and ``"<layer>.count"`` (float64 []), which may be added up over batches.
        training: whether it is part of training; False while metrics are computed.
        key: int64 [], or [s] of stacked participants: random bits from which dropout masks follow; None: no dropout.
        factors: ``{weight: (A [r, i], B [o, r])}``: low-rank products ``B A`` to be added to weights [o, i].
        moments: ``"<layer>.running_mean"`` and ``"<layer>.running_var"`` [channels], which BatchNorm takes if given.
        updates: receives what the forward pass makes of buffers that it changes, which are not changed themselves.
        terms: receives what a model adds to the training loss, [b] or []; None: nobody asks.
    """

    scale: float | Tensor = 1.0
    statistics: Mapping[str, Tensor] | None = None
    record: dict[str, Tensor] | None = None
    training: bool = True
    key: Tensor | None = None
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    moments: Mapping[str, Tensor] | None = None
    updates: dict[str, Tensor] | None = None
    terms: dict[str, Tensor] | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether the scaler changes anything."""
        return isinstance(self.scale, Tensor) or self.scale != 1.0


DEFAULT_CONTEXT = ForwardContext()


class Model(Protocol):
    """A model as pure functions of its parameters, so that it can be trained stacked.

    Attributes:
        traits: what it can and cannot do.
        shapes: ``{parameter: shape}`` in the order in which they lie in a row.
        axes: ``{parameter: (axis name | Dim | None, ...)}``; of a convolution's kernel `KERNEL`.
        norms: names of the BatchNorm layers; usually empty.
    """

    traits: ModelTraits
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[Any, ...]]
    norms: tuple[str, ...]

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, drawn from `source`."""
        ...

    def apply(self, params: Params, x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits [b, num_labels] of inputs x [b, channels, height, width].

        Args:
            params: parameters of the model or of a sub-model.
            x: the inputs.
            context: how they are treated on their way.
        """
        ...


class WithConstants:
    """Base of models that have parameters which are not trained, beside those that lie in a row.

    Attributes:
        buffers: names of entries of a row that are buffers which the forward pass changes.
    """

    buffers: tuple[str, ...] = ()

    @property
    def constants(self) -> dict[str, Tensor]:
        """What is not trained: parameters, and buffers."""
        raise NotImplementedError

    def convert(self, dtype: torch.dtype) -> None:
        """Have constants, and what `init` returns, in another floating-point type."""
        raise NotImplementedError

    def whole(self, params: Params) -> dict[str, Tensor]:
        """Return all parameters in the model's order: those given, and those that are not trained."""
        raise NotImplementedError


METHODS = (
    "init", "digest", "client_labels", "batch", "loss", "statistics", "evaluate", "metrics", "client_statistics",
    "client_metrics", "client_counts", "params_of", "blueprint", "build_model", "warnings_of", "hold"
)  # fmt: skip
ATTRIBUTES = (
    "layout", "num_clients", "num_samples", "num_labels", "num_statistics_chunks", "num_evaluation_chunks", "warnings"
)  # fmt: skip


def require_workload(plugin: str, found: Any) -> None:
    """Check the methods and the traits of the class of a workload, or all attributes of an instance.

    Args:
        plugin: what errors call it, such as ``"workload 'mine:MyWorkload'"``.

    Raises:
        ConfigError: it lacks something, or its traits are missing or contradicted, see `check_traits`.
    """
    is_class = isinstance(found, type)
    remedy = "derive it from gossamer.workloads.base.Workload"
    require_attributes(plugin, found, ("traits", *METHODS, *(() if is_class else ATTRIBUTES)), remedy)
    if not is_class and "data" in inspect.signature(type(found)).parameters:
        require_attributes(plugin, found, ("data",))
    check_traits(plugin, found, WorkloadTraits, Workload)


def require_model(plugin: str, found: Any) -> None:
    """Check that a model has what `Model` has.

    Raises:
        ConfigError: it lacks something, or its traits are missing or contradicted, see `check_traits`.
    """
    require_attributes(plugin, found, ("traits", "shapes", "axes", "norms", "init", "apply"))
    check_traits(plugin, found, ModelTraits, Model)


def find_workload(name: str) -> Callable[..., Workload]:
    """Return the class of a workload's name, or a function that makes one, which can be checked only then.

    Raises:
        RegistryError: the name is unknown.
        ConfigError: see `require_workload`.
    """
    found: Callable[..., Workload] = resolve_function("workload", name)
    if isinstance(found, type):
        require_workload(f"workload {name!r}", found)
    return found


def add_sums(parts: Sequence[Sums]) -> Sums:
    """Add up the sums of chunks in their order."""
    total: Sums = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total
