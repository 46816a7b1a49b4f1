"""What participants compute, send and hold, counted rather than guessed, and the simulated time that this takes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gossamer.aggregate.codec_base import Codec
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.carries import carry_views, given_to_loss
from gossamer.simulation.costs import VariantCosts
from gossamer.submodel import Layout
from gossamer.submodel.tracing_rules import RULES
from gossamer.threads import one_thread
from gossamer.workloads.base import Workload
from gossamer.workloads.holdings import Holding

BYTES_PER_FLOAT = 4
VECTOR_PRODUCTS = {torch.ops.aten.mv, torch.ops.aten.addmv, torch.ops.aten.dot, torch.ops.aten.vdot}
# Operations, besides those that tracing has rules for, that cost little more than to read and to write their tensors.
_CHEAP = """
    aminmax arange as_strided bernoulli binary_cross_entropy binary_cross_entropy_with_logits bincount bucketize
    channel_shuffle clone col2im count_nonzero cummax cummin diag_embed elu embedding_bag embedding_dense
    embedding_renorm empty empty_strided equal eye fractional_max_pool2d full fused_rms_norm grid_sampler_2d
    grid_sampler_3d histc huber_loss im2col index_add index_copy index_fill index_put index_put_impl isin kthvalue
    linalg_check_errors linalg_cross linspace local_scalar_dense masked_scatter masked_select max_unpool2d median mish
    mode mse_loss multi_margin_loss multilabel_margin_loss multinomial nanmedian nansum new_empty new_empty_strided
    new_full new_ones new_zeros nll_loss nll_loss2d nonzero nonzero_static ones pixel_shuffle pixel_unshuffle rand
    randint randn randperm reflection_pad3d repeat_interleave replication_pad3d resize rrelu_with_noise scalar_tensor
    scatter scatter_add scatter_reduce searchsorted smooth_l1_loss softplus std_mean take topk tril_indices
    triu_indices unfold unique2 unique_consecutive unsafe_index upsample_bicubic2d upsample_nearest3d
    upsample_trilinear3d var_mean weight_norm_interface zeros
"""


class Participant(Protocol):
    """What a participant holds; a task's variants are."""

    @property
    def capacity(self) -> float:
        """Share of the channels of each axis."""

    @property
    def holding(self) -> Holding | None:
        """Its modules; None: all."""

    @property
    def layout(self) -> Layout:
        """Of its sub-model."""

    @property
    def algorithm(self) -> Algorithm:
        """As such participants run it."""

    @property
    def uplink(self) -> Mapping[str, Codec]:
        """Codecs by payload, of those that the run compresses."""

    @property
    def num_sent(self) -> int:
        """Number of parameters that are sent."""

    @property
    def num_received(self) -> int:
        """Number of parameters that are received."""

    @property
    def downlink(self) -> Codec | None:
        """Codec of what is received; None: it is not compressed."""


def count_variants(
    workload: Workload,
    algorithm: Algorithm,
    variants: Sequence[Participant],
    *,
    batch_size: int,
    scaler: bool,
    bytes_per_number: int = BYTES_PER_FLOAT,
) -> list[VariantCosts]:
    """Count what a participant of each variant costs, by training one batch of the largest client.

    What a peer sends and receives is one message, to or from one neighbour.

    Args:
        scaler: whether a sub-model's activations are multiplied by 1 / capacity while training.
        bytes_per_number: bytes of a parameter.
    """
    constant_bytes = sum(value.nbytes for value in workload.blueprint().constants.values())
    scales = [1.0 / variant.capacity if scaler else 1.0 for variant in variants]
    every: dict[Holding | None, dict[float, StepCosts]] = {}
    for variant, scale in zip(variants, scales, strict=True):
        counted = count_step(workload, variant.layout, batch_size, scale, variant.algorithm, variant.holding)
        every.setdefault(variant.holding, {})[variant.capacity] = counted
    found = []
    for variant in variants:
        capacity, layout, down, steps = variant.capacity, variant.layout, variant.downlink, every[variant.holding]
        size = variant.num_received * bytes_per_number
        sent = sent_bytes(algorithm, variant.num_sent, bytes_per_number, variant.uplink)
        received = size if down is None else down.row_bytes(variant.num_received, bytes_per_number)
        passes = algorithm.mean_passes(list(steps), capacity)
        # At worst a step goes through the whole sub-model and then, if it makes two passes, through the next smaller.
        widest = sorted(passes, reverse=True)[: 1 if sum(passes.values()) < 1.5 else 2]
        found.append(
            VariantCosts(
                capacity=capacity,
                num_parameters=layout.num_parameters,
                bytes_up=sent,
                bytes_down=received * len(algorithm.traits.downlink) if algorithm.traits.downlink is not None else sent,
                flops_per_sample=sum(steps[width].flops_per_sample * times for width, times in passes.items()),
                memory_bytes=constant_bytes
                + memory_bytes(
                    algorithm, workload.layout, layout, sum(steps[w].saved_bytes for w in widest), bytes_per_number
                ),
                uncounted=tuple(sorted({name for width in passes for name in steps[width].uncounted})),
                holding=None if variant.holding is None else variant.holding.name,
                flops_per_round=flops_of_representing(algorithm, layout),
            )
        )
    return found


