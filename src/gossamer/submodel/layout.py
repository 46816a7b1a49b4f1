"""How a model lies in one flat row: names, shapes, the axes that tie dimensions together, and views.

Every parameter starts on a 64-byte boundary, so kernels see operands aligned the same way in every row;
the few floats between parameters are always zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gossamer.errors import ConfigError, nearest
from gossamer.submodel.windows import Window, window_length

ALIGNMENT = 16  # floats: 64 bytes
LABEL_AXIS = "label"


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: `outer` x the axis's width x `inner`, in this order of nesting.

    A plain channel dimension has outer = inner = 1. A flattened [channel, 7, 7] input has inner = 49. The fused
    query-key-value projection of an attention layer has outer = 3. `axis` None marks a dimension that is never cut;
    the axis named ``"label"``, and those whose names begin with ``"label:"`` where a model tells several kinds of
    labels, are never cut either, but their entries belong to labels (see `aggregate.selective_mean`).

    `is_kernel` says that it is one of a convolution's kernel, such as `KERNEL`: by two of these, and not by its rank, a
    weight is known to be one that images are convolved with.
    """

    axis: str | None
    outer: int = 1
    inner: int = 1
    is_kernel: bool = False

    @property
    def cuttable(self) -> bool:
        """Whether a capacity below 1 shortens this dimension."""
        return self.axis is not None and not self.is_label

    @property
    def is_label(self) -> bool:
        """Whether its entries belong to labels."""
        return self.axis is not None and self.axis.partition(":")[0] == LABEL_AXIS


KERNEL = Dim(None, is_kernel=True)
AxisSpec = str | Dim | None
Axes = Mapping[str, tuple[AxisSpec, ...]]


def as_dim(spec: AxisSpec) -> Dim:
    """Read an axis given by its bare name (or None) as a `Dim`."""
    return spec if isinstance(spec, Dim) else Dim(spec)


def num_kernel_dims(specs: Iterable[AxisSpec]) -> int:
    """Return how many dimensions of a parameter are those of a convolution's kernel: 2 of such as are for images."""
    return sum(as_dim(spec).is_kernel for spec in specs)


def with_kernels(axes: Axes, names: Collection[str]) -> dict[str, tuple[AxisSpec, ...]]:
    """Return axes of which those of these weights [out, in, ...], with which inputs are convolved, have `KERNEL`."""
    return {
        name: (*specs[:2], *(KERNEL for _ in specs[2:])) if name in names else specs for name, specs in axes.items()
    }


def axis_widths(shapes: Mapping[str, tuple[int, ...]], axes: Axes) -> dict[str, int]:
    """Find the width of every named axis and check that all dimensions that name it agree.

    Raises:
        ConfigError: an axis has two widths, a parameter has no axes, or their number differs from its dimensions.
    """
    widths: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in axes:
            raise ConfigError(f"parameter {name!r} has no axes: give one axis name, Dim or None per dimension {shape}")
        if len(axes[name]) != len(shape):
            raise ConfigError(
                f"parameter {name!r} has shape {shape} but {len(axes[name])} axes: give one per dimension"
            )
        for size, spec in zip(shape, axes[name], strict=True):
            dim = as_dim(spec)
            if dim.axis is None:
                continue
            width, rest = divmod(size, dim.outer * dim.inner)
            if rest or widths.setdefault(dim.axis, width) != width:
                raise ConfigError(
                    f"axis {dim.axis!r} of parameter {name!r} has size {size}, which does not fit outer {dim.outer},"
                    f" inner {dim.inner} and the width {widths.get(dim.axis, width)} it has elsewhere"
                )
    return widths


