"""What a `DecentralizedOptimizer` does besides the local steps: the methods of the simulator, on one row each.

A round is some local steps, then one exchange. A method sees `begin` before the first step of a round, `adapt` for each
of them, and `combine` after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays, BaseAlgorithm
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.algorithms.decentralized.diffusion import ExactDiffusion
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.algorithms.diloco import DiLoCo, StreamingDiLoCo, divided
from gossamer.distributed.exchange import Mixed
from gossamer.distributed.flat import Bucket
from gossamer.distributed.neighbors import ALONE, of_mixing
from gossamer.distributed.operations import allreduce
from gossamer.distributed.world import World
from gossamer.errors import ConfigError
from gossamer.registry import resolve
from gossamer.topology import Topology

Mode = Literal["adapt-then-combine", "combine-while-adapt", "gradient-tracking", "exact-diffusion"]
ALGORITHMS: dict[str, Callable[[], PeerSGD]] = {
    "adapt-then-combine": lambda: DSGD({}),
    "combine-while-adapt": lambda: DSGD({"order": "combine-while-adapt"}),
    "gradient-tracking": lambda: DSGT({}),
    "exact-diffusion": lambda: ExactDiffusion({}),
}
Step = Callable[[], None]


class Network:
    """Exchanges of the rounds, one after another, over a topology, or among all."""

    def __init__(self, world: World, topology: Topology | None, wire: torch.dtype | None, lazy: bool) -> None:
        """Bind the group and the topology; None: exact means of all.

        Args:
            world, topology: the group, and its topology.
            wire: dtype of what travels between neighbours.
            lazy: whether (I + W) / 2 takes the place of W.
        """
        self._world, self._topology, self._wire, self._lazy = world, topology, wire, lazy

    @property
    def has_neighbors(self) -> bool:
        """Whether means are those of neighbours."""
        return self._topology is not None

    def start(self, rows: Sequence[Tensor], round: int) -> Mixed:
        """Send rows [1, width], not to be changed before they are mixed, and return what is under way."""
        near = ALONE
        if self._topology is not None:
            mixing = self._topology.mixing(round)
            near = of_mixing(mixing.lazy() if self._lazy else mixing, self._world.rank)
        return Mixed(self._world, rows, near, self._wire)

    def mix(self, rows: Sequence[Tensor], round: int) -> list[Tensor]:
        """Return the mixed rows."""
        return allreduce(list(rows)) if self._topology is None else self.start(rows, round).wait()


class Method(Protocol):
    """What happens around local steps.

    Attributes:
        buckets: the parameters.
        arrays: state of each bucket between steps.
    """

    buckets: Sequence[Bucket]
    arrays: list[Arrays]

    def begin(self, round: int) -> None:
        """Prepare a round, before the first of its local steps."""

    def adapt(self, step: Step) -> None:
        """Take a local step."""

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Exchange, and make the parameters of the next round."""


class Combining:
    """Adapt then combine: x <- W (x after local steps)."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets, self.arrays = buckets, [Arrays() for _ in buckets]

    def begin(self, round: int) -> None:
        """Do nothing."""

    def adapt(self, step: Step) -> None:
        """Take a local step."""
        step()

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Mix the parameters."""
        mixed = network.mix([bucket.gather() for bucket in self.buckets], round)
        for bucket, row in zip(self.buckets, mixed, strict=True):
            bucket.scatter_(row)


