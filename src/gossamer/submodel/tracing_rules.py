"""What one tensor operation says about axes: the rules by which `tracing` follows dimensions through a computation.

An operation may tie factors of dimensions (their channels correspond), split them, or pin them, see `factors`. A rule
may pin too much, but must not tie too little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.submodel.factors import Dims, Factors, broadcast, fresh, leaves, pin, regroup, tie


@dataclass(frozen=True)
class Call:
    """One operation that was run.

    Attributes:
        name: its name without overload, such as ``"add"``, in place or not.
        args: its arguments by name, defaults included.
        shapes: shapes of the tensors that it returned.
        dims_of: returns the dimensions of a tensor argument.
        once_used: receives dimensions that are to be pinned once a result is used.
    """

    name: str
    args: dict[str, Any]
    shapes: list[tuple[int, ...]]
    dims_of: Callable[[Tensor], Dims]
    once_used: list[Factors] = field(default_factory=list)

    def dims(self, *names: str) -> Dims:
        """Return the dimensions of the first tensor argument that bears one of these names, () if there is none."""
        for name in names:
            if isinstance(self.args.get(name), Tensor):
                return self.dims_of(self.args[name])
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return self.shapes[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensor arguments, those in lists included."""
        return [value for value in _flat(self.args.values()) if isinstance(value, Tensor)]


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list | tuple) else [value]


Rule = Callable[[Call], list[Dims]]  # dimensions of the results; those that it leaves out are constants


# ---- elementwise, and along a dimension


def _elementwise(call: Call) -> list[Dims]:
    dims = broadcast(map(call.dims_of, call.tensors), len(call.shape))
    return [dims] * len(call.shapes)


def _asked(call: Call, num_dims: int) -> list[int]:
    """Return the dimensions that the arguments name, as numbers from 0; none named means all."""
    asked = next((call.args[name] for name in ("dim", "dims") if call.args.get(name) is not None), None)
    if asked is None or asked == []:
        return list(range(num_dims))
    return [one % num_dims for one in ([asked] if isinstance(asked, int) else asked)]


def _along(call: Call) -> list[Dims]:
    """Mix the entries of some dimensions, as a softmax or a cumulative sum does."""
    dims = call.dims("self")
    pin(*(dims[one] for one in _asked(call, len(dims))))
    return [dims] * len(call.shapes)


def _reduced(call: Call) -> list[Dims]:
    """Reduce some dimensions; attention layers average over heads whether anyone asks or not."""
    dims = call.dims("self")
    asked = set(_asked(call, len(dims)))
    call.once_used.extend(dims[one] for one in asked)
    if call.args.get("keepdim"):
        kept: Dims = tuple([] if one in asked else factors for one, factors in enumerate(dims))
    else:
        kept = tuple(factors for one, factors in enumerate(dims) if one not in asked)
    return [kept] * len(call.shapes)


def _triangle(call: Call) -> list[Dims]:
    dims = call.dims("self")
    pin(*dims[-2:])
    return [dims]


# ---- shapes


def _reshaped(call: Call) -> list[Dims]:
    return [regroup([factor for factors in call.dims("self") for factor in factors], call.shape)]


def _transposed(call: Call) -> list[Dims]:
    dims, args = call.dims("self"), call.args
    order = list(range(len(dims)))
    if call.name == "permute":
        order = [one % len(dims) for one in args["dims"]]
    elif call.name == "transpose":
        first, second = args["dim0"], args["dim1"]
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return [tuple(dims[one] for one in order)]


def _expanded(call: Call) -> list[Dims]:
    dims = call.dims("self")
    lead = len(call.shape) - len(dims)
    new = fresh(call.shape, pinned=False)  # equal copies, of which there may be fewer
    return [tuple(dims[i - lead] if i >= lead and dims[i - lead] else new[i] for i in range(len(call.shape)))]


def _repeated(call: Call) -> list[Dims]:
    repeats = fresh(call.args["repeats"], pinned=True)
    dims = call.dims("self")
    padded: Dims = ((),) * (len(repeats) - len(dims)) + dims
    return [tuple([*times, *factors] for times, factors in zip(repeats, padded, strict=True))]


def _with(dims: Dims, position: int, *replacement: Factors) -> Dims:
    """Return `dims` with one of them replaced by others, or by none."""
    return (*dims[:position], *replacement, *dims[position + 1 :])


def _blocks(factors: Factors, num_blocks: int, length: int) -> Factors:
    """Read a dimension as so many equal blocks, which stay apart, and return what is inside every one."""
    outer, inner = regroup(factors, (num_blocks, length))
    pin(outer)
    return inner


