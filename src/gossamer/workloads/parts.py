"""Models of which parts are trained: parameters that stay constant, and low-rank factors beside them (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options
from gossamer.submodel.layout import AxisSpec, as_dim
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, Model, WithConstants
from gossamer.workloads.mending import Mending
from gossamer.workloads.modules import CLOSE, ModuleModel

RANK_AXIS = "lora-rank"  # the axis of all factors, which a capacity below 1 cuts
A, B = ".lora_A", ".lora_B"
MOST_NAMED = 12  # names that an error lists
Axis = tuple[AxisSpec, ...]
T = TypeVar("T")


class LoRAOptions(Options):
    """Options of low-rank factors.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: what stands beside a weight is ``(alpha / rank) B A``, whatever share of the rank a participant holds.
        targets: patterns of layers, such as ``"*.q_proj"``, or of their weights.
        train: patterns of the parameters that are trained besides, such as ``"head.*"``.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(min_length=1)
    train: tuple[str, ...] = ()


class PartlyTrained(WithConstants):
    """A model of which only some parameters are trained; the others are constants, see `ModuleModel`.

    With LoRA (Hu et al., arXiv 2106.09685) every targeted weight W [o, i] is a constant, and two factors are trained
    beside it: A [rank, i], drawn uniformly from ±1/sqrt(i), and B [o, rank], which starts at 0. The forward pass adds
    ``(alpha / rank) (x A^T) B^T`` to ``x W^T``, and never makes a matrix of W's size. Targets are the weights of linear
    layers, embeddings and `torch.nn.MultiheadAttention`. The factors are parameters of the name of the layer, followed
    by ``.lora_A`` and ``.lora_B``; their rank is an axis, the only one, so a capacity of 0.5 is half the rank, and a
    static window its first rows of A and columns of B. `whole` returns the model's own parameters, factors merged.

    Label rows of what is trained besides are known to a module only where it can be traced.

    Attributes:
        traits, shapes, axes, norms: see `gossamer.workloads.base.Model`.
        targets: names of the weights that have factors.
    """

    def __init__(
        self,
        model: Model,
        frozen: Sequence[str],
        lora: LoRAOptions | None,
        source: Callable[[], np.random.Generator],
        start: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Divide a model.

        Args:
            model: the model; a `ModuleModel` is changed.
            frozen: patterns of parameters that are not trained; none with `lora`.
            lora: low-rank factors.
            source: callback that returns the generator from which the model's parameters are drawn.
            start: parameters that start so instead; of no `ModuleModel`.

        Raises:
            ConfigError: a pattern matches nothing, nothing is left to train, or a target can have no factors.
        """
        self._model, self._lora, self.norms, self._start = model, lora, model.norms, start
        known = dict(model.shapes)
        if isinstance(model, ModuleModel):
            known |= {name: tuple(value.shape) for name, value in model.frozen.items()}
        self.buffers = model.buffers if isinstance(model, WithConstants) else ()
        known = {name: shape for name, shape in known.items() if name not in self.buffers}  # patterns do not mean these
        if self.buffers and lora is not None:
            raise ConfigError("workload.buffers does not go with workload.lora, whose layers stay: leave one out")
        self.targets = () if lora is None else _targets(lora, known)
        kept = _trained(frozen, lora, model.shapes, known)
        if kept.keys() <= set(self.buffers) and lora is None:
            raise ConfigError(f"workload.frozen = {list(frozen)} leaves nothing to train: name fewer parameters")
        drawn = model.init(source()) | dict(start)
        constant = [name for name in model.shapes if name not in kept]
        trained = {name: shape for name, shape in model.shapes.items() if name in kept}
        self._own: dict[str, Tensor] = {}
        if isinstance(model, ModuleModel):
            model.keep_constant(constant)
        else:
            self._own = {name: drawn[name] for name in constant}
        self.shapes = trained | self._factor_shapes(known)
        self.traits = replace(model.traits, stacks_natively=False)
        self._pinned = {axis for name in self._own for axis in _cut_axes(model.axes[name])}
        if lora is not None:
            self._check_factors(source())

    def _factor_shapes(self, known: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.targets:
            assert self._lora is not None
            rows, columns = known[name]
            shapes[layer_of(name) + A] = self._lora.rank, columns
            shapes[layer_of(name) + B] = rows, self._lora.rank
        return shapes

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes of what is trained; no dimension that a constant touches is cut.

        Raises:
            ConfigError: the model is a module that cannot be cut.
        """
        if self._lora is None:
            return {name: _without(self._model.axes[name], self._pinned) for name in self.shapes}
        try:
            found = self._model.axes if any(name in self._model.shapes for name in self.shapes) else {}
        except ConfigError:  # then labels are unknown, and nothing else of these axes is asked for
            found = {}
        return self.whole_axes | {
            name: tuple(spec if as_dim(spec).is_label or as_dim(spec).is_kernel else None for spec in found[name])
            for name in self.shapes
            if name in found
        }

    @property
    def whole_axes(self) -> dict[str, Axis]:
        """Axes where nobody asks for more than the rank, for which a module is not traced."""
        if self._lora is None and not isinstance(self._model, ModuleModel):
            return self.axes
        of_factors = {A: (RANK_AXIS, None), B: (None, RANK_AXIS)}
        own = self._model.whole_axes if isinstance(self._model, ModuleModel) else {}
        return {
            name: of_factors.get(name[-len(A) :], own.get(name, (None,) * len(shape)))
            for name, shape in self.shapes.items()
        }

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return what is trained, drawn as the model draws it; B is 0."""
        params, drawn = dict[str, Tensor](), self._model.init(source) | dict(self._start)
        for name, shape in self.shapes.items():
            if name in drawn:
                params[name] = drawn[name]
            elif name.endswith(A):
                uniform = torch.from_numpy(source.random(shape, dtype=np.float32))
                params[name] = uniform.mul_(2).sub_(1).mul_(1 / math.sqrt(shape[1]))
            else:
                params[name] = torch.zeros(shape)
        return params

    @property
    def constants(self) -> dict[str, Tensor]:
        """What is not trained: parameters, and buffers."""
        return (self._model.constants if isinstance(self._model, WithConstants) else {}) | self._own

    def convert(self, dtype: torch.dtype) -> None:
        """Have constants in another type, see `WithConstants`."""
        self._own = {name: value.to(dtype) for name, value in self._own.items()}
        if isinstance(self._model, WithConstants):
            self._model.convert(dtype)

    def whole(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all of the model's own parameters, under its own names, with W + (alpha / rank) B A in W's place."""
        own = self._own | {name: value for name, value in params.items() if not name.endswith((A, B))}
        if isinstance(self._model, WithConstants):
            own = self._model.whole(own)
        else:
            own = {name: own[name] for name in self._model.shapes}
        return own | {name: own[name] + b @ a for name, (a, b) in self._factors(params).items()}

    @property
    def divided(self) -> Model:
        """The model of which parts are trained, whose parameters `whole` returns."""
        return self._model

    @property
    def merging(self) -> dict[str, tuple[str, str, float]]:
        """Names of A and B, and the factor of their product, of each target, for those who merge them elsewhere."""
        if self._lora is None:
            return {}
        scale = self._lora.alpha / self._lora.rank
        return {name: (layer_of(name) + A, layer_of(name) + B, scale) for name in self.targets}

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return the model's logits, see `gossamer.workloads.base.Model`.

        Raises:
            ConfigError: the scaler is on, but some of what it would scale is a constant of full width.
        """
        return self._called(params, x.device, context, lambda own, context: self._model.apply(own, x, context))

    def _called(
        self,
        params: Mapping[str, Tensor],
        device: torch.device,
        context: ForwardContext,
        call: Callable[[dict[str, Tensor], ForwardContext], T],
    ) -> T:
        """Return what a forward pass of the model makes of its own parameters, with low-rank factors beside them."""
        if self._lora is not None:  # nothing but the rank is cut, whose products are of the same size at any rank
            context = replace(context, scale=1.0, factors=self._factors(params))
        elif self._pinned and context.is_scaled:
            raise ConfigError(
                "the scaler multiplies all hidden layers, but frozen parameters keep some of them whole: set"
                " submodel.scaler to false, or freeze none of them"
            )
        own = {name: value for name, value in params.items() if not name.endswith((A, B))}
        if isinstance(self._model, ModuleModel):
            return call(own, context)
        own |= {name: value.to(device) for name, value in self._own.items()}
        if self._lora is None:
            return call(own, context)
        with Mending(own, {}, ForwardContext(factors=context.factors)):
            return call(own, context)

    def _factors(self, params: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and the scaled B of every targeted weight."""
        if self._lora is None:
            return {}
        scale = self._lora.alpha / self._lora.rank
        layers = {name: layer_of(name) for name in self.targets if layer_of(name) + A in params}
        return {name: (params[layer + A], scale * params[layer + B]) for name, layer in layers.items()}

    def _check_factors(self, source: np.random.Generator) -> None:
        """Check that the forward pass of a module uses every targeted weight where factors can stand beside it."""
        if not isinstance(self._model, ModuleModel):
            if not self._model.traits.adaptable:
                raise ConfigError(
                    "workload.lora needs a model whose linear layers call F.linear: a module of your own or the"
                    f" transformer, mlp or cnn, not {type(self._model).__name__}"
                )
            return
        start, module = self.init(source), self._model
        ones = {name: torch.full_like(value, 0.1) for name, value in start.items() if name.endswith(B)}
        for name in self.targets:
            key = layer_of(name) + B
            params = start | {key: ones[key]}
            found, expected = module.try_out(params, self.apply), module.try_out(self.whole(params), module.apply)
            if (found - expected).norm() > CLOSE * expected.norm():
                raise ConfigError(
                    f"workload.lora: {name!r} is used otherwise than as the weight of a linear layer, an embedding or"
                    " nn.MultiheadAttention, so no factors can stand beside it: leave it out of targets"
                )


def layer_of(weight: str) -> str:
    """Return the name of a weight's layer; a weight of another name, such as ``in_proj_weight``, stands for itself."""
    return weight.removesuffix(".weight")


def matching(option: str, patterns: Iterable[str], names: Iterable[str], what: str = "parameter") -> set[str]:
    """Return the names that patterns of `fnmatch` match; `what` errors call them.

    Raises:
        ConfigError: a pattern matches none.
    """
    known, found = list(names), set[str]()
    for pattern in patterns:
        those = {name for name in known if fnmatchcase(name, pattern)}
        if not those:
            raise ConfigError(f"{option}: {pattern!r} matches no {what}{_instead_of(pattern, known)}")
        found |= those
    return found


def _instead_of(pattern: str, known: Sequence[str]) -> str:
    """Return what a pattern that matches nothing may have meant: a module, if it begins with one that there is not."""
    module, dot, _ = pattern.partition(".")
    modules = sorted({name.partition(".")[0] for name in known})
    if dot and module not in modules and "*" not in module:
        return f"{nearest(module, modules)} (the model's modules: {', '.join(modules)})"
    some = ", ".join(sorted(known)[:MOST_NAMED]) + (", ..." if len(known) > MOST_NAMED else "")
    return f"{nearest(pattern, known, cutoff=0.3)} (the model has: {some})"


def _trained(
    frozen: Sequence[str], lora: LoRAOptions | None, own: Iterable[str], known: Iterable[str]
) -> dict[str, None]:
    """Return which of a model's `own` trained parameters stay so, in their order."""
    if lora is None:
        constant = matching("workload.frozen", frozen, known)
        return {name: None for name in own if name not in constant}
    if frozen:
        raise ConfigError(
            f"workload.frozen = {list(frozen)} says nothing beside workload.lora, which trains its factors alone, and"
            " what workload.lora.train names: leave it out"
        )
    train = matching("workload.lora.train", lora.train, own)
    return {name: None for name in own if name in train}


def _targets(lora: LoRAOptions, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the weights that targets name.

    Raises:
        ConfigError: a target matches nothing, or has no matrix, or one that is smaller than the rank, or is trained.
    """
    layers = {name: layer_of(name) for name in shapes}
    found = set[str]()
    for pattern in lora.targets:
        matched = matching("workload.lora.targets", [pattern], {*layers, *layers.values()})
        of_layer = {name for name, layer in layers.items() if name in matched or layer in matched}
        matrices = {name for name in of_layer if len(shapes[name]) == 2}
        if not matrices:
            raise ConfigError(
                f"workload.lora.targets: {pattern!r} matches {sorted(of_layer)[0]!r} of shape"
                f" {shapes[sorted(of_layer)[0]]}, which is no matrix: name linear layers"
            )
        found |= matrices
    for name in sorted(found):
        if lora.rank > min(shapes[name]):
            raise ConfigError(
                f"workload.lora.rank = {lora.rank} is above the smaller side of {name!r} {shapes[name]}: give"
                f" {min(shapes[name])} at most, or leave it out of targets"
            )
    if both := sorted(found & matching("workload.lora.train", lora.train, shapes)):
        raise ConfigError(f"workload.lora names {both[0]!r} in train and in targets: leave it out of one")
    return tuple(name for name in shapes if name in found)


def _cut_axes(specs: Axis) -> set[str]:
    return {dim.axis for dim in map(as_dim, specs) if dim.axis is not None and dim.cuttable}


def _without(specs: Axis, pinned: set[str]) -> Axis:
    return tuple(None if as_dim(spec).axis in pinned else spec for spec in specs)
