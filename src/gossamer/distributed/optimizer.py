"""An optimizer of torch whose steps are followed, or accompanied, by exchanges with neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Algorithm, BaseAlgorithm
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.algorithms.diloco import StreamingDiLoCo
from gossamer.distributed.agreement import agree, agree_on, described
from gossamer.distributed.flat import Bucket
from gossamer.distributed.methods import (
    Combining,
    Method,
    Mode,
    Network,
    Overlapping,
    Resident,
    Streaming,
    Tracking,
    algorithm_of,
)
from gossamer.distributed.operations import FLOATS, default_topology
from gossamer.distributed.world import World, current
from gossamer.errors import ConfigError, warn
from gossamer.topology import Topology

BUCKET_BYTES = 25 * 1024 * 1024  # as DistributedDataParallel has it
KEY = "decentralized"  # of what is no state of the wrapped optimizer


class DecentralizedOptimizer(torch.optim.Optimizer):
    """Any torch optimizer, and an exchange of the parameters with neighbours every few steps.

    With u a step of the optimizer, or `every` of them, W the mixing of the round, which is counted from 0::

        adapt-then-combine     x <- W (x + u)                       DSGD
        combine-while-adapt    x <- W x + u                         DSGD; W x is on its way during the backward pass
        gradient-tracking      x <- W (x + u(y)),  y <- W y         DSGT: u goes along y, corrected by each gradient
        exact-diffusion        x <- (I + W)/2 (psi + x - last psi)  psi = x + u; a fixed, symmetric W only

    With plain SGD inside they are the simulator's methods; any other optimizer takes the place of the gradient step.
    Its moments stay with the process. `outer` adds an outer optimizer to adapt-then-combine.

    Every rank constructs it at the same time, for parameters of the same shapes, and calls `step` as often as the
    others: a `torch.amp.GradScaler` that finds infinite gradients skips the local step, not the exchange.
    """

    _step_supports_amp_scaling = True  # so that a GradScaler calls `step` even if gradients are infinite

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        mode: Mode = "adapt-then-combine",
        every: int = 1,
        outer: Algorithm | str | Mapping[str, Any] | None = None,
        *,
        wire_dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        """Wrap an optimizer, all of whose parameter groups are there.

        Args:
            optimizer: a torch optimizer; its parameters that require no gradient are not exchanged.
            topology: a topology of as many peers as there are processes; None: a static exponential graph, or all
                processes where `outer` is a server's.
            mode: see the class.
            every: steps from one exchange to the next.
            outer: name of an outer optimizer, such as "gasloc", "noloco", "diloco" or "streaming-diloco", or its
                section of a configuration, ``{"name": "gasloc", "gamma": 0.5}``, or an algorithm of the
                simulator.
            wire_dtype: dtype of what travels between neighbours; None: that of the parameters.
            bucket_bytes: size of the messages of combine-while-adapt at most, but for larger parameters.
            buffers: what a forward pass keeps, such as ``model.buffers()`` with BatchNorm's running moments; those of
                floats are averaged after each exchange as the parameters are, those of integers are left alone.

        Raises:
            ConfigError: theory excludes the topology, an argument is out of range, or ranks disagree.
        """
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._optimizer, self._every, self._mode = optimizer, every, mode
        self._link()
        world, algorithm = current(), algorithm_of(mode, outer)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every = {every!r}: give a whole number from 1 on")
        if every > 1 and algorithm.traits.one_step_only:
            raise ConfigError(f"every = {every}, but {algorithm.traits.one_step_only}: leave it out")
        graph = _checked(world, algorithm, topology)
        parameters = [each for group in self.param_groups for each in group["params"] if each.requires_grad]
        self._steps = self._rounds = 0
        averaged = [each for each in buffers if each.dtype in FLOATS]
        self._identity = _compared(world, algorithm, graph, parameters, averaged, mode, every, wire_dtype)
        self._parameters, self._buffers = parameters, Bucket.by_dtype(averaged)
        self._network = Network(world, graph, wire_dtype, algorithm.traits.lazy)
        self._method = self._made(algorithm, world.size, bucket_bytes)

    def _made(self, algorithm: Algorithm, num_peers: int, bucket_bytes: int) -> Method:
        if isinstance(algorithm, DSGD) and algorithm.combines_first:
            late_first = self._parameters[::-1]  # about the order in which gradients arrive
            return Overlapping(Bucket.by_dtype(late_first, bucket_bytes), self._network)
        if isinstance(algorithm, StreamingDiLoCo):
            return Streaming(self._parameters, algorithm, self._every, num_peers)
        buckets = Bucket.by_dtype(self._parameters)
        if isinstance(algorithm, DSGT):
            return Tracking(buckets, algorithm)
        return Combining(buckets) if type(algorithm) is DSGD else Resident(buckets, algorithm, self._every, num_peers)

    def _link(self) -> None:
        """Share groups and state with the wrapped optimizer."""
        self.param_groups, self.state = self._optimizer.param_groups, self._optimizer.state

    @property
    def rounds(self) -> int:
        """Number of exchanges so far, which is the topology's round of the next one."""
        return self._rounds

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a local step and, after `every` of them, exchange.

        Args:
            closure: callback that computes gradients and returns the loss; called once.

        Returns:
            what the closure returns, or None.

        Raises:
            EngineError: a neighbour is gone, or did not answer in time.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_usable = self._unscale()
        with torch.no_grad():
            if self._steps == 0:
                self._method.begin(self._rounds)
            if is_usable:
                self._method.adapt(lambda: self._optimizer.step())
            self._steps += 1
            if self._steps == self._every:
                self._method.combine(self._network, self._rounds, float(self.param_groups[0]["lr"]))
                self._average_buffers()
                self._steps, self._rounds = 0, self._rounds + 1
        return loss

    def _average_buffers(self) -> None:
        if self._buffers:
            mixed = self._network.mix([bucket.gather() for bucket in self._buffers], self._rounds)
            for bucket, row in zip(self._buffers, mixed, strict=True):
                bucket.scatter_(row)

    def outer_parameters(self) -> list[Tensor]:
        """Return copies of the parameters, in their order, as the outer optimizer has them, the same on all ranks.

        With streaming-diloco these are the model that is trained; the parameters are partly this process's own.

        Raises:
            ConfigError: the outer optimizer is not one of all processes.
        """
        if self._network.has_neighbors or not isinstance(self._method, Resident):
            raise ConfigError("there is no model that all ranks share without outer = 'diloco' or 'streaming-diloco'")
        found = {
            id(each): value.clone()
            for bucket, arrays in zip(self._method.buckets, self._method.arrays, strict=True)
            for each, value in zip(bucket.tensors, bucket.views(arrays["x"]), strict=True)
        }
        return [found[id(each)] for each in self._parameters]

    def _unscale(self) -> bool:
        """Undo the scale of a `GradScaler`, which sets two attributes for this call; returns whether to take a step."""
        scale, infinite = vars(self).get("grad_scale"), vars(self).get("found_inf")
        if scale is not None:
            for each in self._parameters:
                if each.grad is not None:
                    each.grad.div_(scale)
        return infinite is None or not bool(infinite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the wrapped optimizer's are taken over; refuse it later.

        Raises:
            ConfigError: it is later.
        """
        if "_optimizer" in vars(self):
            raise ConfigError("parameter groups are fixed once an optimizer is wrapped: add them before")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer and, under "decentralized", of the exchanges of this rank.

        With combine-while-adapt it waits for neighbours within a round, so all ranks take it after the same step.
        """
        if isinstance(self._method, Overlapping):
            self._method.settle()
        arrays = [{name: value.clone() for name, value in each.items()} for each in self._method.arrays]
        mine = {"identity": self._identity, "steps": self._steps, "rounds": self._rounds, "arrays": arrays}
        return {**self._optimizer.state_dict(), KEY: mine}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned on this rank; the parameters are to be restored besides.

        Raises:
            ConfigError: it is that of another mode, topology or model.
        """
        state = dict(state_dict)
        mine = state.pop(KEY, None)
        if mine is None:
            raise ConfigError(
                f"a state without {KEY!r} is none of a DecentralizedOptimizer: load it into the inner one"
            )
        if mine["identity"] != self._identity:
            raise ConfigError(
                f"the state is that of {mine['identity'][:200]}, and this is {self._identity[:200]}: construct the same"
            )
        self._optimizer.load_state_dict(state)
        self._link()
        self._steps, self._rounds = int(mine["steps"]), int(mine["rounds"])
        for arrays, theirs, bucket in zip(self._method.arrays, mine["arrays"], self._method.buckets, strict=True):
            arrays.clear()
            arrays.update({name: value.to(bucket.tensors[0].device, copy=True) for name, value in theirs.items()})
        if isinstance(self._method, Overlapping):
            self._method.resume(self._rounds)


def _checked(world: World, algorithm: Algorithm, topology: Topology | None) -> Topology | None:
    """Return the topology that an algorithm goes with; None: it averages over all."""
    if not isinstance(algorithm, PeerSGD):
        if topology is not None and topology.name != "complete":
            raise ConfigError(
                f"outer = {type(algorithm).__name__} averages over all processes, not over {topology.name!r}: leave"
                " topology out, or take outer = 'gasloc' or 'noloco'"
            )
        return None
    graph = topology or default_topology(world)
    if graph is not None:
        warn(algorithm.check(graph))
    return graph


def _compared(
    world: World,
    algorithm: BaseAlgorithm,
    topology: Topology | None,
    parameters: list[Tensor],
    buffers: list[Tensor],
    mode: str,
    every: int,
    wire: torch.dtype | None,
) -> str:
    """Return what an optimizer is, in a few words, once all ranks have the same.

    Raises:
        ConfigError: they have not, or there is nothing to train.
    """
    if not parameters or any(each.dtype not in FLOATS for each in parameters):
        raise ConfigError("an optimizer needs parameters that require gradients, and are of floats: give some")
    if topology is not None:
        agree_on(world, topology, [*parameters, *buffers], wire)
    name = type(algorithm).__name__
    options = algorithm.options.model_dump(mode="json")
    if wire is not None and not isinstance(algorithm, PeerSGD):
        raise ConfigError(f"wire_dtype = {wire} is for messages to neighbours, but {name} has none: leave it out")
    graph = "all processes" if topology is None else described(topology)
    said = f"{mode} by {name}{options or ''} every {every} over {graph}"
    agree(world, said, "give every rank's optimizer the same arguments", again=True)
    if not isinstance(algorithm, PeerSGD):
        remedy = "call gossamer.distributed.broadcast([*model.parameters()]) before"
        agree(world, f"initial parameters [{_digest(parameters)}]", remedy, again=True)
    return said


def _digest(tensors: list[Tensor]) -> str:
    """Return a digest of the tensors' numbers, which are copied to the processor."""
    values = hashlib.blake2b(digest_size=6)
    for each in tensors:
        values.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return values.hexdigest()
