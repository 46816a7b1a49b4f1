"""The axes of a plain `torch.nn.Module`, found by following dimensions through one forward pass.

The module runs once on example inputs. Every operation ties, splits or pins factors of dimensions as `tracing_rules`
says. In the end a dimension's factor that is nowhere pinned becomes its axis: it comes from parameters, goes into
parameters, and everything that must shrink with it does.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.errors import ConfigError, nearest
from gossamer.submodel.factors import Dims, Factor, Factors, fresh, leaves, pin
from gossamer.submodel.layout import LABEL_AXIS, AxisSpec, Dim
from gossamer.submodel.tracing_rules import Call, everything_pinned, rule_for

Attention = Literal["heads", "head-dim"]
Keep = Collection[str] | Callable[[str], bool]


def trace_axes(
    module: nn.Module,
    *inputs: Any,
    attention: Attention = "heads",
    keep: Keep = (),
    label_outputs: bool = True,
) -> dict[str, tuple[AxisSpec, ...]]:
    """Find the axes of all parameters of `module`, as a person would declare them.

    Dimensions that the computation ties share an axis: a producer's channels and its consumer's, the operands of a
    residual sum, a normalisation and what it normalises, tied weights. Never cut are inputs, outputs, kernels, places
    and time steps, the rows of an embedding, what a softmax, a mean or an index runs over, and parameters that require
    no gradient, which are constants. An axis bears the name of the layer that uses it first; where a reshape divides a
    layer's channels among heads, ``.heads`` or ``.head-dim`` is appended.

    The module is copied, put in training mode and run once; neither it nor the random state changes. Its path must not
    depend on values, since only the path that it takes here is seen.

    Args:
        module: the module, with parameters of its full width.
        inputs: example inputs; two samples suffice.
        attention: factor to cut where a reshape divides channels among heads (or other nested factors): ``"heads"``,
            whole heads (the outermost factor), or ``"head-dim"``, the channels in every head (the innermost).
        keep: names of axes that are not to be cut, or a function that says so of a name.
        label_outputs: whether the last dimension of the (first) output belongs to labels, see `LABEL_AXIS`.

    Returns:
        ``{parameter: (axis name | Dim | None, ...)}``, in the order of ``module.named_parameters()``.

    Raises:
        ConfigError: an operation whose effect on axes is not known, outputs that are not tensors, or an unknown name in
            `keep`.
        Exception: whatever the module raises on these inputs.
    """
    traced = copy.deepcopy(module).train()
    params = dict(traced.named_parameters())
    tracer = _Tracer(params)
    with tracer.following(traced):
        outputs = traced(*inputs)
    label = tracer.finish(outputs)
    dims = {name: tracer.dims_of(param) for name, param in params.items()}
    for name in params.keys() - tracer.used.keys():
        pin(*dims[name])
    nested = _choose(dims, attention)
    names = _named({name: dims[name] for name in tracer.used}, nested, attention)
    kept = _kept(list(names.values()), keep)
    if label is not None and label_outputs:
        names[label] = LABEL_AXIS
    for factor, name in list(names.items()):
        if name in kept:
            del names[factor]
    return {name: tuple(_spec(factors, names) for factors in dims[name]) for name in params}


class _Simplified(TorchFunctionMode):
    """Shows root-mean-square norms as layer norms, which they are to axes, and dropout as nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.rms_norm:
            return _as_layer_norm(*args, **(kwargs or {}))
        if func in _DROPOUT:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _as_layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows dimensions through the operations that run under it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to say so to torch._dynamo would import it: two seconds

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: dict[str, None] = {}  # parameters in the order of their first use
        self._names = {id(param): name for name, param in params.items()}
        # Tensors are kept with their dimensions, so that no other one gets the id of one that is gone.
        self._known = {id(one): (one, fresh(one.shape, pinned=not one.requires_grad)) for one in params.values()}
        self._once_used: dict[int, list[Factors]] = {}  # what the use of a tensor pins
        self._path: list[str] = []

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Follow `module`, with operations divided as finely as PyTorch can."""
        for name, child in module.named_modules():
            child.register_forward_pre_hook(lambda *_, name=name: self._path.append(name))
            child.register_forward_hook(lambda *_: self._leave(), always_call=True)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            stack.enter_context(_Simplified())
            stack.enter_context(self)
            yield

    def _leave(self) -> None:
        self._path.pop()

    def dims_of(self, tensor: Tensor) -> Dims:
        """Return the dimensions of a tensor; one that no operation made is a constant, which nothing may cut."""
        return self._known.setdefault(id(tensor), (tensor, fresh(tensor.shape, pinned=True)))[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and follow what it does."""
        result = func(*args, **(kwargs or {}))
        given = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
        given |= dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})
        results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        call = Call(name, given, [tuple(value.shape) for value in results], self.dims_of)
        for tensor in call.tensors:
            pin(*self._once_used.pop(id(tensor), []))
            if id(tensor) in self._names:
                self.used[self._names[id(tensor)]] = None
        for value, dims in zip(results, self._outcome(call, func), strict=False):
            if [math.prod(leaf.size for leaf in leaves(factors)) for factors in dims] != list(value.shape):
                raise self._refusal(func)  # a rule that does not follow what the operation did
            self._known[id(value)] = value, dims
            self._once_used[id(value)] = call.once_used
        return result

    def _outcome(self, call: Call, operation: torch._ops.OpOverload) -> list[Dims]:
        """Return the dimensions of the results that are not constants.

        Raises:
            ConfigError: there is no rule, and something that may be cut goes in.
        """
        rule = rule_for(operation, call.name)
        if rule is not None:
            return rule(call) if all(value.numel() for value in call.tensors) else everything_pinned(call)
        given = [leaf for tensor in call.tensors for factors in self.dims_of(tensor) for leaf in leaves(factors)]
        if not all(leaf.pinned for leaf in given):
            raise self._refusal(operation)
        return []

    def _refusal(self, operation: torch._ops.OpOverload) -> ConfigError:
        place = f"{self._path[-1]!r}" if self._path and self._path[-1] else "its forward"
        return ConfigError(
            f"the module uses the operation {str(operation)!r} in {place}, and what that does to axes is not known:"
            " replace it by simpler ones, or declare the axes by hand in a model of your own"
        )

    def finish(self, outputs: Any) -> Factor | None:
        """Pin what the module returns, and return the factor of its labels, if there is one.

        Raises:
            ConfigError: it returns something that holds no tensors that one can see.
        """
        found = tree_leaves(outputs)
        tensors = [value for value in found if isinstance(value, Tensor)]
        for value in found:
            if not isinstance(value, Tensor | int | float | None):
                raise ConfigError(
                    f"the module returns {type(value).__name__}: return tensors, in a tuple or dict if several"
                )
        for value in tensors:
            pin(*self.dims_of(value), *self._once_used.get(id(value), []))
        last = leaves(self.dims_of(tensors[0])[-1]) if tensors and tensors[0].dim() else []
        return last[0] if len(last) == 1 and not last[0].summed else None