class Overlapping:
    """Combine while adapt: x <- W x + (change by local steps), where x travels during the first backward pass.

    A bucket's parameters leave once all of its gradients are there, and in the same order on all ranks.
    """

    def __init__(self, buckets: Sequence[Bucket], network: Network) -> None:
        self.buckets, self._network, self.arrays = buckets, network, [Arrays() for _ in buckets]
        self._round, self._missing = 0, list[set[Tensor]]()
        self._under_way: list[tuple[Mixed, Tensor]] | None = None
        for number, bucket in enumerate(buckets):
            for each in bucket.tensors:
                each.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            """Send what is complete once a gradient is there."""
            self._open()
            self._missing[number].discard(parameter)
            self._launch(forced=False)

        return arrived

    def _open(self) -> None:
        """Make ready for a round, unless it has begun."""
        if self._under_way is None:
            self._under_way, self._missing = [], [set(bucket.tensors) for bucket in self.buckets]

    def resume(self, round: int) -> None:
        """Go on after `arrays` were restored; what they hold was exchanged already."""
        self._round, self._under_way = round, [] if self._is_settled else None

    def _launch(self, forced: bool) -> None:
        """Send the buckets whose turn it is."""
        assert self._under_way is not None
        if self._is_settled:
            return
        while (next_one := len(self._under_way)) < len(self.buckets) and (forced or not self._missing[next_one]):
            row = self.buckets[next_one].gather().clone()
            self._under_way.append((self._network.start([row], self._round), row))

    @property
    def _is_settled(self) -> bool:
        """Whether all that the round's exchange adds is known already."""
        return "pull" in self.arrays[0]

    def begin(self, round: int) -> None:
        """Send what has not left yet, before parameters change."""
        self._open()
        self._launch(forced=True)

    def adapt(self, step: Step) -> None:
        """Take a local step."""
        step()

    def settle(self) -> None:
        """Wait for a whole exchange that is under way, and keep by how much it moves the parameters."""
        if self._under_way and len(self._under_way) == len(self.buckets):
            for arrays, (mixed, row) in zip(self.arrays, self._under_way, strict=True):
                arrays["pull"] = mixed.wait()[0] - row
            self._under_way = []

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Move the parameters by W x - x."""
        self.settle()
        for bucket, arrays in zip(self.buckets, self.arrays, strict=True):
            bucket.add_(arrays.pop("pull"))
        self._under_way, self._round = None, round + 1


class Tracking:
    """Gradient tracking: local steps along trackers in the place of gradients; both are mixed. See `DSGT`."""

    def __init__(self, buckets: Sequence[Bucket], algorithm: DSGT) -> None:
        self.buckets, self._algorithm = buckets, algorithm
        zeros = [torch.zeros_like(bucket.gather()) for bucket in buckets]
        self.arrays = [{"y": zero, "gradient": zero.clone()} for zero in zeros]

    def begin(self, round: int) -> None:
        """Do nothing."""

    def adapt(self, step: Step) -> None:
        """Correct the trackers, and take a local step along them."""
        for bucket, arrays in zip(self.buckets, self.arrays, strict=True):
            self._algorithm.track(arrays, bucket.gradients())
            bucket.set_gradients(arrays["y"])
        step()

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Mix parameters and trackers."""
        sent = [bucket.gather() for bucket in self.buckets]
        mixed = network.mix([*sent, *(arrays["y"] for arrays in self.arrays)], round)
        for bucket, arrays, x, y in zip(self.buckets, self.arrays, mixed[: len(sent)], mixed[len(sent) :], strict=True):
            bucket.scatter_(x)
            arrays["y"] = y


