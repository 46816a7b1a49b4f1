"""Whether a sub-model computes what the whole model does once all that the sub-model lacks is silenced.

It does wherever a forward pass treats channels alike. It does not where sizes are written down that a capacity cuts: a
reshape into so many heads, told of half as many channels, makes other heads of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gossamer.errors import ConfigError
from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import rolling

# Relative: far above rounding, and far below what regrouped channels do at the small weights that modules begin with.
DIFFERENT = {torch.float64: 1e-6, torch.float32: 1e-3}
Apply = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class _WithoutMoments(TorchFunctionMode):
    """Runs norms without their moments, and attention at one scale: these a sub-model may take from its own width."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands in for it."""
        simpler = _SIMPLER.get(func)
        return (func if simpler is None else simpler)(*args, **(kwargs or {}))


def _affine(
    input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    scaled = input if weight is None else input * weight
    return scaled if bias is None else scaled + bias


def _affine_rms(input: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _affine(input, shape, weight)


def _affine_groups(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _affine(input.movedim(1, -1), num_groups, weight, bias).movedim(-1, 1)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs | {"scale": 1.0})


_SIMPLER: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _affine,
    F.rms_norm: _affine_rms,
    F.group_norm: _affine_groups,
    F.scaled_dot_product_attention: _attention,
}


def is_same_function(apply: Apply, layout: Layout, params: Mapping[str, Tensor], x: Tensor) -> bool:
    """Say whether a sub-model of half the width computes what the whole model does in which everything else is 0.

    Args:
        apply: returns what a (sub-)model computes of its parameters and a batch.
        layout: layout of the whole model.
        params: parameters of the whole model; they are perturbed, so that none is 0 by accident.
        x: batch of floats.

    Returns:
        that; also where a result is not finite, so that nothing can be told.
    """
    try:
        return _is_same(apply, layout, params, x, torch.float64)
    except Exception:  # it ran before, so some constant of it must be in single precision
        return _is_same(apply, layout, params, x, torch.float32)


@torch.no_grad()
def _is_same(apply: Apply, layout: Layout, params: Mapping[str, Tensor], x: Tensor, dtype: torch.dtype) -> bool:
    noise = torch.randn(layout.d, generator=torch.Generator().manual_seed(0))
    row = layout.flatten(layout.views(layout.flatten(params) + 0.05 * noise)).to(dtype)
    cut = Cutter(layout, rolling, 1, 0).cut(0.5, 1, 0)
    part, silenced = cut.read(row, row.new_zeros(cut.sub.d)), torch.zeros_like(row)
    cut.write(silenced, part)
    with _WithoutMoments():
        given = x.to(dtype) if x.is_floating_point() else x
        small, large = apply(cut.sub.views(part), given), apply(layout.views(silenced), given)
    return not float((small - large).norm()) > DIFFERENT[dtype] * float(torch.maximum(small.norm(), large.norm()))


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


def require_same_state(
    model: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that a state dict is that of a model; counts of batches, which change nothing, may be missing.

    Raises:
        ConfigError: one lacks a name, or has it with another shape.
    """
    count = "num_batches_tracked"
    missing = [name for name in expected if name not in found and not name.endswith(count)]
    surplus = [name for name in found if name not in expected and not name.endswith(count)]
    shapes = [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]
    told = [f"{what} {', '.join(names[:3])}" for what, names in (("no", missing), ("also", surplus)) if names]
    told += [f"{name} of shape {tuple(found[name])} instead of {tuple(expected[name])}" for name in shapes[:3]]
    if told:
        raise ConfigError(
            f"the parameters are not those of model {model!r}, of which they have {'; '.join(told)}: build it by the"
            " code and the options that the run was made with"
        )


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit; what is not a number equals itself."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
