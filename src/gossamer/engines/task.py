"""What an engine trains: the task, and the variants of the model that its participants hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Self

import torch
from pydantic import AfterValidator
from torch import Tensor

from gossamer.aggregate.codec_base import BaseCodec, Communication
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.engines.local_steps import LocalSteps, Stepper
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.submodel import Cut, Cutter, Layout
from gossamer.topology import Topology
from gossamer.workloads.base import Workload
from gossamer.workloads.holdings import Holding

PERSONAL = "personal"
"""Name of the private array of personal parameters, in the width of the model: NaN where a client has none yet."""
AS_IT_IS = Communication()
KNOWN = "known."  # before the name of a server's array: what all clients know of it


def checked_device(value: str) -> str:
    """Return the name of a device.

    Raises:
        ValueError: it is none of torch's.
    """
    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError("give a device as torch names it, such as cpu or cuda") from None
    return value


Device = Annotated[str, AfterValidator(checked_device)]


class VariantMode(Options):
    """How participants of one variant are trained. Resolved once, because each field changes bits.

    Attributes:
        stacked: all rows of a block in one batched computation (vmap), instead of one after another.
        channels_last: images in channels-last order.
        padding: short batches are padded and masked (stacked only).
        device: device of their gradients, as "cpu" or "cuda". Sums and evaluation stay on processors.
    """

    stacked: bool = False
    channels_last: bool = False
    padding: bool = False
    device: Device = "cpu"

    @property
    def is_on_gpu(self) -> bool:
        """Whether gradients are computed elsewhere than on a processor."""
        return torch.device(self.device).type != "cpu"


@dataclass(frozen=True)
class Variant:
    """What participants of one capacity and one set of modules hold, and how they are trained.

    Attributes:
        index: number among the task's variants; `WHOLE` for the whole model.
        capacity: share of the channels of each axis, in (0, 1].
        modules: names of the modules that it holds.
        layout: layout of its (sub-)model, the same in every round.
        working_layout: layout of rows while they are trained: `layout` in the mode's memory order.
        algorithm: algorithm of such participants.
        local_steps: how their local steps are taken.
        steppers: who takes those of each parameter.
        mode: mode of their training.
        shares_window: whether all of them have the same window in a round.
        uplink: ``{payload name: codec}`` of what the run compresses, bound to `layout`.
        downlink: codec of what they receive, likewise; None: it is not compressed.
        personal: names of the parameters that stay with the client.
        unsent: those, and what the algorithm does not send in this phase.
        unreceived: those, and what it does not receive.
        holding: which modules its participants hold; None: all.
        has_all_modules: whether these are all of them.
    """

    index: int
    capacity: float
    modules: tuple[str, ...]
    layout: Layout
    working_layout: Layout
    algorithm: Algorithm
    local_steps: LocalSteps
    steppers: Mapping[str, Stepper]
    mode: VariantMode
    shares_window: bool
    uplink: Mapping[str, BaseCodec] = field(default_factory=dict)
    downlink: BaseCodec | None = None
    personal: frozenset[str] = frozenset()
    unsent: frozenset[str] = frozenset()
    unreceived: frozenset[str] = frozenset()
    holding: Holding | None = None
    has_all_modules: bool = True

    @classmethod
    def bind(
        cls,
        index: int,
        capacity: float,
        algorithm: Algorithm,
        cutter: Cutter,
        local_steps: LocalSteps,
        mode: VariantMode,
        communication: Communication = AS_IT_IS,
        personal: frozenset[str] = frozenset(),
        holding: Holding | None = None,
    ) -> Self:
        """Return the variant of a capacity, and of the modules of `holding`, of the model that `cutter` cuts."""
        layout = cutter.sub_layout(capacity, None if holding is None else holding.modules)
        bound = algorithm.of_capacity(cutter.layout, capacity)
        unsent = personal | (frozenset(layout.names) - frozenset(bound.sent(layout.names)))
        shapes = tuple(shape for name, shape in zip(layout.names, layout.shapes, strict=True) if name not in unsent)
        up, down = (codec and codec.of_shapes(shapes) for codec in (communication.uplink, communication.downlink))
        return cls(
            index=index,
            capacity=capacity,
            modules=layout.modules,
            layout=layout,
            working_layout=layout.as_channels_last if mode.channels_last else layout,
            algorithm=bound,
            local_steps=local_steps,
            steppers=local_steps.steppers(bound, layout),
            mode=mode,
            shares_window=cutter.shares_window(capacity),
            uplink={} if up is None else dict.fromkeys(algorithm.traits.compressible, up),
            downlink=down,
            personal=personal,
            unsent=unsent,
            unreceived=personal | (frozenset(layout.names) - frozenset(bound.received(layout.names))),
            holding=holding,
            has_all_modules=layout.names == cutter.layout.names,
        )

    @property
    def name(self) -> str:
        """What it is called in messages: its capacity, and its modules where these differ."""
        return f"{self.capacity}" + ("" if self.holding is None else f" of {self.holding.name}")

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole model."""
        return self.capacity == 1.0 and self.has_all_modules

    @property
    def held_modules(self) -> frozenset[str] | None:
        """The modules that are held; None: all."""
        return None if self.holding is None else self.holding.modules

    @cached_property
    def unsent_mask(self) -> Tensor:
        """The coordinates that are not sent, bool [d_sub]."""
        return self.layout.mask(self.unsent)

    @cached_property
    def personal_mask(self) -> Tensor:
        """The personal coordinates, bool [d_sub]."""
        return self.layout.mask(self.personal)

    @cached_property
    def sent_coordinates(self) -> slice | Tensor:
        """Where what is sent lies in a row, without padding: all of it, or int64 [num_sent]."""
        return self._coordinates(self.unsent)

    @cached_property
    def received_coordinates(self) -> slice | Tensor:
        """Where what is received lies in a row, without padding: all of it, or int64 [num_received]."""
        return self._coordinates(self.unreceived)

    def _coordinates(self, left_out: frozenset[str]) -> slice | Tensor:
        """Return where all lies but the parameters of some names."""
        real = self.layout.coordinates
        if not left_out:
            return real
        every = torch.arange(self.layout.d)[real]
        return every[~self.layout.mask(left_out)[every]]

    @property
    def depends_on_length(self) -> bool:
        """Whether what a local step does depends on how many of them there are."""
        return self.local_steps.schedule.depends_on_length or self.takes_turns

    @cached_property
    def takes_turns(self) -> bool:
        """Whether personal parameters are trained first, and then the others."""
        return self.algorithm.traits.personal_first > 0

    def is_trained(self, name: str, step: int, num_steps: int) -> bool:
        """Whether a local step, counted from 0, of several trains a parameter, where these take turns."""
        share = self.algorithm.traits.personal_first
        return (step < math.floor(share * num_steps)) == (name in self.personal)

    @property
    def num_sent(self) -> int:
        """Number of parameters that are sent."""
        sent = self.sent_coordinates
        return self.layout.num_parameters if isinstance(sent, slice) else len(sent)

    @property
    def num_received(self) -> int:
        """Number of parameters that are received."""
        every = zip(self.layout.names, self.layout.shapes, strict=True)
        return sum(math.prod(shape) for name, shape in every if name not in self.unreceived)