def flops_of_representing(algorithm: Algorithm, layout: Layout) -> float:
    """Return the FLOPs of what follows the local steps of a participant of a layout, by doing it."""
    if not algorithm.traits.represents:
        return 0.0
    counter, row, every = FlopCounter(), torch.ones(layout.d), zip(layout.names, layout.shapes, strict=True)
    steppers = {name: (algorithm.of_parameter(name, shape), 1.0) for name, shape in every}
    params, before = layout.views(row), layout.views(row.clone())
    with one_thread(), counter:
        algorithm.represent(params, before, steppers, 0.0, lambda _: np.random.default_rng(0))
    return counter.total


def sent_bytes(
    algorithm: Algorithm,
    num_parameters: int,
    bytes_per_number: int = BYTES_PER_FLOAT,
    uplink: Mapping[str, Codec] | None = None,
) -> int:
    """Return the bytes of all payloads of a participant; of a joint mixing's two only one is sent in a round.

    Args:
        uplink: codecs of payloads that the run compresses, besides those of the algorithm.
    """
    traits = algorithm.traits
    codecs = {**traits.codecs, **(uplink or {})}
    sizes = [
        bytes_per_number
        if name in traits.scalars
        else codecs[name].row_bytes(num_parameters, bytes_per_number)
        if name in codecs
        else num_parameters * bytes_per_number
        for name in traits.uplink
    ]
    return max(sizes) if traits.joint else sum(sizes)


def carried(algorithm: Algorithm, layout: Layout, dtype: torch.dtype = torch.float32) -> Arrays:
    """Return what local steps of one participant work on: a model of zeros, and whatever else `begin` makes."""
    x = torch.zeros(1, layout.d, dtype=dtype)
    state, downlink = algorithm.init(x), algorithm.traits.downlink
    received: Arrays = {name: state[name] for name in (state if downlink is None else downlink)}
    return algorithm.begin(received, algorithm.init_client(x))


