"""What a workload is: data of many clients, a model in a `Layout`, a loss and metrics.

A workload of your own is any object with the attributes of `Workload`; name it in a configuration as
``my_package.my_module:MyWorkload``. `gossamer.testing.check_workload` checks one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gossamer.submodel.layout import Layout

Params = Mapping[str, Tensor]
Sums = dict[str, NDArray[np.float64]]


class Product(NamedTuple):
    """The gradient of a linear layer by its weight, in two factors: that by its output, and its input.

    Attributes:
        weight: name of the parameter, [o, i] or [s, o, i].
        output: where the gradient by the output arrives.
        input: [b, i] or [s, b, i].
        is_transposed: whether the output is [..., b, o], rather than [..., o, b].
    """

    weight: str
    output: GradientEdge
    input: Tensor
    is_transposed: bool


class Leaves(dict[str, Tensor]):
    """The parameters that are being trained; where they are `factored`, the gradient of a weight need not be made.

    A layer may then keep a weight out of the graph and leave a `Product` instead, which is added to whatever else that
    weight's gradient is.
    """

    def __init__(self, params: Mapping[str, Tensor], *, factored: bool = False) -> None:
        """Take the parameters, each of which requires a gradient."""
        super().__init__(params)
        self.factored = factored
        self._products: list[Product] = []

    @property
    def params(self) -> dict[str, Tensor]:
        """What a loss is given: these where it may leave products, otherwise a plain dict."""
        return self if self.factored else dict(self)

    def leave_product(self, weight: str, output: Tensor, input: Tensor, *, is_transposed: bool) -> None:
        """Note what a layer made of its input, before anything overwrites it; `output` is no view. See `Product`."""
        self._products.append(Product(weight, get_gradient_edge(output), input.detach(), is_transposed))

    def take_products(self) -> list[Product]:
        """Return the products left since the last call."""
        taken, self._products = self._products, []
        return taken


class Batch(NamedTuple):
    """Training data of a block of s clients, m samples each.

    Attributes:
        samples: per-sample tensors, each [s, m, ...]. Where a row is padded, key ``"mask"`` (float32 [s, m]) is 0.
        client: constants of each client, each [s, ...], such as ``"labels"``: bool [s, num_labels], the classes it has.
    """

    samples: dict[str, Tensor]
    client: dict[str, Tensor]


class Workload(Protocol):
    """Data, model, loss and metrics.

    A class may also have two methods that matter to peers only: ``peer_init(seed)``, which returns the model that each
    of them starts from, [num_clients, d], where that is not `init` for all; and ``peer_metrics(rows)``, which returns
    further metrics (``{name: number}``) given the models of all peers, [num_clients, d]. Where ``leaves_products`` is
    true, `loss` may be given `Leaves` that are factored; otherwise it gets a plain dict.

    With ``warnings`` (sentences) it says what is allowed, but hardly meant; they are logged when the run starts.

    If a class takes the argument ``data``, it is what the attribute ``data`` of an equal workload holds, a dataclass
    that another process loaded and several share: its tensors must not be written to.

    Attributes:
        layout: how the model lies in a flat row.
        num_clients: registered clients.
        num_samples: int64 [num_clients], training samples of each client, all >= 1.
        num_labels: entries of the ``"label"`` axis, 0 if there is none.
        supports_padding: whether `loss` honours ``batch["mask"]``, which stacking clients of unequal batches needs
            (False where a layer mixes samples, as BatchNorm does while training).
        supports_stacking: whether `loss` works under `torch.vmap`.
        stacks_natively: whether `loss` also takes parameters and batches with a leading client dimension and then
            returns one loss a client, which spares the overhead of vmap.
        has_images: whether samples are [*, channels, height, width] images, for which channels-last may pay.
        statistics: names of model state that is set from data before evaluation (static BatchNorm); usually empty.
        num_statistics_chunks: into how many fixed pieces the training data is divided for `statistics`; 0: none needed.
        num_evaluation_chunks: into how many fixed pieces the test data is divided for `evaluate`.
    """

    layout: Layout
    num_clients: int
    num_samples: NDArray[np.int64]
    num_labels: int
    supports_padding: bool
    supports_stacking: bool
    stacks_natively: bool
    has_images: bool
    num_evaluation_chunks: int
    num_statistics_chunks: int

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat row [d], float32, or float64 if all of the training shall be."""
        ...

    def client_labels(self, clients: NDArray[np.int64]) -> Tensor:
        """Return bool [s, num_labels]: the labels that each client's training data holds."""
        ...

    def batch(self, clients: NDArray[np.int64], positions: NDArray[np.int64], round: int = 0) -> Batch:
        """Assemble samples for a block of clients.

        Args:
            clients: int64 [s].
            positions: int64 [s, m], sample numbers within each client's own data; -1 is padding.
            round: address of random augmentation.
        """
        ...

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean training loss (scalar) of one client's batch.

        Args:
            params: ``{name: tensor}`` of the (sub-)model.
            batch: per-sample tensors [b, ...] and client constants of a `Batch`, merged; plus ``"scale"`` (float): the
                factor of a sub-model's hidden activations while training (1 / capacity; 1.0 is off).
        """
        ...

    def statistics(self, params: Params, chunk: int) -> dict[str, Tensor]:
        """Return additive float64 sums over a chunk of the training data for static BatchNorm; {} if none is needed."""
        ...

    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return additive sums over chunk `chunk` of the test data; they are added up in order for `metrics`."""
        ...

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics such as ``{"accuracy": ..., "loss": ...}``."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass depends on besides parameters and inputs.

    Attributes:
        scale: factor for hidden activations, 1 / capacity or 1.0: the Scaler of HeteroFL (arXiv 2010.01264), while
            training.
        statistics: added-up sums as `record` receives them, by which BatchNorm normalises (static BatchNorm, same
            paper); None or empty: the moments of the batch.
        record: receives of every BatchNorm layer's input, per channel, ``"<layer>.sum"`` and ``"<layer>.squares"``
            (float64 [channels]) and ``"<layer>.count"`` (float64 []), which may be added up over batches.
    """

    scale: float | Tensor = 1.0
    statistics: Mapping[str, Tensor] | None = None
    record: dict[str, Tensor] | None = None


DEFAULT_CONTEXT = ForwardContext()


class Model(Protocol):
    """A model as pure functions of its parameters, so that it can be trained stacked.

    Attributes:
        shapes: ``{parameter: shape}`` in the order in which they lie in a row.
        axes: ``{parameter: (axis name | Dim | None, ...)}``.
        norms: names of the BatchNorm layers; usually empty.
    """

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


def add_sums(parts: Sequence[Sums]) -> Sums:
    """Add up the sums of chunks in their order."""
    total: Sums = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total