WHOLE = -1  # index of the whole model among the variants


@dataclass(frozen=True)
class Task:
    """What trains a block, on any engine: the same on every worker.

    Where a round has several phases, `phases` has what trains in each.

    Attributes:
        algorithm: algorithm of the server, or of a peer with the whole model.
        variants: variants that participants hold, by ascending capacity.
        batch_size: number of samples of a step.
        scaler: whether a sub-model's activations are multiplied by 1 / capacity while training.
        count_labels: whether label rows are averaged over the clients that own the label only.
        topology: topology by which peers mix; None: there is a server.
        max_update_norm_ratio: see `gossamer.config.schema.AggregationOptions`.
        communication: codecs between clients and their server.
        phase: number of the phase whose task it is, see `phases`.
        personal: names of the parameters that stay with the clients.
    """

    workload: Workload
    algorithm: Algorithm
    cutter: Cutter
    variants: tuple[Variant, ...]
    batch_size: int
    seed: int
    scaler: bool
    count_labels: bool
    topology: Topology | None = None
    max_update_norm_ratio: float | None = None
    communication: Communication = AS_IT_IS
    phase: int = 0
    personal: frozenset[str] = frozenset()

    @property
    def capacities(self) -> tuple[float, ...]:
        """The capacity of each variant, ascending; several have the same one where modules differ."""
        return tuple(variant.capacity for variant in self.variants)

    @property
    def is_whole(self) -> bool:
        """Whether everybody holds the whole model."""
        return all(one.is_whole for one in self.variants)

    @property
    def levels(self) -> dict[float, int]:
        """``{capacity: number}`` of a variant that has all modules, see `variant`, of each capacity."""
        numbers = {capacity: WHOLE - 1 - level for level, capacity in enumerate(dict.fromkeys(self.capacities))}
        return numbers | {one.capacity: one.index for one in self.variants if one.has_all_modules}

    def variant(self, index: int) -> Variant:
        """Return a variant by its number.

        `WHOLE` is the whole model, and the numbers below it are all modules of each capacity, in ascending order; these
        need not be among `variants`.
        """
        if index >= 0:
            return self.variants[index]
        return Variant.bind(index, self.capacity(index), self.algorithm, self.cutter, LocalSteps(), VariantMode())

    def capacity(self, index: int) -> float:
        """Return the capacity of a variant by its number, see `variant`."""
        if index >= 0:
            return self.variants[index].capacity
        return 1.0 if index == WHOLE else list(self.levels)[WHOLE - 1 - index]

    def cut(self, variant: Variant, round: int, client: int = 0, order: Mapping[str, Tensor] | None = None) -> Cut:
        """Return the windows of a participant in a round, see `Cutter.cut`."""
        return self.cutter.cut(variant.capacity, round, client, order, variant.held_modules)

    def with_modes(self, modes: Sequence[VariantMode]) -> Task:
        """Return the same task, trained in other modes."""
        return self._bound(self.algorithm, modes)

    def with_personal(self, names: Iterable[str]) -> Task:
        """Return the same task, in which the parameters of these names stay with the clients."""
        modes = [one.mode for one in self.variants]
        return replace(self, personal=frozenset(names))._bound(self.algorithm, modes)

    @property
    def num_phases(self) -> int:
        """Phases of a round."""
        return self.algorithm.traits.num_phases

    @cached_property
    def client_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a client keeps from round to round."""
        own = (PERSONAL,) if self.personal else ()
        return (*self.algorithm.traits.client_arrays, *self.residuals.values(), *own)

    @cached_property
    def residuals(self) -> dict[str, str]:
        """``{payload name: name of the private array with what was not sent of it}``; {} without error feedback."""
        if not self.communication.error_feedback:
            return {}
        where = f"-{self.phase}" if self.phase else ""
        return {name: f"residual{where}-{name}" for name in self.algorithm.traits.compressible}

    @cached_property
    def scalars(self) -> frozenset[str]:
        """Names of payloads and private arrays that are one number a participant."""
        return frozenset(self.algorithm.traits.scalars)

    def is_summed(self, variant: int, name: str) -> bool:
        """Say whether a payload is added up within a variant; otherwise each row is kept."""
        return self.variants[variant].shares_window and self.algorithm.traits.uplink[name] != "rows"

    @property
    def stored_arrays(self) -> dict[str, int]:
        """``{name: floats of a row}`` of all private arrays, of whatever phase."""
        names = {name: None for phase in (self, *self.phases) for name in phase.client_arrays}
        return {name: 1 if name in self.scalars else self.cutter.layout.d for name in names}

    def initial_state(self, x: Tensor) -> Arrays:
        """Return the server's arrays [1, d] from the initial model x [d], and what clients know of them."""
        state = self.algorithm.init(x[None])
        if not self.communication.sends_changes:
            return state
        sent = {name: None for phase in self.phases for name in phase.algorithm.traits.downlink or ()}
        return state | {KNOWN + name: state[name].clone() for name in sent}

    def newcomers(self, x: Tensor) -> Arrays:
        """Return the private arrays of clients that never took part, see `Algorithm.init_client`."""
        own = {PERSONAL: torch.full_like(x, torch.nan)} if self.personal else {}
        return self.algorithm.init_client(x) | {name: torch.zeros_like(x) for name in self.residuals.values()} | own

    @property
    def is_stackable(self) -> bool:
        """Whether the algorithm lets participants be trained several at a time."""
        return all(phase.algorithm.traits.stackable for phase in self.phases)

    @property
    def phases(self) -> tuple[Task, ...]:
        """The task as each phase of a round has it: with that phase's algorithm; itself where there is one phase."""
        return (self,) if self.num_phases == 1 else self._phases

    @cached_property
    def _phases(self) -> tuple[Task, ...]:
        modes = [one.mode for one in self.variants]
        return tuple(
            replace(self._bound(self.algorithm.of_phase(phase), modes), phase=phase) for phase in range(self.num_phases)
        )

    def _bound(self, algorithm: Algorithm, modes: Sequence[VariantMode]) -> Task:
        variants = tuple(
            Variant.bind(
                one.index,
                one.capacity,
                algorithm,
                self.cutter,
                one.local_steps,
                mode,
                self.communication,
                self.personal,
                one.holding,
            )
            for one, mode in zip(self.variants, modes, strict=True)
        )
        return replace(self, algorithm=algorithm, variants=variants)


def require_devices(task: Task) -> None:
    """Raise a `ConfigError` if a mode names a device that this machine lacks.

    CUDA devices are only counted: once this process had used one, forked workers could not.
    """
    for variant in task.variants:
        device = torch.device(variant.mode.device)
        try:
            if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
                raise RuntimeError(f"it has {torch.cuda.device_count()} CUDA devices")
            if device.type not in ("cpu", "cuda"):
                torch.zeros(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(
                f"engine.modes trains capacity {variant.name} on device {variant.mode.device!r}, which this machine"
                f" does not have ({' '.join(str(error).split())[:120]}): use cpu, or engine ray where it is"
            ) from None
