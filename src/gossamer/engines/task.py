"""What an engine trains, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import field_validator

from gossamer.algorithms.base import Algorithm, of_capacity
from gossamer.errors import ConfigError, one_line
from gossamer.options import Options
from gossamer.submodel import Cutter
from gossamer.topology import Topology
from gossamer.workloads.base import Workload


class VariantMode(Options):
    """How participants of one capacity are trained. Resolved once, because each field changes bits.

    Attributes:
        stacked: all rows of a block in one batched computation (vmap), instead of one after another.
        channels_last: images in channels-last order.
        padding: short batches are padded and masked (stacked only).
        device: where torch computes their gradients, as "cpu" or "cuda". Sums and evaluation stay on processors.
    """

    stacked: bool = False
    channels_last: bool = False
    padding: bool = False
    device: str = "cpu"

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError("give a device as torch names it, such as cpu or cuda") from None
        return value

    @property
    def is_on_gpu(self) -> bool:
        """Whether gradients are computed elsewhere than on a processor."""
        return torch.device(self.device).type != "cpu"


@dataclass(frozen=True)
class TrainOptions:
    """Local training, as far as an engine must know it.

    Attributes:
        batch_size: samples a step.
        clip_norm: largest Euclidean norm of a step's gradient, or None.
    """

    batch_size: int
    clip_norm: float | None = None


@dataclass(frozen=True)
class Task:
    """What trains a block, on any engine: the same on every worker.

    Attributes:
        capacities: the capacity of each variant, ascending.
        modes: how each variant is trained.
        scaler: whether a sub-model's activations are multiplied by 1 / capacity while training.
        count_labels: whether label rows are averaged over the clients that own the label only.
        topology: by which peers mix; None: there is a server.
    """

    workload: Workload
    algorithm: Algorithm
    cutter: Cutter
    train: TrainOptions
    seed: int
    capacities: tuple[float, ...]
    modes: tuple[VariantMode, ...]
    scaler: bool
    count_labels: bool
    topology: Topology | None = None

    def algorithm_of(self, capacity: float) -> Algorithm:
        """Return the algorithm as participants of a capacity run it."""
        bound: Algorithm = of_capacity(self.algorithm, self.workload.layout, capacity)
        return bound


def require_devices(task: Task) -> None:
    """Raise a `ConfigError` if a mode names a device that this machine lacks.

    CUDA devices are only counted: once this process had used one, forked workers could not.
    """
    for capacity, mode in zip(task.capacities, task.modes, strict=True):
        device = torch.device(mode.device)
        try:
            if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
                raise RuntimeError(f"it has {torch.cuda.device_count()} CUDA devices")
            if device.type not in ("cpu", "cuda"):
                torch.zeros(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(
                f"engine.modes trains capacity {capacity} on device {mode.device!r}, which this machine does not have"
                f" ({one_line(error)[:120]}): use cpu, or engine ray on a cluster that has it"
            ) from None
