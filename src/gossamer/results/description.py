"""What a run directory says of its model: written when the run starts, read where the data is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.storage.model_file import DESCRIPTION, read_model, write_model
from gossamer.submodel import Dim, Layout
from gossamer.workloads.base import Workload


@dataclass(frozen=True)
class ModelDescription:
    """What is the same in all rounds.

    Attributes:
        layout: layout of the parameters that are trained.
        facts: what the workload says of its data, see `gossamer.workloads.base.Blueprint`.
        names: names of all parameters of the whole model, frozen ones included, in their order.
        constants, aliases, merging, norms, integers: see there.
    """

    layout: Layout
    facts: Mapping[str, Any]
    names: tuple[str, ...]
    constants: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    merging: Mapping[str, tuple[str, str, float]]
    norms: tuple[str, ...]
    integers: tuple[str, ...] = ()


def describe_model(directory: Path, workload: Workload) -> None:
    """Write what is the same in all rounds into a run directory.

    Raises:
        StorageError: the disk refuses a write.
    """
    blueprint, layout = workload.blueprint(), workload.layout
    parameters = [
        {"name": name, "shape": list(shape), "axes": [_as_json(dim) for dim in dims]}
        for name, shape, dims in zip(layout.names, layout.shapes, layout.axes, strict=True)
    ]
    described = {"parameters": parameters, "facts": dict(blueprint.facts), "norms": list(blueprint.norms)}
    described |= {"names": list(workload.params_of(torch.zeros(layout.d))), "aliases": dict(blueprint.aliases)}
    described |= {"merging": {name: list(factors) for name, factors in blueprint.merging.items()}}
    described |= {"integers": list(blueprint.integers)} if blueprint.integers else {}
    write_model(directory, described, blueprint.constants)


def read_description(directory: Path) -> ModelDescription:
    """Return what `describe_model` wrote.

    Raises:
        CheckpointError: it is missing, malformed or altered.
    """
    described, constants = read_model(directory)
    try:
        parameters = described["parameters"]
        shapes = {one["name"]: tuple(one["shape"]) for one in parameters}
        axes = {one["name"]: tuple(Dim(**dim) for dim in one["axes"]) for one in parameters}
        return ModelDescription(
            layout=Layout.of(shapes, axes),
            facts=described["facts"],
            names=tuple(described["names"]),
            constants=constants,
            aliases=described["aliases"],
            merging={name: (a, b, float(scale)) for name, (a, b, scale) in described["merging"].items()},
            norms=tuple(described["norms"]),
            integers=tuple(described.get("integers", ())),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(directory / DESCRIPTION)!r} is malformed ({error}): restore it") from error


def _as_json(dim: Dim) -> dict[str, Any]:
    return {"axis": dim.axis, "outer": dim.outer, "inner": dim.inner}
