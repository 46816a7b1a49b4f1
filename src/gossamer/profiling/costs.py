"""What participants compute and send, counted rather than guessed, and the simulated time that this takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gossamer.algorithms.base import Algorithm
from gossamer.options import Options
from gossamer.records import RoundPlan
from gossamer.submodel import Cutter, Layout
from gossamer.threads import one_thread
from gossamer.workloads.base import Workload

BYTES_PER_FLOAT = 4


class DeviceOptions(Options):
    """The one device that all participants are assumed to be; the defaults are assumptions, not measurements."""

    flops_per_second: float = Field(default=1e10, gt=0)
    download_bytes_per_second: float = Field(default=2.5e6, gt=0)
    upload_bytes_per_second: float = Field(default=1.25e6, gt=0)


@dataclass(frozen=True)
class RoundCosts:
    """Totals of one round; seconds are those of the slowest participant."""

    bytes_up: int
    bytes_down: int
    client_flops: float
    simulated_seconds: float


class Costs:
    """Costs of participants by capacity."""

    def __init__(
        self,
        workload: Workload,
        algorithm: Algorithm,
        cutter: Cutter,
        capacities: tuple[float, ...],
        batch_size: int,
        device: DeviceOptions,
    ) -> None:
        self._device = device
        sizes = np.array([cutter.sub_layout(c).num_parameters * BYTES_PER_FLOAT for c in capacities], dtype=np.int64)
        self._bytes_up = sizes * len(algorithm.uplink)
        self._bytes_down = sizes * len(algorithm.downlink or ())
        layouts = [cutter.sub_layout(capacity) for capacity in capacities]
        self._flops = np.array([training_flops_per_sample(workload, layout, batch_size) for layout in layouts])

    def of_round(self, plan: RoundPlan, samples_trained: NDArray[np.int64]) -> RoundCosts:
        """Add up a plan's costs; samples_trained int64 [p] is what each participant's steps go through."""
        up, down = self._bytes_up[plan.variant], self._bytes_down[plan.variant]
        flops = self._flops[plan.variant] * samples_trained
        seconds = (
            down / self._device.download_bytes_per_second
            + flops / self._device.flops_per_second
            + up / self._device.upload_bytes_per_second
        )
        return RoundCosts(int(up.sum()), int(down.sum()), float(flops.sum()), float(seconds.max(initial=0.0)))


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and convolutions, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` does the same, but loads torch's compiler, which takes a second.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing here is compiled, so that the compiler is not loaded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def training_flops_per_sample(workload: Workload, layout: Layout, batch_size: int) -> float:
    """Count the matrix and convolution FLOPs of one training sample: forward and backward of one batch, divided.

    Args:
        layout: of the (sub-)model that is trained.
    """
    client = np.array([int(np.argmax(workload.num_samples))], dtype=np.int64)
    count = int(min(batch_size, workload.num_samples[client[0]]))
    batch = workload.batch(client, np.arange(count, dtype=np.int64)[None])
    merged = {key: value[0] for key, value in (batch.samples | batch.client).items() if key != "mask"}
    leaves = {name: view.requires_grad_() for name, view in layout.views(torch.zeros(layout.d)).items()}
    counter = FlopCounter()
    with one_thread(), counter:
        loss = workload.loss(leaves, merged | {"scale": 1.0})
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return float(counter.total) / count