def _choose(dims: Mapping[str, Dims], attention: Attention) -> set[Factor]:
    """Pin all but one of the free factors of every dimension; return those that were chosen among several."""
    several = [[leaf for leaf in leaves(factors) if not leaf.pinned] for every in dims.values() for factors in every]
    chosen: set[Factor] = set()
    for free in (free for free in several if len(free) > 1):
        left = [leaf for leaf in free if not leaf.pinned]  # an earlier dimension's choice holds here, too
        if left:
            one = left[0 if attention == "heads" else -1]
            for leaf in left:
                leaf.pinned = leaf is not one or left.count(one) > 1
            chosen.add(one)
    return chosen


def _named(dims: Mapping[str, Dims], nested: set[Factor], attention: Attention) -> dict[Factor, str]:
    """Name every free factor by the parameter that bears it first."""
    names: dict[Factor, str] = {}
    for param, all_factors in dims.items():
        for leaf in (leaf for factors in all_factors for leaf in leaves(factors)):
            if leaf.pinned or leaf in names:
                continue
            base = re.sub(r"[._](weight|bias)$", "", param) + (f".{attention}" if leaf in nested else "")
            taken, name, number = {*names.values(), LABEL_AXIS}, base, 1
            while name in taken:
                name, number = f"{base}.{number}", number + 1
            names[leaf] = name
    return names


def _kept(names: list[str], keep: Keep) -> set[str]:
    """Return the names of axes that are not to be cut.

    Raises:
        ConfigError: one of them is unknown.
    """
    if callable(keep):
        return {name for name in names if keep(name)}
    for name in keep:
        if name not in names:
            raise ConfigError(
                f"keep names the axis {name!r}, which the module does not have{nearest(name, names)}"
                f" (it has: {', '.join(names)})"
            )
    return set(keep)


def _spec(factors: Factors, names: Mapping[Factor, str]) -> AxisSpec:
    """Describe one dimension of a parameter."""
    parts = leaves(factors)
    for position, leaf in enumerate(parts):
        if leaf in names:
            outer = math.prod(part.size for part in parts[:position])
            inner = math.prod(part.size for part in parts[position + 1 :])
            if outer == inner == 1:
                return names[leaf]
            return None if names[leaf] == LABEL_AXIS else Dim(names[leaf], outer, inner)
    return None
