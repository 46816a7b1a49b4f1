"""Image classifiers as pure functions of named parameters: softmax regression, perceptron, McMahan's CNN.

Every hidden width is an axis of its own, so a capacity below 1 cuts it; input channels and classes are never cut.
`apply` reads all widths off the parameters, so it runs sub-models as they are, also under `torch.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.errors import ConfigError
from gossamer.memory import require_memory
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import KERNEL, LABEL_AXIS, AxisSpec, Dim, num_kernel_dims
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, Model
from gossamer.workloads.dropout import Dropout
from gossamer.workloads.leaves import Leaves
from gossamer.workloads.traits import ModelTraits

WHERE = "workload.model"


class ModelOptions(Options):
    """Options of every model. Attributes: width: share of each hidden width that the full model has, in (0, 1]."""

    width: float = Field(1.0, gt=0, le=1)


def default_init(shapes: Mapping[str, tuple[int, ...]], source: np.random.Generator) -> dict[str, Tensor]:
    """Draw parameters as PyTorch's Linear and Conv2d do by default: uniform in ±1/sqrt(fan in), weights and biases.

    A one-dimensional ``*.weight`` belongs to a normalisation: it is set to 1 and its bias to 0.
    """
    params: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weight_shape = shapes[name.rpartition(".")[0] + ".weight"]
        if len(weight_shape) == 1:
            params[name] = torch.full(shape, 1.0 if name.endswith(".weight") else 0.0)
            continue
        bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
        params[name] = torch.from_numpy(source.random(shape, dtype=np.float32)).mul_(2).sub_(1).mul_(bound)
    return params


def rescale(x: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply by `scale`: the Scaler of HeteroFL (arXiv 2010.01264); exactly 1.0 costs nothing."""
    return x * scale if isinstance(scale, Tensor) or scale != 1.0 else x


def batch_norm(
    x: Tensor, prefix: str, weight: Tensor | None, bias: Tensor | None, context: ForwardContext, epsilon: float = 1e-5
) -> Tensor:
    """Normalise x [b, channels, *] by its own moments, or by the context's; no running moments are kept.

    Args:
        prefix: the layer's name and a dot; empty where it is the whole model.
        weight, bias: [channels].
    """
    if context.moments:
        mean, variance = (context.moments[f"{prefix}{name}"] for name in ("running_mean", "running_var"))
        return F.batch_norm(x, mean, variance, weight, bias, eps=epsilon)
    if context.statistics:
        mean, variance = pooled_moments(context.statistics, prefix)
        return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), weight, bias, eps=epsilon)
    if context.record is not None:
        others = [0, *range(2, x.dim())]
        context.record[f"{prefix}sum"] = x.sum(others, dtype=torch.float64)
        context.record[f"{prefix}squares"] = torch.linalg.vector_norm(x, dim=others, dtype=torch.float64) ** 2
        context.record[f"{prefix}count"] = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)
    # F.batch_norm refuses a single value a channel, which small images and batches of one come to in a last stage.
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, epsilon, False)


