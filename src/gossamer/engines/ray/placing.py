"""Where actors come from, and what is handed to them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engines.base import Record
from gossamer.registry import resolve


def make_actor(cls: type, *arguments: Any, num_gpus: int = 0) -> Callable[[], Any]:
    """Return what starts an actor of one CPU, with GPUs of its own if told so.

    Ray neither restarts it nor repeats its calls, since `Actors` does.
    """

    def make() -> Any:
        """Start one."""
        import ray

        return ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(cls).remote(*arguments)

    return make


def num_cpus() -> int:
    """Return the number of CPUs of the cluster."""
    return max(1, _resource("CPU"))


def num_gpus() -> int:
    """Return the number of GPUs of the cluster."""
    return _resource("GPU")


def _resource(name: str) -> int:
    import ray

    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get(name, 0))


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return tensors as numpy arrays on the same memory, which Ray stores without pickling their data."""
    return {name: value.numpy() for name, value in tensors.items()}


def put_data(workload: Any) -> list[Any]:
    """Put a workload's data into the object store, so that all actors of a node read one copy.

    Returns:
        [a reference]: in a list, for an actor to fetch when it can; [] if its class does not take ``data``, or its
        data are no dataclass that other processes can import: then every actor loads its own.
    """
    data = getattr(workload, "data", None)
    is_taken = "data" in inspect.signature(type(workload)).parameters
    has_name = type(data).__module__ != "__main__" and "<locals>" not in type(data).__qualname__
    if not (dataclasses.is_dataclass(data) and is_taken and has_name):
        return []
    import ray

    return [ray.put(pack(data))]


def get_data(references: list[Any]) -> Any:
    """Return what `put_data` put; its tensors must not be written to. None if there is nothing."""
    if not references:
        return None
    import ray

    return unpack(*ray.get(references[0]))


def pack(data: Any) -> tuple[str, Record]:
    """Return ``module:name`` of a dataclass, and what its fields hold, with arrays for tensors."""
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.init}
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}
    return f"{type(data).__module__}:{type(data).__qualname__}", arrays


def unpack(name: str, arrays: Record) -> Any:
    """Return the dataclass, on the memory of the arrays."""
    values = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in arrays.items()}
    return resolve("data", name)(**values)
