"""Any plain `torch.nn.Module` as the model of a workload: its axes are traced, its forward pass runs as written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.errors import ConfigError, GossamerError
from gossamer.submodel.layout import Layout, as_dim
from gossamer.submodel.tracing import Attention, Keep, trace_axes
from gossamer.threads import one_thread
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import batch_norm, rescale
from gossamer.workloads.module_checks import is_same_function
from gossamer.workloads.traits import ModelTraits

BatchNorm = nn.modules.batchnorm._BatchNorm
CLOSE = 1e-4  # relative; kernels round differently from shape to shape


class ModuleModel:
    """A plain module as a `gossamer.workloads.base.Model`.

    A workload wraps a module class, or a function that returns a module, by itself. Wrap it yourself to choose what is
    cut: name a function ``(input_shape, num_labels, **options) -> ModuleModel``.

    The module's own code runs on the sub-model's parameters, so it must take sizes that a capacity cuts from its
    tensors (``x.shape``, ``-1`` in a reshape) and not from attributes. Calls that cannot be written so are mended:
    layer norms, root-mean-square norms, grouped convolutions and `torch.nn.MultiheadAttention` (so the transformer
    layers of PyTorch, too) take their sizes from weights and inputs; its softmax keeps the scale of full width. Where
    heads of your own are narrowed, give ``F.scaled_dot_product_attention`` its scale, or it will take the sub-model's.

    BatchNorm keeps no running moments: it normalises by those of the batch while training, and by pooled ones for
    evaluation (static BatchNorm, Diao et al., arXiv 2010.01264). Dropout and other random draws in the forward pass are
    refused, because they would not depend on the seed alone; and so are buffers that the forward pass changes, because
    only parameters are sent and averaged. Buffers that stay as they are built may be used.

    The scaler of HeteroFL multiplies the inputs of linear layers and convolutions (`torch.nn`'s, or ``F.linear`` and
    ``F.conv*`` of a parameter) that sum over a cut width: with ReLU the same as scaling each cut layer's output.

    Attributes:
        traits, shapes, axes, norms: see `gossamer.workloads.base.Model`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        input_shape: tuple[int, ...],
        num_labels: int,
        *,
        attention: Attention | None = None,
        keep: Keep = (),
    ) -> None:
        """Build the module once, trace it, and try it on a sub-model.

        Args:
            build: returns a new module of full width, initialised by PyTorch's default generator.
            input_shape, num_labels: shape of one sample; width of the logits, float32 [b, num_labels].
            attention, keep: see `trace_axes`; attention None: fewer heads if the module takes them, else narrower ones.

        Raises:
            ConfigError: the module cannot be trained as it is; the message says why.
        """
        self._build = build
        self._module = self._built(0)
        self._name = type(self._module).__name__
        self.norms = self._adopt_norms()
        self.shapes = {name: tuple(param.shape) for name, param in self._module.named_parameters()}
        self._check_state()
        self._samples = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
        with one_thread():
            self._trace(attention or "heads", keep)
            self._check_forward(num_labels)
            try:
                self._check_sub_model(num_labels)
            except ConfigError:
                if attention is not None or not self._narrows_heads(num_labels, keep):
                    raise
            stacks = self._agrees(self._stacked)
            convolves = any(len(shape) == 4 for shape in self.shapes.values())
            has_images = convolves and self._agrees(self._channels_last)
        self.traits = ModelTraits(supports_stacking=stacks, has_images=has_images)

    def _trace(self, attention: Attention, keep: Keep) -> None:
        try:
            self.axes = trace_axes(self._module, self._samples, attention=attention, keep=keep)
        except GossamerError as error:
            raise ConfigError(f"model {self._name!r}: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"model {self._name!r} fails on a batch of shape {tuple(self._samples.shape)}: {error}"
            ) from error

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return the parameters of a newly built module, whose draws are seeded from `source`."""
        module = self._built(int(source.integers(2**63)))
        return {name: param.detach().clone() for name, param in module.named_parameters()}

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of x float32 [b, *input_shape], see `gossamer.workloads.base.Model`."""
        with _Mending(self, params, context):
            logits: Tensor = torch.func.functional_call(self._module, dict(params), (x,))
        return logits

    def _built(self, seed: int) -> nn.Module:
        """Build a module from a seed, and leave PyTorch's random state as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._build().train()

    def _adopt_norms(self) -> tuple[str, ...]:
        """Take the running moments from all BatchNorm layers and return their names.

        Raises:
            ConfigError: one of them has no weight.
        """
        names = []
        for name, layer in self._module.named_modules():
            if isinstance(layer, BatchNorm):
                if layer.weight is None:
                    raise ConfigError(f"model {self._name!r}: {name!r} has no weight: build it with affine=True")
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
                names.append(name)
        return tuple(names)

    def _check_state(self) -> None:
        for name, param in self._module.named_parameters():
            if param.dtype != torch.float32:
                raise ConfigError(f"model {self._name!r}: parameter {name!r} is {param.dtype}: make it float32")
        if not self.shapes:
            raise ConfigError(f"model {self._name!r} has no parameters: there is nothing to train")
        for name, layer in self._module.named_modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
                raise ConfigError(
                    f"model {self._name!r}: {name!r} draws dropout masks (p = {layer.p}), which would not depend on the"
                    " seed alone: set p to 0"
                )

    def _check_forward(self, num_labels: int) -> None:
        """Check that the forward pass returns logits and depends on parameters and inputs alone."""
        buffers = {name: value.clone() for name, value in self._module.named_buffers()}
        runs = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for seed in range(2):
                torch.default_generator.manual_seed(seed)
                runs.append(self.apply(dict(self._module.named_parameters()), self._samples))
        expected = len(self._samples), num_labels
        if not isinstance(runs[0], Tensor) or runs[0].shape != expected:
            found = tuple(runs[0].shape) if isinstance(runs[0], Tensor) else type(runs[0]).__name__
            raise ConfigError(f"model {self._name!r} returns {found}: return one tensor of logits, here {expected}")
        for name, value in self._module.named_buffers():
            if not torch.equal(value, buffers[name]):
                raise ConfigError(
                    f"model {self._name!r}: the forward pass changes the buffer {name!r}, but only parameters are sent"
                    " and averaged: do without it"
                )
        if not torch.equal(*runs):
            raise ConfigError(
                f"model {self._name!r} draws random numbers in its forward pass, which would not depend on the seed"
                " alone: do without them (dropout: p = 0)"
            )

    def _check_sub_model(self, num_labels: int) -> None:
        """Run a sub-model of half the width, and compare it with the whole model that has nothing else."""
        layout = Layout.of(self.shapes, self.axes)
        sub = layout.cut(0.5)
        views = sub.views(torch.full((sub.d,), 0.01))
        remedy = (
            "take sizes from tensors (x.shape, or -1 in a reshape) instead of attributes,"
            f" or keep some of its axes whole ({', '.join(layout.cut_axes)}), see ModuleModel"
        )
        try:
            with torch.no_grad():
                shape = tuple(self.apply(views, self._samples).shape)
        except Exception as error:
            raise ConfigError(f"model {self._name!r} fails at half its width ({error}): {remedy}") from error
        if shape != (len(self._samples), num_labels):
            raise ConfigError(f"model {self._name!r} returns shape {shape} at half its width: {remedy}")
        if not is_same_function(self.apply, layout, dict(self._module.named_parameters()), self._samples):
            raise ConfigError(
                f"model {self._name!r} is another function at half its width, not the whole one without the rest, as"
                f" where channels are regrouped or multiplied by what depends on their number: {remedy}"
            )

    def _narrows_heads(self, num_labels: int, keep: Keep) -> bool:
        """Say whether the channels in every head can be cut, and leave it so if they can."""
        try:
            self._trace("head-dim", keep)
            self._check_sub_model(num_labels)
        except ConfigError:
            return False
        return True

    def _agrees(self, way: Callable[[dict[str, Tensor], Tensor], Tensor]) -> bool:
        """Whether another way to run the module works and gives the same logits."""
        params = {name: param.detach() for name, param in self._module.named_parameters()}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slowness, which is measured elsewhere
            expected = self.apply(params, self._samples)
            try:
                found = way(params, self._samples)
            except Exception:
                return False
        return bool((found - expected).norm() <= CLOSE * expected.norm())

    def _stacked(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        two = {name: torch.stack([value, value]) for name, value in params.items()}
        return torch.vmap(self.apply)(two, torch.stack([x, x]))[1]

    def _channels_last(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        layout = Layout.of(self.shapes, self.axes).as_channels_last
        return self.apply(layout.views(layout.flatten(params)), x.contiguous(memory_format=torch.channels_last))


class _Mending(TorchFunctionMode):
    """Mends the calls of a forward pass whose arguments do not follow the parameters, see `ModuleModel`."""

    def __init__(self, model: ModuleModel, params: Mapping[str, Tensor], context: ForwardContext) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in params.items()}
        self._axes, self._context = model.axes, context

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, mended if need be."""
        mend = _MENDED.get(func)
        return func(*args, **(kwargs or {})) if mend is None else mend(self, *args, **(kwargs or {}))

    def scaled(self, x: Tensor, weight: Tensor, position: int) -> Tensor:
        """Apply the scaler to what meets a weight, if the dimension at `position` is cut and thus summed over."""
        name = self._names.get(id(weight))
        return rescale(x, self._context.scale) if name and as_dim(self._axes[name][position]).cuttable else x

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the scaler."""
        return F.linear(self.scaled(input, weight, 1), weight, bias)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the heads, or the channels in every head, that the weights have left.

        Raises:
            ConfigError: the attention has dropout, separate projections or extra keys.
        """
        if in_proj_weight is None or bias_k is not None or add_zero_attn or dropout_p > 0:
            raise ConfigError(
                "nn.MultiheadAttention with dropout, kdim, vdim, add_bias_kv or add_zero_attn cannot be trained here:"
                " build it without them"
            )
        # PyTorch passes [length, batch, channels].
        rows = [self.scaled(x, in_proj_weight, 1).movedim(0, -2) for x in (query, key, value)]
        weights, biases = in_proj_weight.chunk(3), in_proj_bias.chunk(3) if in_proj_bias is not None else [None] * 3
        head_dim = embed_dim_to_check // num_heads
        dim = as_dim(self._axes[self._names[id(in_proj_weight)]][0])
        split = (-1, head_dim) if dim.inner == head_dim else (num_heads, -1)
        projected = (F.linear(*three) for three in zip(rows, weights, biases, strict=True))
        q, k, v = (torch.unflatten(one, -1, split).transpose(-3, -2) for one in projected)
        scores = q * head_dim**-0.5 @ k.transpose(-2, -1)
        if dim.cuttable and dim.inner != head_dim:  # then the products just now were sums over a cut width
            scores = rescale(scores, self._context.scale)
        places, padding = rest.get("attn_mask"), rest.get("key_padding_mask")
        if places is not None:
            scores = _masked(scores, places.view(scores.shape) if places.dim() == 3 else places)
        if padding is not None:
            scores = _masked(scores, padding[..., None, None, :])
        shares = scores.softmax(-1)
        mixed = (shares @ v).transpose(-3, -2).flatten(-2).movedim(-2, 0)
        averaged = rest.get("average_attn_weights", True)
        return self.linear(mixed, out_proj_weight, out_proj_bias), shares.mean(-3) if averaged else shares

    def layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Normalise as many channels as there are weights."""
        return F.layer_norm(input, normalized_shape if weight is None else weight.shape, weight, *args, **kwargs)

    def rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Normalise as many channels as there are weights."""
        return F.rms_norm(input, normalized_shape if weight is None else weight.shape, weight, *args, **kwargs)

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise x [b, channels, *] by its own moments, or by pooled ones.

        Raises:
            ConfigError: the weight is no parameter, so that the layer has no name.
        """
        weight_name = self._names.get(id(weight), "")
        if not weight_name.endswith("weight"):
            raise ConfigError("F.batch_norm is called without a parameter as weight: use a BatchNorm layer")
        return batch_norm(input, weight_name.removesuffix("weight"), weight, bias, self._context, eps)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mended(
        mending: _Mending,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Read the number of groups off input and weight, and apply the scaler."""
        groups = groups if groups == 1 else input.shape[1 - weight.dim()] // weight.shape[1]
        return function(mending.scaled(input, weight, 1), weight, bias, stride, padding, dilation, groups)

    return mended


def _transposed_convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mended(mending: _Mending, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the scaler."""
        return function(mending.scaled(input, weight, 0), weight, *args, **kwargs)

    return mended


_MENDED: dict[Any, Callable[..., Any]] = {
    F.linear: _Mending.linear,
    F.multi_head_attention_forward: _Mending.attend,
    F.layer_norm: _Mending.layer_norm,
    F.rms_norm: _Mending.rms_norm,
    F.batch_norm: _Mending.batch_norm,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
    **{one: _transposed_convolution(one) for one in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