def pooled_moments(statistics: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Return mean and variance, float64 [channels], of the sums of a layer, see `ForwardContext.record`."""
    count = statistics[f"{prefix}count"]
    mean = statistics[f"{prefix}sum"] / count
    return mean, (statistics[f"{prefix}squares"] / count - mean * mean).clamp_min(0)


class DeclaredModel(Model):
    """A model whose parameters are declared layer by layer, see `base.Model`.

    Attributes:
        Options: the options that the constructor takes as keywords.
    """

    Options: ClassVar[type[ModelOptions]] = ModelOptions
    traits = ModelTraits()
    norms: tuple[str, ...] = ()

    def __init__(self) -> None:
        """Start without parameters."""
        self.shapes = {}
        self.axes = {}

    def add(self, layer: str, shape: tuple[int, ...], axes: tuple[AxisSpec, ...], bias: bool = True) -> None:
        """Declare ``<layer>.weight`` and, if asked, ``<layer>.bias`` along its first dimension."""
        self.shapes[f"{layer}.weight"], self.axes[f"{layer}.weight"] = shape, axes
        if bias:
            self.shapes[f"{layer}.bias"], self.axes[f"{layer}.bias"] = shape[:1], axes[:1]

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, see `default_init`."""
        return default_init(self.shapes, source)


class ImageModel(DeclaredModel):
    """Base of the image classifiers; `traits.has_images` is set where there are convolutions.

    Attributes:
        takes_any_shape: whether samples need not be images.
    """

    takes_any_shape: ClassVar[bool] = False

    def __init__(self, input_shape: tuple[int, ...], num_labels: int, width: float = 1.0, **params: Any) -> None:
        """Declare the parameters.

        Args:
            input_shape: channels, height, width of an image.
            num_labels: number of classes.
            width: share of each hidden width, in (0, 1]; a width K becomes ``max(1, floor(width * K))``.
            params: further options of the model.

        Raises:
            ConfigError: an unknown or wrong option, or samples that are no images, or too small for the model.
        """
        super().__init__()
        options = parse_options(self.Options, {"width": width, **params}, WHERE)
        if len(input_shape) != 3 and not self.takes_any_shape:
            raise ConfigError(
                f"{WHERE} is for images [channels, height, width], but samples have the shape {input_shape}: take mlp,"
                " softmax, or a module of your own"
            )
        self.num_sample_dims = len(input_shape)
        self.declare(options, input_shape, num_labels)
        if any(num_kernel_dims(specs) == 2 for specs in self.axes.values()):
            self.traits = replace(self.traits, has_images=True)

    def declare(self, options: Any, input_shape: tuple[int, ...], num_labels: int) -> None:
        """Fill `shapes` and `axes` (and `norms`)."""
        raise NotImplementedError

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of images float32 [b, channels, height, width], see `base.Model`.

        Hidden activations are scaled before their non-linearity or normalisation.
        """
        raise NotImplementedError


LARGE_WEIGHT = 1 << 19  # numbers, beyond the second-level cache
FEW_SAMPLES = range(6, 17)  # for which MKL takes half the time for W x^T that it takes for x W^T


def _leaves_of_products(params: Mapping[str, Tensor], weight: Tensor, x: Tensor) -> Leaves | None:
    """Return `params` if the gradient by a linear layer's weight may be left in two factors."""
    if isinstance(params, Leaves) and params.factored and x.dim() == weight.dim() and torch.is_grad_enabled():
        return params
    return None


def _linear(params: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """Apply a linear layer to x [b, i], or the layers of s clients to x [s, b, i]."""
    name = f"{layer}.weight"
    weight, bias = params[name], params[f"{layer}.bias"]
    leaves = _leaves_of_products(params, weight, x)
    if leaves is not None:
        weight = weight.detach()
    is_flat = x.dim() == 2 and weight.numel() >= LARGE_WEIGHT and len(x) in FEW_SAMPLES
    if weight.dim() == 3:
        output = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    else:
        output = torch.addmm(bias[:, None], weight, x.t()) if is_flat else F.linear(x, weight, bias)
    if leaves is not None:
        leaves.leave_product(name, output, x, is_transposed=not is_flat)
    return output.t() if is_flat else output


class Softmax(ImageModel):
    """Multinomial logistic regression on the pixels; nothing in it can be cut."""

    traits = ModelTraits(stacks_natively=True)
    takes_any_shape = True

    def declare(self, options: ModelOptions, input_shape: tuple[int, ...], num_labels: int) -> None:
        """Declare one linear layer."""
        self.add("output", (num_labels, math.prod(input_shape)), (LABEL_AXIS, None))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits, see `ImageModel.apply`.

        Written as W x^T, so that the gradient by W of many stacked clients is the quicker of the two batched products.
        """
        weight, x = params["output.weight"], x.flatten(-self.num_sample_dims)
        leaves = _leaves_of_products(params, weight, x)
        product = (weight if leaves is None else weight.detach()) @ x.transpose(-1, -2)
        logits = product.transpose(-1, -2) + params["output.bias"].unsqueeze(-2)
        if leaves is not None:
            leaves.leave_product("output.weight", logits, x, is_transposed=True)
        return logits


class MLPOptions(ModelOptions):
    """Options of `MLP`. Attributes: hidden: widths of the hidden layers; dropout: share dropped of each in training."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (200, 200)
    dropout: float = Field(0.0, ge=0, lt=1)


class MLP(ImageModel):
    """Perceptron with ReLU; two hidden layers of 200 on 28 x 28 are the "2NN" of McMahan et al. (arXiv 1602.05629)."""

    Options = MLPOptions
    traits = ModelTraits(stacks_natively=True, adaptable=True)
    takes_any_shape = True

    def declare(self, options: MLPOptions, input_shape: tuple[int, ...], num_labels: int) -> None:
        """Declare the linear layers ``hidden0``, ``hidden1``, ... and ``output``."""
        size, axis, self.dropout = math.prod(input_shape), None, options.dropout
        self.traits = replace(self.traits, uses_key=options.dropout > 0)
        self.hidden = tuple(f"hidden{i}" for i in range(len(options.hidden)))
        for layer, width in zip(self.hidden, options.hidden, strict=True):
            length = window_length(width, options.width)
            self.add(layer, (length, size), (layer, axis))
            size, axis = length, layer
        self.add("output", (num_labels, size), (LABEL_AXIS, axis))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits, see `ImageModel.apply`."""
        x, dropout = x.flatten(-self.num_sample_dims), Dropout(context.key)
        for layer in self.hidden:
            x = dropout(rescale(_linear(params, layer, x), context.scale).relu_(), self.dropout)
        return _linear(params, "output", x)


class CNN(ImageModel):
    """Two 5 x 5 convolutions (32, 64), each pooled by 2, then 512 hidden units (McMahan et al., arXiv 1602.05629).

    1,663,370 parameters on 1 x 28 x 28 with 10 classes.
    """

    traits = ModelTraits(adaptable=True)

    def declare(self, options: ModelOptions, input_shape: tuple[int, ...], num_labels: int) -> None:
        """Declare ``conv0``, ``conv1``, ``hidden`` and ``output``.

        Raises:
            ConfigError: the image is smaller than 4 x 4, so that pooling twice leaves nothing.
        """
        channels, height, width = input_shape
        pixels = (height // 4) * (width // 4)
        if pixels == 0:
            raise ConfigError(
                f"model 'cnn' halves the image twice, but it has {height} x {width} pixels: use 4 x 4 or more"
            )
        first, second, hidden = (window_length(size, options.width) for size in (32, 64, 512))
        self.add("conv0", (first, channels, 5, 5), ("conv0", None, KERNEL, KERNEL))
        self.add("conv1", (second, first, 5, 5), ("conv1", "conv0", KERNEL, KERNEL))
        self.add("hidden", (hidden, second * pixels), ("hidden", Dim("conv1", inner=pixels)))
        self.add("output", (num_labels, hidden), (LABEL_AXIS, "hidden"))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits, see `ImageModel.apply`.

        Pooling comes before ReLU and scale: all three are monotone, so the order changes no bit, and it is a quarter of
        the work.
        """
        for layer in ("conv0", "conv1"):
            x = F.conv2d(x, params[f"{layer}.weight"], params[f"{layer}.bias"], padding=2)
            x = rescale(F.max_pool2d(x, 2), context.scale).relu_()
        x = rescale(_linear(params, "hidden", x.flatten(1)), context.scale).relu_()
        return _linear(params, "output", x)


class Fitting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, a `ConfigError` is raised before torch makes a tensor that could not fit into this machine."""

    def __init__(self, what: str) -> None:
        """Name the tensors' owner for errors."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the size that a new tensor is to have."""
        sizes = args[0] if args and func.overloadpacket.__name__ in ("empty", "zeros", "ones", "full", "randn") else ()
        if isinstance(sizes, (list, tuple)) and sizes:
            size = " x ".join(map(str, sizes))
            require_memory(4 * math.prod(sizes), f"{self._what}: a tensor of {size} numbers", "make it smaller")
        return func(*args, **(kwargs or {}))
