"""What the checks have in common: requirements, and random rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigError, ContractError
from gossamer.submodel import Layout

TOLERANCE = 1e-4  # relative; kernels round differently from shape to shape


def require(condition: object, message: str) -> None:
    """Raise a `ContractError` unless `condition` holds; unlike `assert`, also under ``python -O``."""
    if not condition:
        raise ContractError(message)


def require_declared(require: Callable[[str, Any], None], plugin: object) -> None:
    """Require what `require` does, of the methods and traits of a plug-in."""
    try:
        require(type(plugin).__name__, plugin)
    except ConfigError as error:
        raise ContractError(str(error)) from None


def require_close(value: Tensor, expected: Tensor, message: str) -> None:
    """Require a relative error, by the Euclidean norm, of `TOLERANCE` at most."""
    error = float((value - expected).norm() / expected.norm().clamp_min(1e-12))
    require(error <= TOLERANCE, f"{message} (relative error {error:.1e})")


def require_arrays(
    arrays: Mapping[str, Tensor], names: Collection[str], shape: tuple[int, ...], what: str, dtype: torch.dtype
) -> None:
    """Require arrays of these names, each of one shape and dtype; `what` names their mapping in errors."""
    require(
        set(arrays) == set(names),
        f"{what} has the arrays {sorted(arrays)}, not {sorted(names)}: return what the traits declare, or correct them",
    )
    for name, value in arrays.items():
        require(
            value.dtype == dtype, f"{what}[{name!r}] must be {dtype}, not {value.dtype}: keep the dtype of the model"
        )
        require(
            value.shape == shape,
            f"{what}[{name!r}] has shape {tuple(value.shape)}, not {shape}: return one row a participant, of the"
            " model's width, or of width 1 if traits.scalars names it",
        )


def random_rows(layout: Layout, num_rows: int, seed: int) -> Tensor:
    """Return random rows, float32 [num_rows, d], that are zero between parameters."""
    drawn = torch.randn(num_rows, layout.d, generator=torch.Generator().manual_seed(seed))
    return torch.stack([layout.flatten(layout.views(row)) for row in drawn])