class Resident:
    """Any method whose local steps are those of an optimizer: its `end` and `update`, on a row for each bucket."""

    def __init__(self, buckets: Sequence[Bucket], algorithm: Algorithm, every: int, num_peers: int) -> None:
        self.buckets, self._algorithm, self._every, self._num_peers = buckets, algorithm, every, num_peers
        self.arrays = [algorithm.init(bucket.gather().clone()) for bucket in buckets]

    def begin(self, round: int) -> None:
        """Do nothing."""

    def adapt(self, step: Step) -> None:
        """Take a local step."""
        step()

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Mix what the method sends, and update its state and the parameters."""
        self._exchange(range(len(self.buckets)), network, round, lr)

    def _exchange(self, numbers: Sequence[int], network: Network, round: int, lr: float) -> None:
        """Do so for some of the buckets."""
        payloads = []
        for number in numbers:
            carry, arrays = {"x": self.buckets[number].gather().clone()}, self.arrays[number]
            payload, kept = self._algorithm.end(arrays, {}, carry, self._every, lr)
            arrays.update(kept)
            payloads.append(payload)
        (name,) = self._algorithm.traits.uplink
        mixed = network.mix([payload[name] for payload in payloads], round)
        for number, payload, row in zip(numbers, payloads, mixed, strict=True):
            arrays = self.arrays[number]
            inbox: dict[str, Any] = {name: row, "sent": payload, "held": None, "lr": lr}
            arrays.update(self._algorithm.update(arrays, inbox, self._num_peers))
            self.buckets[number].scatter_(self._taken(self.buckets[number], arrays["x"]))

    def _taken(self, bucket: Bucket, x: Tensor) -> Tensor:
        """Return the parameters of the next round."""
        return x


class Streaming(Resident):
    """Streaming DiLoCo: in turn, a fragment of the model takes DiLoCo's outer step and is merged into the parameters.

    The model of the outer optimizer is kept apart from the parameters, which a process has of its own.
    """

    def __init__(self, parameters: Sequence[Tensor], algorithm: StreamingDiLoCo, every: int, num_peers: int) -> None:
        sizes, count = [each.numel() for each in parameters], algorithm.options.fragments
        fragments = [Bucket.by_dtype(some) for some in divided(parameters, sizes, count)]
        outer = DiLoCo(algorithm.options.model_dump(exclude={"fragments", "alpha"}))
        super().__init__([bucket for some in fragments for bucket in some], outer, every, num_peers)
        self._streaming, numbers = algorithm, iter(range(len(self.buckets)))
        self._fragments = [[next(numbers) for _ in some] for some in fragments]

    def combine(self, network: Network, round: int, lr: float) -> None:
        """Exchange the fragment whose turn it is."""
        self._exchange(self._fragments[round % len(self._fragments)], network, round, lr)

    def _taken(self, bucket: Bucket, x: Tensor) -> Tensor:
        return self._streaming.taken_over(bucket.gather(), x)


def algorithm_of(mode: str, outer: Algorithm | str | Mapping[str, Any] | None) -> BaseAlgorithm:
    """Return the algorithm of a mode or of an outer optimizer.

    Raises:
        ConfigError: there is no such one, or it does more than an outer step.
    """
    if mode not in ALGORITHMS:
        raise ConfigError(f"mode = {mode!r} is none of {', '.join(ALGORITHMS)}: give one of them")
    if outer is None:
        return ALGORITHMS[mode]()
    if mode != "adapt-then-combine":
        raise ConfigError(f"outer takes its step after local ones, which excludes mode = {mode!r}: leave mode out")
    if isinstance(outer, str | Mapping):
        options = {"name": outer} if isinstance(outer, str) else dict(outer)
        outer = resolve("algorithm", str(options.pop("name", "")))(options)
    if not isinstance(outer, BaseAlgorithm):
        raise ConfigError(f"outer = {outer!r} is no algorithm: name one, such as 'gasloc', 'noloco' or 'diloco'")
    if isinstance(outer, StreamingDiLoCo):
        return outer
    traits, name = outer.traits, type(outer).__name__
    is_plain = outer.takes_optimizer and not (outer.changes_gradients or traits.transforms_parameters)
    is_server = traits.downlink is not None
    extra = traits.client_arrays or traits.scalars or traits.codecs or traits.num_phases > 1 or traits.merge_every
    is_average = len(traits.uplink) == 1 and "rows" not in traits.uplink.values()
    if not is_plain or extra or not is_average or (is_server and traits.downlink != ("x",)):
        raise ConfigError(
            f"outer = {name} does more than an outer step from averages: take one such as 'gasloc', 'noloco' or"
            " 'diloco', or run it by gossamer run"
        )
    return outer
