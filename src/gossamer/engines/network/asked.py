"""What a server may ask a client to train, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.network.packing import cut_rows, is_packed, received_width, unpacked_model
from gossamer.engines.task import Task
from gossamer.engines.training.job import Job
from gossamer.errors import PolicyError
from gossamer.transport import Message

MAX_TILE = 1 << 20
MAX_STEPS = (1 << 31) - 1
STATE, ORDER = "state.", "order."  # prefixes of the names of a model's arrays

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class AskedJob(BaseModel):
    """The job of one client, see `Job.message`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    round: NonNegativeInt
    phase: NonNegativeInt
    variant: NonNegativeInt
    first_tile: NonNegativeInt
    tile: Annotated[int, Field(ge=1, le=MAX_TILE)]
    client: Annotated[list[NonNegativeInt], Field(min_length=1, max_length=1)]
    weight: Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1, max_length=1)]
    steps: Annotated[list[Annotated[int, Field(ge=0, le=MAX_STEPS)]], Field(min_length=1, max_length=1)]
    lr: FiniteFloat
    max_norm: float | None


class AskedTraining(BaseModel):
    """The body of a request to train.

    Attributes:
        job: the job.
        model: number of the model that training starts from.
        kept: round and phase whose private state it starts from; (-1, -1): none.
        needed: round and phase before which no private state is needed any more; None: all is.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    job: AskedJob
    model: NonNegativeInt
    kept: Annotated[list[int], Field(min_length=2, max_length=2)]
    needed: Annotated[list[int], Field(min_length=2, max_length=2)] | None


def asked_job(task: Task, message: Message, own: Collection[int]) -> Job:
    """Return the job of a request to train.

    Args:
        task: the client's.
        message: the request.
        own: clients that this node is.

    Raises:
        PolicyError: it is malformed, or of another client, round, phase or variant than there is.
    """
    try:
        job = AskedTraining.model_validate(dict(message.body)).job
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise PolicyError(
            f"the server asks for training with {where} = {first['input']!r:.80} ({first['msg']}): it is not done"
        ) from None
    address, client = message.address, job.client[0]
    if client not in own or address.sender != client:
        raise PolicyError(f"the server asks client {client} to train, but this node is {sorted(own)[:20]}")
    if (job.round, job.phase) != (address.round, address.phase) or job.phase >= task.num_phases:
        raise PolicyError(
            f"the server asks for training in round {job.round + 1}, phase {job.phase + 1}, by a message of round"
            f" {address.round + 1}, phase {address.phase + 1} of {task.num_phases}: it is not done"
        )
    if job.variant >= len(task.variants):
        raise PolicyError(f"the server asks for variant {job.variant}, which the run has not: it is not trained")
    return Job.of_message(job.model_dump())


class Models:
    """What arrays a server may send to start from."""

    def __init__(self, task: Task) -> None:
        """Bind a task; of its state, names, dtypes and shapes are kept, and the values where not all are received."""
        x = task.workload.init(task.seed)
        self._task = task
        initial = task.initial_state(x)
        self._initial = initial if any(map(is_packed, task.variants)) else {}
        self._state = _specs(initial)
        self._order = _specs(task.cutter.order(x))

    def checked(self, job: Job, model: Message) -> tuple[Arrays, Arrays, bool]:
        """Return the state's rows, the order of channels, and whether the rows are cut to the window of the job.

        Raises:
            PolicyError: the arrays are not those of the task.
        """
        is_cut, groups = model.body.get("is_cut"), {STATE: Arrays(), ORDER: Arrays()}
        if type(is_cut) is not bool or set(model.body) != {"is_cut"}:
            raise PolicyError(f"the server sends a model with {dict(model.body)!r:.80} instead of is_cut: refused")
        for name, value in model.arrays.items():
            group = next((one for one in groups if name.startswith(one)), STATE)
            groups[group][name.removeprefix(group)] = value
        _check(groups[STATE], self._cut(job) if is_cut else self._state)
        _check(groups[ORDER], self._order)
        if is_cut and is_packed(self._task.variants[job.block.variant]):
            return self._completed(job, groups[STATE], groups[ORDER]), groups[ORDER], is_cut
        return groups[STATE], groups[ORDER], is_cut

    def _completed(self, job: Job, rows: Arrays, order: Arrays) -> Arrays:
        """Return what a client starts from, with what it did not receive as it was when the run began."""
        variant = self._task.variants[job.block.variant]
        cut = self._task.cut(variant, job.round, order=order)
        return unpacked_model(variant, rows, cut_rows(cut, {name: self._initial[name] for name in rows}))

    def _cut(self, job: Job) -> Specs:
        """Return what a client of the job's variant receives."""
        phase, d = self._task.phases[job.phase], self._task.cutter.layout.d
        names = phase.algorithm.traits.downlink or self._state
        width = received_width(phase.variants[job.block.variant])
        found = {name: self._state[name] for name in names}
        return {name: (dtype, (1, width if shape[-1] == d else shape[-1])) for name, (dtype, shape) in found.items()}


def _specs(arrays: Mapping[str, Tensor]) -> Specs:
    return {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()}


def _check(arrays: Mapping[str, Tensor], expected: Specs) -> None:
    """Check names, dtypes and shapes.

    Raises:
        PolicyError: they differ from those expected.
    """
    found = _specs(arrays)
    if different := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        name = different[0]
        sent, wanted = (
            "nothing" if name not in one else f"{one[name][0]} of shape {one[name][1]}" for one in (found, expected)
        )
        raise PolicyError(f"the server sends {sent} as {name[:80]!r} of a model, which has {wanted}: it is not trained")