@dataclass(frozen=True)
class Layout:
    """Names, shapes and axes of a model's parameters, in the order in which they lie in a flat row.

    Attributes:
        names: parameter names.
        shapes: their shapes.
        axes: per parameter one `Dim` per dimension.
        channels_last: whether convolution weights [out, in, height, width] lie in memory as [out, height, width, in].
        labels: ``((label axis, its first label), ...)`` of the whole model: labels of several axes are numbered one
            axis after another, in order of first appearance; None: those of this layout are.
        d: length of a flat row in floats, padding included.
        num_parameters: number of parameters, padding left out.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[Dim, ...], ...]
    channels_last: bool = False
    labels: tuple[tuple[str, int], ...] | None = None
    offsets: tuple[int, ...] = field(init=False)
    d: int = field(init=False)

    def __post_init__(self) -> None:
        offsets, end = [], 0
        for shape in self.shapes:
            offsets.append(end)
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "d", end)
        if self.labels is None:
            object.__setattr__(self, "labels", self._numbered_labels())

    def _numbered_labels(self) -> tuple[tuple[str, int], ...]:
        found, end = dict[str, int](), 0
        for shape, dims in zip(self.shapes, self.axes, strict=True):
            for size, dim in zip(shape, dims, strict=True):
                if dim.axis is not None and dim.is_label and dim.axis not in found:
                    found[dim.axis], end = end, end + size
        return tuple(found.items())

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], axes: Axes) -> Layout:
        """Build a layout from ``{name: shape}`` and ``{name: (axis, ...)}``.

        Raises:
            ConfigError: shapes and axes do not fit each other.
        """
        axis_widths(shapes, axes)
        return cls(
            tuple(shapes),
            tuple(tuple(int(size) for size in shape) for shape in shapes.values()),
            tuple(tuple(as_dim(spec) for spec in axes[name]) for name in shapes),
        )

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters, without padding."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def coordinates(self) -> slice | Tensor:
        """Where the parameters lie in a row: all of it, or int64 [num_parameters] if it is padded."""
        if self.num_parameters == self.d:
            return slice(None)
        spans = zip(self.offsets, self.shapes, strict=True)
        return torch.cat([torch.arange(start, start + math.prod(shape)) for start, shape in spans])

    def mask(self, names: Collection[str]) -> Tensor:
        """Return which coordinates belong to the parameters of these names, bool [d]."""
        found = torch.zeros(self.d, dtype=torch.bool)
        for name, start, shape in zip(self.names, self.offsets, self.shapes, strict=True):
            found[start : start + math.prod(shape)] = name in names
        return found

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules: what stands before the first dot of the parameters' names."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.names))

    def of_modules(self, modules: Collection[str]) -> Layout:
        """Return the layout of the parameters of some modules alone.

        Raises:
            ConfigError: there is no such module.
        """
        if unknown := sorted(set(modules) - set(self.modules)):
            raise ConfigError(
                f"unknown module {unknown[0]!r}{nearest(unknown[0], self.modules)} (the model's modules:"
                f" {', '.join(self.modules)})"
            )
        every = zip(self.names, self.shapes, self.axes, strict=True)
        held = [one for one in every if one[0].partition(".")[0] in modules]
        names, shapes, axes = zip(*held, strict=True) if held else ((), (), ())
        return Layout(names, shapes, axes, self.channels_last, self.labels)

    @cached_property
    def convolutions(self) -> frozenset[str]:
        """The parameters that images are convolved with, [out, in, height, width]."""
        return frozenset(n for n, dims in zip(self.names, self.axes, strict=True) if num_kernel_dims(dims) == 2)

    @property
    def convolves(self) -> bool:
        """Whether anything is convolved, in however many dimensions."""
        return any(num_kernel_dims(dims) for dims in self.axes)

    @property
    def num_labels(self) -> int:
        """Labels of all label axes of this layout together."""
        return max((own.stop for _, own in self.label_dims.values()), default=0)

    @cached_property
    def label_dims(self) -> dict[str, tuple[int, slice]]:
        """``{parameter: (position of its label dimension, numbers of its labels)}`` of those that have one."""
        starts = dict(self.labels or ())
        return {
            name: (at, slice(starts[dim.axis], starts[dim.axis] + shape[at]))
            for name, shape, dims in zip(self.names, self.shapes, self.axes, strict=True)
            for at, dim in enumerate(dims)
            if dim.axis is not None and dim.is_label
        }

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width of every named axis."""
        return axis_widths(
            dict(zip(self.names, self.shapes, strict=True)), dict(zip(self.names, self.axes, strict=True))
        )

    @cached_property
    def as_channels_last(self) -> Layout:
        """The same layout with convolution weights in channels-last order."""
        return replace(self, channels_last=True)

    @cached_property
    def cut_axes(self) -> tuple[str, ...]:
        """The axes that a capacity below 1 shortens, in order of first appearance."""
        seen = {dim.axis: None for dims in self.axes for dim in dims if dim.cuttable}
        return tuple(axis for axis in seen if axis is not None)

    def views(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``{name: view}`` of float32 `x` [..., d]; each view has shape [..., *shape] and shares memory."""
        lead, views = x.shape[:-1], {}
        for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True):
            flat = x[..., offset : offset + math.prod(shape)]
            if self.channels_last and name in self.convolutions:
                views[name] = flat.view(*lead, shape[0], *shape[2:], shape[1]).movedim(-1, -3)
            else:
                views[name] = flat.view((*lead, *shape))
        return views

    def reorder_(self, x: Tensor, target: Layout) -> Tensor:
        """Rewrite rows `x` [..., d] in place from this layout's order in memory to `target`'s, and return them."""
        if self.channels_last != target.channels_last:
            new = target.views(x)
            for name, view in self.views(x).items():
                if name in self.convolutions:
                    new[name].copy_(view.clone(memory_format=torch.contiguous_format))
        return x

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Copy ``{name: tensor}`` into a new flat row [d] of their type; padding is zero."""
        row = torch.zeros(self.d, dtype=params[self.names[0]].dtype)
        for name, view in self.views(row).items():
            view.copy_(params[name])
        return row

    def cut(self, capacity: float) -> Layout:
        """Return the layout of a sub-model: every cuttable axis has ``max(1, floor(capacity * width))`` channels."""
        lengths = {axis: window_length(self.widths[axis], capacity) for axis in self.cut_axes}
        return self._with_lengths(lengths)

    def windowed(self, windows: Mapping[str, Window]) -> Layout:
        """Return the layout of the sub-model that `windows` (one per cuttable axis) select."""
        return self._with_lengths({axis: len(windows[axis]) for axis in self.cut_axes})

    def _with_lengths(self, lengths: Mapping[str, int]) -> Layout:
        shapes = tuple(
            tuple(
                dim.outer * lengths[dim.axis] * dim.inner if dim.axis is not None and dim.cuttable else size
                for dim, size in zip(dims, shape, strict=True)
            )
            for dims, shape in zip(self.axes, self.shapes, strict=True)
        )
        return Layout(self.names, shapes, self.axes, self.channels_last, self.labels)
