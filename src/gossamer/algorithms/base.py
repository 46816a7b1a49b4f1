"""What an algorithm is: pure functions over explicit state.

`Arrays` maps names to float32 tensors. State arrays have leading rows: [n, d] at n sites, [s, d] for s clients.
Participants of a smaller capacity see the same functions on rows cut to their window.

A whole algorithm, for ``algorithm: {name: "toy:MajorityVote", size: 0.02}`` if it stands in a file ``toy.py``:

    >>> import torch
    >>> from gossamer.algorithms.base import Algorithm
    >>> from gossamer.algorithms.traits import AlgorithmTraits
    >>> class MajorityVote(Algorithm):
    ...     traits = AlgorithmTraits(uplink={"sign": "mean"})
    ...
    ...     def __init__(self, options, *, momentum=0.0, weight_decay=0.0):
    ...         self.size = options.get("size", 0.01)
    ...
    ...     def init(self, x):
    ...         return {"x": x}
    ...
    ...     def init_client(self, x):
    ...         return {}
    ...
    ...     def begin(self, state, client_state):
    ...         return {"x": state["x"].clone()}
    ...
    ...     def step(self, carry, grad, lr):
    ...         carry["x"].sub_(grad, alpha=lr)
    ...         return carry
    ...
    ...     def end(self, state, client_state, carry, steps, lr):
    ...         return {"sign": (carry["x"] - state["x"]).sign()}, {}
    ...
    ...     def update(self, state, inbox, num_clients):
    ...         return {"x": state["x"] + self.size * inbox["sign"].sign()}

A round of one client, by hand; and what becomes of a misspelt trait:

    >>> toy, state = MajorityVote({}), {"x": torch.zeros(1, 3)}
    >>> carry = toy.step(toy.begin(state, {}), torch.tensor([[4.0, -2.0, 0.0]]), lr=0.1)
    >>> payload, _ = toy.end(state, {}, carry, steps=1, lr=0.1)
    >>> toy.update(state, payload | {"held": None}, num_clients=1)["x"].tolist()[0]
    [-0.009999999776482582, 0.009999999776482582, 0.0]
    >>> AlgorithmTraits(stackabel=False)
    Traceback (most recent call last):
    gossamer.errors.ConfigError: AlgorithmTraits has no trait 'stackabel'; did you mean 'stackable'? (known: ...)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.optimizers import NUM_STEPS, SGD, Optimizer
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.submodel import Layout

if TYPE_CHECKING:
    from gossamer.topology import Topology

Arrays = dict[str, Tensor]
Draws = Callable[[str], np.random.Generator]
Steppers = Mapping[str, tuple["Algorithm", float]]


class Algorithm(Protocol):
    """A training algorithm, made as ``cls(options, momentum=..., weight_decay=...)``.

    To write one, derive it from this class, or from `FedAvg`: what is abstract must be written, the rest has defaults.

    A round is a phase, or several: in each the participants train (`begin`, `step`, `end`) and then exchange
    (`update`). Where there are several, `of_phase` returns the algorithm of each. All of them work on the state that
    `init` makes, and their traits say what is received and sent in that phase; what is kept or refused
    (``client_arrays``, ``capacities``, ``whole_models_only`` and the like) is read from the traits of the whole.

    Attributes:
        traits: what it can and cannot do. Those of the class are read when it is named; options may change some on an
            instance.
        optimizer: what takes its local steps; None: they are its own.
    """

    traits: AlgorithmTraits
    optimizer: Optimizer | None = None

    @abstractmethod
    def init(self, x: Tensor) -> Arrays:
        """Return the state of n sites from the initial model x [n, d]."""
        ...

    @abstractmethod
    def init_client(self, x: Tensor) -> Arrays:
        """Return the state of clients that never took part, in the width of the whole model; x [s, d] gives the shape.

        Arrays are [s, d], of which a participant is given what lies in its window of the round, or [s, 1] of scalars.
        """
        ...

    @abstractmethod
    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return what local steps work on; ``carry["x"]`` [s, d] is owned and may be changed in place."""
        ...

    @abstractmethod
    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One local step. Coordinatewise: it is called per parameter, on tensors [s, ...] of any one shape.

        Arrays of one number a participant are [s, 1].
        """
        ...

    @abstractmethod
    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return (payload rows [s, d], [s, 1] of scalars; new client state) after the local steps; row-wise.

        The payload is overwritten later: it may be made from `carry`, but not be `state` or `client_state` itself.
        """
        ...

    @abstractmethod
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the new state.

        Args:
            state: arrays [1, d]; they may be changed in place.
            inbox: the combined payload under the uplink's names, [1, d] each, [1, 1] of scalars; ``inbox["held"]`` is
                a bool mask [1, d] of the coordinates that some participant held, or None if all were. Where the uplink
                says "rows", all of them instead, [p, d], with 0 where a participant holds nothing, in an order that
                follows from the plan; ``inbox["weights"]`` [p] has their weights, which they are not multiplied by.
                Where traits say `scores_models`, ``inbox["metrics"]`` returns the metrics of a model [d].
            num_clients: registered clients.
        """
        ...

    def of_phase(self, phase: int) -> Algorithm:
        """Return the algorithm as it is in a phase of a round, counted from 0, where traits say `num_phases`."""
        return self

    def of_model(self, layout: Layout) -> Algorithm:
        """Return the algorithm for a model of this layout; called once, before anything else.

        Raises:
            ConfigError: it is not for such models.
        """
        return self

    def sent(self, names: Sequence[str]) -> Collection[str]:
        """Return which of the model's parameters travel, of the payloads that have its shape; by default all."""
        return names

    def received(self, names: Sequence[str]) -> Collection[str]:
        """Return which of the model's parameters are received, of the downlink's arrays; by default what is `sent`."""
        return self.sent(names)

    def of_workload(self, workload: Any) -> Algorithm:
        """Return the algorithm, which is `of_model`, for a workload of that model; or raise a ConfigError."""
        return self

    def represent(self, params: Arrays, before: Arrays, steppers: Steppers, lr: float, generator: Draws) -> None:
        """Change, in place, what one client has after its local steps, before it sends anything.

        Traits must say `represents`; see `gossamer.algorithms.creamfl.CreamFL`.

        Args:
            params: ``{name: tensor}`` of its (sub-)model.
            before: what it began with: what it had itself, and what it received.
            steppers: ``{name: (who takes the steps of a parameter, factor of their learning rate)}``.
            lr, generator: learning rate of its local steps; random numbers of client and round for a named purpose.
        """
        return

    def of_capacity(self, layout: Layout, capacity: float) -> Algorithm:
        """Return the algorithm as participants of a capacity run it; `layout` is that of the whole model."""
        return self

    @property
    def takes_optimizer(self) -> bool:
        """Whether `step` is that of an `Optimizer`, see `with_optimizer`."""
        return False

    def with_optimizer(self, optimizer: Optimizer, keeps_moments: bool) -> Algorithm:
        """Return the algorithm with an optimizer of its local steps, where it `takes_optimizer`.

        Args:
            keeps_moments: whether participants keep the optimizer's moments from round to round.
        """
        return self

    def of_parameter(self, name: str, shape: tuple[int, ...], weight_decay: float | None = None) -> Algorithm:
        """Return the algorithm that takes the steps of one parameter of a (sub-)model, where it `takes_optimizer`.

        Args:
            weight_decay: that of the parameter; None: that of its optimizer.
        """
        return self

    @property
    def is_plain_sgd(self) -> bool:
        """Whether `step` is ``x - lr * grad`` and nothing else; then not every gradient need be made."""
        return False

    @property
    def averages(self) -> bool:
        """Whether rounds leave means (of peers, mixtures by W) of what was trained, so that x may hold buffers, too."""
        return False

    def forward(self, x: Tensor, carry: Mapping[str, Tensor]) -> Tensor:
        """Return what the loss is given instead of x, differentiable by it; coordinatewise, as `step` is.

        Traits must say `transforms_parameters`.
        """
        return x

    def local_loss(
        self,
        task: Any,
        capacity: float,
        params: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        generator: Draws,
    ) -> Tensor:
        """Return the loss (scalar) of one local step of one client; by default the workload's.

        Traits must say `has_local_loss`; see `gossamer.algorithms.fjord.FjORD` for an example.

        Args:
            task: the run, see `gossamer.algorithms.fjord.Setting`.
            capacity: the client's.
            params: ``{name: tensor}`` of its sub-model.
            batch: the step's batch, see `gossamer.workloads.base.Workload.loss`.
            generator: returns the random numbers of this very step for a named purpose.
        """
        loss: Tensor = task.workload.loss(params, batch)
        return loss

    def mean_passes(self, capacities: Sequence[float], capacity: float) -> dict[float, float]:
        """Return the expected passes of a local step by the width that they go through: one, of the client's own.

        FLOPs and memory are counted by it.

        Args:
            capacities: all capacity levels of the run.
            capacity: the client's, one of them.
        """
        return {capacity: 1.0}

    def evaluated(self, x: Tensor) -> Tensor:
        """Return what the server's model [d] is evaluated as."""
        return x

    def check(self, topology: Topology) -> list[str]:
        """Return warnings about the topology of peers, one sentence each.

        Raises:
            ConfigError: theory excludes the topology.
        """
        return []


