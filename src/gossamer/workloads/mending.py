"""Calls of a plain module's forward pass whose arguments hold sizes that a capacity cuts, mended as they are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gossamer.errors import ConfigError
from gossamer.submodel.layout import Axes, Dim, as_dim
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.dropout import Dropout
from gossamer.workloads.models import batch_norm, rescale


class Mending(TorchFunctionMode):
    """Mends the calls of a forward pass whose arguments do not follow the parameters, see `modules.ModuleModel`.

    Dropout follows the context's key instead of a generator.

    Attributes:
        dropout: the calls of dropout.
    """

    def __init__(self, params: Mapping[str, Tensor], axes: Axes, context: ForwardContext) -> None:
        """Watch a forward pass.

        Args:
            params: all parameters that the module uses.
            axes: axes of those that may be cut.
            context: how inputs are treated on their way.
        """
        super().__init__()
        self._names = {id(value): name for name, value in params.items()}
        self._axes, self._context = axes, context
        self._is_scaled = context.is_scaled
        self.dropout = Dropout(context.key)
        self.convolved = set[str]()  # names of the parameters with which inputs are convolved

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, mended if need be."""
        mend = _MENDED.get(func)
        return func(*args, **(kwargs or {})) if mend is None else mend(self, *args, **(kwargs or {}))

    def scaled(self, x: Tensor, weight: Tensor, position: int) -> Tensor:
        """Apply the scaler to what meets a weight, if the dimension at `position` is cut and thus summed over."""
        return rescale(x, self._context.scale) if self._is_scaled and self._dim(weight, position).cuttable else x

    def _dim(self, weight: Tensor, position: int) -> Dim:
        """Return what is known of a weight's dimension: nothing of what is frozen or no parameter."""
        axes = self._axes.get(self._names.get(id(weight), ""))
        return Dim(None) if axes is None else as_dim(axes[position])

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the scaler, and add low-rank factors."""
        output, factors = F.linear(self.scaled(input, weight, 1), weight, bias), self._factors_of(weight)
        return output if factors is None else output + F.linear(F.linear(input, factors[0]), factors[1])

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **scalars: Any) -> Tensor:
        """Add low-rank factors of the left matrix, as which built-in models may take a weight."""
        output, factors = torch.addmm(input, mat1, mat2, **scalars), self._factors_of(mat1)
        return output if factors is None else output + factors[1] @ (factors[0] @ mat2)

    def embedding(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any) -> Any:
        """Add low-rank factors."""
        output, factors = F.embedding(input, weight, padding_idx, *rest, **named), self._factors_of(weight)
        return output if factors is None else output + F.embedding(input, factors[1], padding_idx) @ factors[0]

    def _factors_of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what stands beside a weight, see `ForwardContext`."""
        return self._context.factors.get(self._names.get(id(weight), ""))

    def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend with the heads, or the channels in every head, that the weights have left.

        Raises:
            ConfigError: a sub-model's attention, or one with dropout, has separate projections or extra keys.
        """
        call = _ATTENTION.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        is_whole = given["out_proj_weight"].shape[1] == given["embed_dim_to_check"] and not self._is_scaled
        drops = given["training"] and given["dropout_p"] > 0
        if not given["add_zero_attn"] and all(given[name] is None for name in ("bias_k", "bias_v", "q_proj_weight")):
            return self._attend(is_whole, **given)
        if is_whole and not drops:
            return F.multi_head_attention_forward(*args, **kwargs)
        raise ConfigError(
            "nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn can neither be cut nor have dropout:"
            " build it without them"
        )

    def _attend(
        self,
        is_whole: bool,
        *,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor,
        in_proj_bias: Tensor | None,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # PyTorch passes [length, batch, channels].
        rows = [self.scaled(x, in_proj_weight, 1).movedim(0, -2) for x in (query, key, value)]
        weights, biases = in_proj_weight.chunk(3), in_proj_bias.chunk(3) if in_proj_bias is not None else [None] * 3
        head_dim = embed_dim_to_check // num_heads
        dim = Dim(None) if is_whole else self._dim(in_proj_weight, 0)
        split = (-1, head_dim) if dim.inner == head_dim else (num_heads, -1)
        projected = [F.linear(*three) for three in zip(rows, weights, biases, strict=True)]
        factors = self._factors_of(in_proj_weight)
        if factors is not None:
            added = (F.linear(F.linear(x, factors[0]), b) for x, b in zip(rows, factors[1].chunk(3), strict=True))
            projected = [one + other for one, other in zip(projected, added, strict=True)]
        q, k, v = (torch.unflatten(one, -1, split).transpose(-3, -2) for one in projected)
        scores = q * head_dim**-0.5 @ k.transpose(-2, -1)
        if dim.cuttable and dim.inner != head_dim:  # then the products just now were sums over a cut width
            scores = rescale(scores, self._context.scale)
        places, padding = rest.get("attn_mask"), rest.get("key_padding_mask")
        if places is not None:
            scores = _masked(scores, places.view(scores.shape) if places.dim() == 3 else places)
        if padding is not None:
            scores = _masked(scores, padding[..., None, None, :])
        shares = self.dropout(scores.softmax(-1), rest["dropout_p"] if rest["training"] else 0.0)
        mixed = (shares @ v).transpose(-3, -2).flatten(-2).movedim(-2, 0)
        averaged = rest.get("average_attn_weights", True)
        return self.linear(mixed, out_proj_weight, out_proj_bias), shares.mean(-3) if averaged else shares

    def attend_scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        """Attend as `torch.nn.functional.scaled_dot_product_attention` does; its dropout follows the key."""
        if not dropout_p or self._context.key is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **rest)
        if rest.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scale = rest.get("scale")
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        if attn_mask is not None:  # of whom it is true that they take part
            scores = _masked(scores, ~attn_mask if attn_mask.dtype == torch.bool else attn_mask)
        return self.dropout(scores.softmax(-1), dropout_p) @ value

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
        """Normalise x [b, channels, *] by constants, by its own moments, which running ones follow, or by pooled ones.

        Raises:
            ConfigError: the weight is no parameter, so that the layer has no name.
        """
        if running_mean is not None and not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
        if running_mean is not None and input.numel() > input.shape[1]:
            return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        weight_name = self._names.get(id(weight), "")
        if not weight_name.endswith("weight"):
            raise ConfigError("F.batch_norm is called without a parameter as weight: use a BatchNorm layer")
        return batch_norm(input, weight_name.removesuffix("weight"), weight, bias, self._context, eps)


def _dropout(num_dims: Callable[[int], int | None], *, is_alpha: bool = False) -> Callable[..., Tensor]:
    def mended(
        mending: Mending, input: Tensor, p: float = 0.5, training: bool = not is_alpha, inplace: bool = False
    ) -> Tensor:
        """Drop by the context's key; `num_dims` of an input's number of dimensions are dropped as a whole."""
        drop = mending.dropout.alpha if is_alpha else mending.dropout
        dropped = drop(input, p if training else 0.0, num_dims(input.dim()))
        return input.copy_(dropped) if inplace and dropped is not input else dropped

    return mended


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mended(
        mending: Mending,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Read the number of groups off input and weight, and apply the scaler."""
        mending.convolved |= {mending._names.get(id(weight), "")}
        groups = groups if groups == 1 else input.shape[1 - weight.dim()] // weight.shape[1]
        return function(mending.scaled(input, weight, 1), weight, bias, stride, padding, dilation, groups)

    return mended


def _transposed_convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mended(mending: Mending, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the scaler."""
        mending.convolved |= {mending._names.get(id(weight), "")}
        return function(mending.scaled(input, weight, 0), weight, *args, **kwargs)

    return mended


_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_MENDED: dict[Any, Callable[..., Any]] = {
    F.linear: Mending.linear,
    torch.addmm: Mending.addmm,
    F.embedding: Mending.embedding,
    F.multi_head_attention_forward: Mending.attend,
    F.scaled_dot_product_attention: Mending.attend_scaled,
    F.dropout: _dropout(lambda _: None),
    F.dropout1d: _dropout(lambda dims: dims - 1),  # the last one is a channel's, and so on; the batch may be missing
    F.dropout2d: _dropout(lambda dims: 2),
    F.dropout3d: _dropout(lambda dims: dims - 3),
    F.alpha_dropout: _dropout(lambda _: None, is_alpha=True),
    F.feature_alpha_dropout: _dropout(lambda _: 2, is_alpha=True),
    F.layer_norm: Mending.layer_norm,
    F.rms_norm: Mending.rms_norm,
    F.batch_norm: Mending.batch_norm,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
    **{one: _transposed_convolution(one) for one in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
