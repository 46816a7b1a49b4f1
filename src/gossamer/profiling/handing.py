"""What it costs on this machine to hand a piece to a side-car, and to take its answer: measured by an echo."""

from __future__ import annotations

import time
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.profiling.offload import Costs, Offload, stage_named
from gossamer.profiling.sidecar import Message, SideCar

FREE = Costs(1.0, 1, 0.0, 0.0, 0.0, 0.0)  # of a device and a link that take no time
NUM_TRIALS = 40
ECHO_BYTES = 1 << 22
READY_SECONDS = 0.002  # after which an empty echo lies ready
COPYING = ("aggregate", "compress", "checkpoint")  # stages whose arrays are copied; the others' lie in shared memory


class Handing(NamedTuple):
    """Costs of an exchange with a side-car, each fixed and for a byte.

    Attributes:
        submit, submit_per_byte: seconds of the host for a piece.
        take, take_per_byte: likewise for an answer that lies ready.
        latency, per_byte: seconds from one process to the other, each way, besides those.
    """

    submit: float
    submit_per_byte: float
    take: float
    take_per_byte: float
    latency: float
    per_byte: float

    def applied(self, costs: Costs, kind: str) -> Costs:
        """Return the costs of a stage on an emulated device with these instead of what its profile says of the host.

        A link that is emulated is no quicker than the processes are.
        """
        copies = float(kind in COPYING)
        return costs._replace(
            submit=self.submit,
            submit_seconds_per_byte=self.submit_per_byte * copies,
            take=self.take,
            take_seconds_per_byte=self.take_per_byte * copies,
            link_latency=max(costs.link_latency, self.latency),
            link_seconds_per_byte=max(costs.link_seconds_per_byte, self.per_byte * copies),
        )


def measured_handing() -> Handing:
    """Measure a side-car that hands back what it gets, with pieces of no bytes and of some megabytes."""
    car = SideCar(Offload(stage_named("codec"), FREE), lambda: _echo)
    try:
        (submit, take, whole), (long_submit, long_take, long_whole) = (_exchanges(car, n) for n in (0, ECHO_BYTES))
    finally:
        car.close()
    per_byte = [
        max(0.0, long - short) / ECHO_BYTES
        for short, long in (
            (submit, long_submit),
            (take, long_take),
            (whole - submit - take, long_whole - long_submit - long_take),
        )
    ]
    return Handing(submit, per_byte[0], take, per_byte[1], max(0.0, whole - submit - take) / 2, per_byte[2] / 2)


def _exchanges(car: SideCar, num_bytes: int) -> tuple[float, float, float]:
    """Return the median seconds of handing over, of taking an answer that lies ready, and of a whole exchange."""
    arrays = [torch.zeros(num_bytes, dtype=torch.uint8)] if num_bytes else []
    submits, takes, wholes = list[float](), list[float](), list[float]()
    ready = READY_SECONDS + num_bytes * 1e-9
    for number in range(2 * NUM_TRIALS + 4):  # the first ones bring memory into being
        began = time.perf_counter()
        car.submit({}, arrays)
        submits.append(time.perf_counter() - began)
        if is_taken_later := number % 2 == 1:
            time.sleep(ready)
        taking = time.perf_counter()
        car.result()
        ended = time.perf_counter()
        (takes if is_taken_later else wholes).append(ended - (taking if is_taken_later else began))
    return median(submits[4:]), median(takes[2:]), median(wholes[2:])


def _echo(message: Message, arrays: list[Tensor]) -> tuple[Message, list[Tensor]]:
    return {}, arrays
