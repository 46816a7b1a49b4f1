"""Buffers that a module's forward pass changes while training, such as the running moments of BatchNorm.

They lie in a model's row beside the parameters, and so they are cut, sent, averaged, kept and committed as these are.
Those of whole numbers lie there as numbers, too, and are rounded where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigError
from gossamer.submodel.layout import AxisSpec
from gossamer.workloads.module_checks import is_equal

MOMENTS = ("running_mean", "running_var")


class Watched(nn.Module):
    """A module that returns some of its buffers beside its output, as the forward pass leaves them."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        """Watch the buffers `names` of a module."""
        super().__init__()
        self.module, self._names = module, names

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and ``{name: buffer}``, which are put back once a functional call is over."""
        output = self.module(x)
        return output, {name: self.module.get_buffer(name) for name in self._names}


@torch.no_grad()
def changing_buffers(module: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the names of the buffers that a forward pass of samples `x` changes; it changes them.

    Raises:
        ConfigError: the forward pass fails, or a buffer is complex.
    """
    before = {name: value.clone() for name, value in module.named_buffers()}
    try:
        module(x.clone())
    except Exception as error:
        raise ConfigError(
            f"model {type(module).__name__!r} fails on a batch of shape {tuple(x.shape)}: {error}"
        ) from error
    after = dict(module.named_buffers())
    found = tuple(name for name, value in before.items() if not is_equal(value, after[name]))
    if complex_ones := [name for name in found if before[name].is_complex()]:
        raise ConfigError(f"model {type(module).__name__!r}: buffer {complex_ones[0]!r} is complex: split it in two")
    return found


def as_buffer(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy of what lies in a row as the module has it, whose own buffer is `like`."""
    copied = value.detach().clone()
    return copied if like.is_floating_point() else copied.round().to(like.dtype)


def axes_of_buffer(name: str, shape: tuple[int, ...], axes: Mapping[str, tuple[AxisSpec, ...]]) -> tuple[AxisSpec, ...]:
    """Return the axes of a buffer: running moments have those of their layer's weight, others none, and stay whole."""
    layer, _, last = name.rpartition(".")
    weight = f"{layer}.weight" if layer else "weight"
    return axes[weight] if last in MOMENTS and weight in axes else (None,) * len(shape)