def memory_bytes(
    algorithm: Algorithm, whole: Layout, layout: Layout, saved_bytes: int, bytes_per_number: int = BYTES_PER_FLOAT
) -> int:
    """Return the most memory that a participant needs at a time.

    Training needs gradients, what local steps work on, and what is saved for the backward pass. A peer besides stores
    its state of the whole model, whatever it trains, since neighbours send it the rest; whole models are trained where
    they are stored. It adds up what it receives, payloads of the whole model, when training is over.

    Args:
        whole: layout of the whole model.
        layout: layout of the sub-model that is trained.
        saved_bytes: bytes that are saved for the backward pass.
        bytes_per_number: bytes of a parameter.
    """

    def size(rows: Iterable[Tensor], of: Layout) -> int:
        """Return the bytes of rows, without padding."""
        return bytes_per_number * sum(of.num_parameters if row.shape[-1] == of.d else row.numel() for row in rows)

    carry, traits = carried(algorithm, layout), algorithm.traits
    training = bytes_per_number * layout.num_parameters + saved_bytes
    if traits.downlink is not None:
        return training + size(carry.values(), layout)
    state = algorithm.init(torch.zeros(1, whole.d))
    in_place = state if layout.num_parameters == whole.num_parameters else {}
    training += size((row for name, row in carry.items() if name not in in_place), layout)
    received = [bytes_per_number * (1 if name in traits.scalars else whole.num_parameters) for name in traits.uplink]
    return size(state.values(), whole) + max(training, max(received) if traits.joint else sum(received))


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and convolutions, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` does the same, but loads torch's compiler, which takes a second.

    Attributes:
        total: FLOPs so far.
        uncounted: names of the operations without a formula that may be more than elementwise, see `is_cheap`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0
        self.uncounted: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing here is compiled, so that the compiler is not loaded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        elif func._overloadpacket in VECTOR_PRODUCTS:  # of a matrix or a vector by a vector
            self.total += 2 * max(value.numel() for value in args if isinstance(value, Tensor))
        elif not is_cheap(func):
            self.uncounted.add(func._schema.name)
        return result


def is_cheap(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation is elementwise, a reduction, or moves data, so that nobody counts its FLOPs."""
    if torch.Tag.pointwise in operation.tags or operation.is_view:
        return True
    space, _, name = operation._schema.name.partition("::")
    return space == "aten" and _base(name) in _cheap_names()


@cache
def _cheap_names() -> frozenset[str]:
    return frozenset({*map(_base, RULES), *_CHEAP.split()} - {"mkldnn_rnn_layer"})


def _base(name: str) -> str:
    """Return the name that an operation shares with its backward pass and its variant in place."""
    return re.sub(r"_(backward(_data)?|forward)$", "", name.strip("_"))


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Have recurrent layers and attention run as the matrix products that they consist of."""
    unfused = torch.backends.mkldnn.flags(enabled=False)  # warns of what other machines have
    with warnings.catch_warnings(action="ignore"), unfused, sdpa_kernel(SDPBackend.MATH):
        yield


class StepCosts(NamedTuple):
    """What one batch costs.

    Attributes:
        flops_per_sample: FLOPs of matrix products and convolutions, forward and backward.
        saved_bytes: bytes saved for the backward pass.
        uncounted: names of the operations whose FLOPs are not known and left out.
    """

    flops_per_sample: float
    saved_bytes: int
    uncounted: tuple[str, ...] = ()


class SavedBytes:
    """Counts the memory that autograd keeps for the backward pass: every storage once, those of `carried` left out."""

    def __init__(self, carried: Iterable[Tensor]) -> None:
        self._sizes = {row.untyped_storage().data_ptr(): 0 for row in carried}
        self._alive: list[Tensor] = []  # so that no address is used twice

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._sizes.values())

    def watching(self) -> AbstractContextManager[Any]:
        """Return a context in which what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)

    def _pack(self, saved: Tensor) -> Tensor:
        self._alive.append(saved.detach())
        storage = saved.untyped_storage()
        self._sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return saved


def _largest_client(workload: Workload, holding: Holding | None) -> NDArray[np.int64]:
    """Return the client, int64 [1], with the most samples, of those with these modules if there are any."""
    sizes = workload.num_samples
    if holding is not None:
        held = workload.client_holdings(np.arange(len(sizes), dtype=np.int64)) == workload.holdings.index(holding)
        sizes = np.where(held, sizes, 0) if held.any() else sizes
    return np.array([int(np.argmax(sizes))], dtype=np.int64)


def count_step(
    workload: Workload,
    layout: Layout,
    batch_size: int,
    scale: float = 1.0,
    algorithm: Algorithm | None = None,
    holding: Holding | None = None,
) -> StepCosts:
    """Count what one local step costs, by doing one of the largest client, or of the largest of those who hold it.

    Args:
        layout: layout of the (sub-)model that is trained.
        scale: factor of hidden activations, see `Workload.loss`.
        algorithm: algorithm of participants of this capacity; None: the loss is given the parameters themselves.
        holding: modules that are held; None: any.
    """
    client = _largest_client(workload, holding)
    count = int(min(batch_size, workload.num_samples[client[0]]))
    batch = workload.batch(client, np.arange(count, dtype=np.int64)[None])
    merged = {key: value[0] for key, value in (batch.samples | batch.client).items() if key != "mask"}
    if workload.traits.uses_key:
        merged["key"] = torch.zeros((), dtype=torch.int64)
    dtype = workload.init(0).dtype
    own = {"x": torch.zeros(1, layout.d, dtype=dtype)}
    carry = own if algorithm is None else carried(algorithm, layout, dtype)
    views = carry_views(layout, carry)
    carries = {leaf: {name: view[0] for name, view in own.items()} for leaf, own in views.items()}
    leaves = {leaf: own["x"].requires_grad_() for leaf, own in carries.items()}

    def step(counter: FlopCounter, saved: AbstractContextManager[Any]) -> None:
        """Do the step."""
        with one_thread(), counter:
            with saved:
                given = leaves if algorithm is None else given_to_loss(algorithm, leaves, carries)
                loss = workload.loss(given, merged | {"scale": scale})
            torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

    counter, saved = FlopCounter(), SavedBytes([*carry.values(), *workload.blueprint().constants.values()])
    step(counter, saved.watching())
    if counter.uncounted:
        counter = FlopCounter()
        with without_fused_kernels():
            step(counter, nullcontext())
    return StepCosts(float(counter.total) / count, saved.total, tuple(sorted(counter.uncounted)))