class BaseAlgorithm(Algorithm):
    """What `FedAvg` and the methods of peers share: options, and local steps of an optimizer, SGD by default.

    What an algorithm of your own adds to the gradient belongs into `gradient`, so that any optimizer goes with it; with
    a `step` of its own none does. `begin` is to return `moments` besides, and `end` what is `private`, or `kept`.

    Attributes:
        optimizer: see `Optimizer`.
        momentum, weight_decay: those of the optimizer; momentum of SGD only.
        keeps_moments: whether participants keep the optimizer's moments from round to round.
    """

    class Options(Options):
        """No options."""

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.options: Any = parse_options(type(self).Options, options, "algorithm")
        require_no_momentum(type(self).__name__, self.traits, momentum)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.optimizer: Optimizer = SGD({"momentum": momentum})
        self.keeps_moments = self.traits.downlink is None

    def init_client(self, x: Tensor) -> Arrays:
        """Return what newcomers keep: nothing but moments of the optimizer, if these are kept."""
        return self.optimizer.init(x) if self.keeps_moments and self.traits.downlink is not None else {}

    @property
    def takes_optimizer(self) -> bool:
        """Whether the step of this class is the algorithm's."""
        return type(self).step is BaseAlgorithm.step

    def with_optimizer(self, optimizer: Optimizer, keeps_moments: bool) -> Self:
        """Return a copy with another optimizer, whose weight decay `weight_decay` is."""
        bound = copy.copy(self)
        bound.optimizer, bound.keeps_moments, bound.weight_decay = optimizer, keeps_moments, optimizer.weight_decay
        if not keeps_moments:
            return bound
        counts = (NUM_STEPS,) if optimizer.traits.counts_steps else ()
        kept = () if self.traits.downlink is None else (*optimizer.traits.moments, *counts)
        bound.traits = replace(
            self.traits,
            scalars=(*self.traits.scalars, *counts),
            client_arrays=(*self.traits.client_arrays, *kept),
        )
        return bound

    def of_parameter(self, name: str, shape: tuple[int, ...], weight_decay: float | None = None) -> Self:
        """Return a copy with the optimizer of a parameter; itself where that is the same."""
        optimizer = self.optimizer.of_parameter(name, shape)
        if weight_decay is None:
            weight_decay = self.weight_decay if optimizer is self.optimizer else optimizer.weight_decay
        if optimizer is self.optimizer and weight_decay == self.weight_decay:
            return self
        bound = copy.copy(self)
        bound.optimizer, bound.weight_decay = optimizer, weight_decay
        return bound

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is that of SGD without momentum and weight decay, by the gradient of x itself."""
        is_own = self.takes_optimizer and not self.changes_gradients and not self.traits.transforms_parameters
        return is_own and not self.weight_decay and isinstance(self.optimizer, SGD) and self.optimizer.is_plain

    @property
    def changes_gradients(self) -> bool:
        """Whether `gradient` does anything."""
        return type(self).gradient is not BaseAlgorithm.gradient

    def moments(self, x: Tensor, kept: Mapping[str, Tensor]) -> Arrays:
        """Return the moments that a round begins with: copies of those that are kept, otherwise new ones.

        Args:
            x: the models, [s, d].
            kept: state of peers, or private state of clients.
        """
        if not self.keeps_moments:
            return self.optimizer.init(x)
        return {name: kept[name].clone() for name in self.moment_names}

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Names of all that the optimizer remembers."""
        traits = self.optimizer.traits
        return (*traits.moments, *((NUM_STEPS,) if traits.counts_steps else ()))

    def private(self, carry: Mapping[str, Tensor]) -> Arrays:
        """Return what a client keeps of its moments after a round."""
        return {name: carry[name] for name in self.moment_names} if self.keeps_moments else {}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step of the optimizer along `gradient`."""
        grad, lr = self.gradient(carry, grad), lr * self.optimizer.lr_factor
        if self.weight_decay and self.optimizer.traits.decouples_weight_decay:
            self.shrink_(carry, lr * self.weight_decay)
        else:
            grad = self.decayed(carry, grad)
        self.optimizer.step(carry["x"], grad, carry, lr)
        return carry

    def gradient(self, carry: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        """Return what the optimizer takes for the gradient at ``carry["x"]``, weight decay aside; coordinatewise."""
        return grad

    def decayed(self, carry: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        """Return the gradient with weight decay."""
        return grad.add(carry["x"], alpha=self.weight_decay) if self.weight_decay else grad

    def shrink_(self, carry: Mapping[str, Tensor], share: float) -> None:
        """Take a share of the weights away, which is decoupled weight decay."""
        carry["x"].mul_(1 - share)


def where_held(held: Tensor | None, new: Arrays, old: Mapping[str, Tensor]) -> Arrays:
    """Return new arrays that keep their old bits (adding 0 would turn -0.0 into 0.0) where nobody held the coordinate.

    Args:
        held: see `Algorithm.update`.
    """
    return new if held is None else {name: torch.where(held, value, old[name]) for name, value in new.items()}


def require_no_momentum(plugin: str, traits: AlgorithmTraits, momentum: float) -> None:
    """Refuse momentum where the traits give a reason; `plugin` is what the error calls the algorithm.

    Raises:
        ConfigError: there is a reason, and momentum is not 0.
    """
    if momentum and traits.no_momentum is not None:
        raise ConfigError(
            f"{plugin} does not go with train.momentum = {momentum!r}, because {traits.no_momentum}: set train.momentum"
            " to 0"
        )