def _split(call: Call) -> list[Dims]:
    dims = call.dims("self")
    position = call.args["dim"] % len(dims)
    lengths = [shape[position] for shape in call.shapes]
    if len(set(lengths)) == 1:
        return [_with(dims, position, _blocks(dims[position], len(lengths), lengths[0]))] * len(lengths)
    pin(dims[position])
    return [_with(dims, position, *fresh([length], pinned=True)) for length in lengths]


def _halved(call: Call) -> list[Dims]:
    dims = call.dims("self")
    position = call.args["dim"] % len(dims)
    return [_with(dims, position, _blocks(dims[position], 2, call.shape[position]))]


def _sliced(call: Call) -> list[Dims]:
    """A slice that is one of several equal blocks, as of a fused projection, keeps its inside; others are pinned."""
    dims = call.dims("self")
    position = call.args["dim"] % len(dims)
    size, length = call.args["self"].shape[position], call.shape[position]
    if length == size:
        return [dims]
    start = (call.args["start"] or 0) % max(size, 1)
    if length and call.args["step"] == 1 and size % length == 0 and start % length == 0:
        return [_with(dims, position, _blocks(dims[position], size // length, length))]
    pin(dims[position])
    return [_with(dims, position, *fresh([length], pinned=True))]


def _selected(call: Call) -> list[Dims]:
    dims = call.dims("self")
    position = call.args["dim"] % len(dims)
    pin(dims[position])
    return [_with(dims, position)] * len(call.shapes)


def _index_selected(call: Call) -> list[Dims]:
    dims = call.dims("self")
    position = call.args["dim"] % len(dims)
    pin(dims[position])
    return [_with(dims, position, *fresh([call.shape[position]], pinned=True))]


def _indexed(call: Call) -> list[Dims]:
    """Index some neighbouring dimensions by integers; other ways of indexing pin everything."""
    dims, indices = call.dims("self"), call.args["indices"]
    where = [position for position, index in enumerate(indices) if index is not None]
    first, last = where[0], where[-1] + 1
    if last - first != len(where) or any(indices[one].dtype == torch.bool for one in where):
        return everything_pinned(call)
    pin(*dims[first:last])
    picked = fresh(call.shape[first : len(call.shape) - (len(dims) - last)], pinned=True)
    return [(*dims[:first], *picked, *dims[last:])]


def everything_pinned(call: Call) -> list[Dims]:
    """Cut nothing that goes in: always sound."""
    for tensor in call.tensors:
        pin(*call.dims_of(tensor))
    return []


def _joined(call: Call) -> list[Dims]:
    """Join tensors: equal lengths become equal blocks with tied insides; unequal ones are pinned."""
    tensors = call.args["tensors"]
    all_dims = [call.dims_of(tensor) for tensor in tensors]
    if call.name == "stack":
        position = call.args["dim"] % len(call.shape)
        joined = broadcast(all_dims, len(call.shape) - 1)
        return [(*joined[:position], *fresh([len(tensors)], pinned=True), *joined[position:])]
    position = call.args["dim"] % len(call.shape)
    others = broadcast((_with(dims, position, []) for dims in all_dims), len(call.shape))
    if len({tensor.shape[position] for tensor in tensors}) == 1:
        (inside,) = broadcast(((dims[position],) for dims in all_dims), 1)
        return [_with(others, position, [*fresh([len(tensors)], pinned=True)[0], *inside])]
    pin(*(dims[position] for dims in all_dims))
    return [_with(others, position, *fresh([call.shape[position]], pinned=True))]


# ---- sums over channels


def sum_over(one: Factors, other: Factors) -> None:
    """Tie two dimensions over whose products an operation sums."""
    tie(one, other)
    for leaf in leaves(one):
        leaf.summed = True


def _product(call: Call) -> list[Dims]:
    """Matrix products [*, n, k] x [*, k, m] or x [k], with or without an addend."""
    if "mat1" in call.args or "batch1" in call.args or "mat" in call.args:
        left, right, addend = call.dims("mat1", "batch1", "mat"), call.dims("mat2", "batch2", "vec"), call.dims("self")
    else:
        left, right, addend = call.dims("self"), call.dims("mat2", "vec", "tensor"), ()
    sum_over(left[-1], right[-2] if len(right) > 1 else right[-1])
    if len(left) == 3:
        tie(left[0], right[0])
    result = (*left[:-1], *(right[-1:] if len(right) > 1 else ()))
    return [broadcast((result, addend), len(result))]


def _convolved(call: Call) -> list[Dims]:
    x, weight, bias, groups = call.dims("input"), call.dims("weight"), call.dims("bias"), call.args["groups"]
    pin(*x[2:], *weight[2:])
    before, after = (weight[0], weight[1]) if call.args["transposed"] else (weight[1], weight[0])
    if groups == 1:
        sum_over(x[1], before)
    elif call.args["transposed"]:
        pin(x[1], before, after)
        after = fresh([call.shape[1]], pinned=True)[0]
    elif not before:  # depthwise: every input channel has output channels of its own
        own = fresh([call.shape[1] // groups], pinned=True)[0]
        tie(after, [*x[1], *own])
    else:
        num_groups, inside = regroup(x[1], (groups, math.prod(leaf.size for leaf in leaves(before))))
        outside, _ = regroup(after, (groups, call.shape[1] // groups))
        pin(num_groups, outside)
        sum_over(inside, before)
    if bias:
        tie(after, bias[0])
    return [(x[0], after, *fresh(call.shape[2:], pinned=True))]


def _embedded(call: Call) -> list[Dims]:
    rows, channels = call.dims("weight")
    pin(rows)
    return [(*call.dims("indices"), channels)]


# ---- normalisation and pooling


def _batch_normed(call: Call) -> list[Dims]:
    x = call.dims("input")
    moments = () if call.args.get("training", True) else ("running_mean",)  # constants, if they are used
    for name in ("weight", "bias", *moments):
        if call.dims(name):
            tie(x[1], call.dims(name)[0])
    return [x]


def _layer_normed(call: Call) -> list[Dims]:
    """Weights sit on what is normalised, so it may be cut: the moments are then the sub-model's own."""
    x, lengths = call.dims("input"), call.args["normalized_shape"]
    if not call.dims("weight"):
        pin(*x[-len(lengths) :])
    return [broadcast((x, call.dims("weight"), call.dims("bias")), len(x))]


def _group_normed(call: Call) -> list[Dims]:
    x, groups = call.dims("input"), call.args["group"]
    _blocks(x[1], groups, call.shape[1] // groups)
    for name in ("weight", "bias"):
        if call.dims(name):
            tie(x[1], call.dims(name)[0])
        else:
            pin(x[1])
    return [x]


def _spatial(call: Call) -> list[Dims]:
    """Pool, resize or pad the last dimensions; how many these are stands in the name, as in ``avg_pool2d``."""
    dims, pad = call.dims("self", "input"), call.args.get("pad")
    found = re.search(r"([123])d", call.name)
    num_spatial = len(pad) // 2 if call.name == "constant_pad_nd" and pad else int(found[1]) if found else 0
    pin(*dims[len(dims) - num_spatial :])
    kept = dims[: len(dims) - num_spatial]
    return [(*kept, *fresh(shape[len(kept) :], pinned=True)) for shape in call.shapes]


_GROUPS: list[tuple[Rule, str]] = [
    (_elementwise, "masked_fill copy where hardswish gelu _prelu_kernel log_sigmoid_forward"),
    (_elementwise, "detach alias lift_fresh _to_copy fill zero bernoulli uniform normal native_dropout"),
    (_elementwise, "zeros_like ones_like empty_like full_like rand_like randn_like"),
    (_along, "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp sort flip roll"),
    (_reduced, "sum mean var std prod amax amin max min argmax argmin any all norm linalg_vector_norm logsumexp"),
    (_triangle, "triu tril"),
    (_reshaped, "view _unsafe_view reshape _reshape_alias unsqueeze squeeze"),
    (_transposed, "t transpose permute"),
    (_expanded, "expand"),
    (_repeated, "repeat"),
    (_split, "split unsafe_split split_with_sizes unsafe_split_with_sizes"),
    (_halved, "glu"),
    (_sliced, "slice"),
    (_selected, "select unbind"),
    (_index_selected, "index_select"),
    (_indexed, "index"),
    (everything_pinned, "gather mkldnn_rnn_layer"),
    (_joined, "cat stack"),
    (_product, "mm bmm addmm baddbmm mv addmv dot"),
    (_convolved, "convolution"),
    (_embedded, "embedding"),
    (_batch_normed, "native_batch_norm _native_batch_norm_legit _batch_norm_with_update"),
    (_layer_normed, "native_layer_norm"),
    (_group_normed, "native_group_norm"),
    (_spatial, "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices constant_pad_nd"),
    (_spatial, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"),
    (_spatial, "upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"),
    (_spatial, "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
]
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}


def rule_for(operation: torch._ops.OpOverload, name: str) -> Rule | None:
    """Return the rule of an ATen operation; PyTorch itself marks those that work elementwise."""
    if torch.Tag.pointwise in operation.tags:
        return _elementwise
    return RULES.get(name)
