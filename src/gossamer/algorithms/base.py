"""What an algorithm is: pure functions over explicit state.

`Arrays` maps names to float32 tensors. State arrays have leading rows: [n, d] at n sites, [s, d] for s clients.
Participants of a smaller capacity see the same functions on rows cut to their window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from gossamer.submodel import Layout

Arrays = dict[str, Tensor]
Uplink = Literal["mean", "sum"]


class Algorithm(Protocol):
    """A training algorithm.

    Attributes:
        uplink: ``{payload name: "mean" (weighted, over the holders of a coordinate) | "sum"}``.
        downlink: names of the state arrays that a participant receives; None: the participant is the site.
        client_arrays: names of the arrays that `init_client` makes; () if clients keep nothing.

    A class may also have the attributes ``strategy``, ``capacities``, ``default_label_mask`` and ``default_scaler``,
    see `FedAvg`, and

    * ``scalars``: names among `uplink` of payloads that are one number a client: rows [s, 1] instead of [s, d]. They
      are weighted and added up like any other; a mean divides by the weight of all survivors, whatever they hold.
    * ``whole_models_only``: why the algorithm cannot train sub-models (a sentence's end, after "because"), or None.
    * ``no_offsets``: why windows cannot be moved by ``submodel.offsets`` (likewise), or None.
    * ``is_plain_sgd``: True if `step` is ``x - lr * grad`` and nothing else; then not every gradient need be made.
    * ``stackable``: False if participants must be trained one by one.
    * ``local_loss(task, capacity, params, batch, generator)``: the loss of a local step instead of the workload's own,
      see `FjORD`; needs ``stackable = False``. With ``leaves_products`` it may be given `Leaves` that are factored.
    * ``full_size``: True if everybody holds the whole model, whatever the capacity.
    * ``of_capacity(layout, capacity)``: the algorithm as participants of a capacity run it, where that differs.
    * ``forward(x, carry)``: what the loss is given instead of ``carry["x"]``, differentiable by x; coordinatewise, as
      `step` is.
    * ``evaluated(x)``: what a server's model [d] is evaluated as, where that is not itself. See `FIARSE` for these.
    * ``mean_passes(capacities, capacity)``: ``{width: expected passes a local step}``, by which FLOPs and memory are
      counted where a step is not one pass of the client's own width.
    """

    uplink: Mapping[str, Uplink]
    downlink: tuple[str, ...] | None
    client_arrays: tuple[str, ...]

    def init(self, x: Tensor) -> Arrays:
        """Return the state of n sites from the initial model x [n, d]."""
        ...

    def init_client(self, x: Tensor) -> Arrays:
        """Return the state of clients that never took part; x [s, d] gives the shape."""
        ...

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return what local steps work on; ``carry["x"]`` [s, d] is owned and may be changed in place."""
        ...

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One local step. Coordinatewise: it is called per parameter, on tensors of any one shape."""
        ...

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return (payload rows [s, d], [s, 1] of scalars; new client state) after the local steps; row-wise.

        The payload is overwritten later: it may be made from `carry`, but not be `state` or `client_state` itself.
        """
        ...

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the new state.

        Args:
            state: arrays [1, d]; they may be changed in place.
            inbox: the combined payload under the uplink's names, [1, d] each, [1, 1] of scalars; ``inbox["held"]`` is
                a bool mask [1, d] of the coordinates that some participant held, or None if all were.
            num_clients: registered clients.
        """
        ...


def of_capacity(algorithm: Any, layout: Layout, capacity: float) -> Any:
    """Return an algorithm as participants of a capacity run it; `layout` is that of the whole model."""
    bind = getattr(algorithm, "of_capacity", None)
    return algorithm if bind is None else bind(layout, capacity)


def given_to_loss(algorithm: Any, x: Mapping[str, Tensor], carries: Mapping[str, Arrays]) -> Mapping[str, Tensor]:
    """Return the parameters that a loss is given: x, unless the algorithm puts something in their place.

    Args:
        x: ``{parameter: tensor}``.
        carries: ``{parameter: {name: tensor}}``, what local steps work on.
    """
    forward = getattr(algorithm, "forward", None)
    return x if forward is None else {name: forward(value, carries[name]) for name, value in x.items()}


def takes_plain_steps(algorithm: Any, step: Any) -> bool:
    """Say whether an algorithm's steps are those of the function `step`, without momentum and weight decay."""
    return type(algorithm).step is step and not algorithm.momentum and not algorithm.weight_decay


def scalars_of(algorithm: Any) -> tuple[str, ...]:
    """Return the names of the payloads of an algorithm, or of its class, that are one number a client."""
    names: tuple[str, ...] = getattr(algorithm, "scalars", ())
    return names
