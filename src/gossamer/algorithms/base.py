"""What an algorithm is: pure functions over explicit state.

`Arrays` maps names to float32 tensors. State arrays have leading rows: [n, d] at n sites, [s, d] for s clients.
Participants of a smaller capacity see the same functions on rows cut to their window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

Arrays = dict[str, Tensor]
Uplink = Literal["mean", "sum"]


class Algorithm(Protocol):
    """A training algorithm.

    Attributes:
        uplink: ``{payload name: "mean" (weighted, over the holders of a coordinate) | "sum"}``.
        downlink: names of the state arrays that a participant receives; None: the participant is the site.
        client_arrays: names of the arrays that `init_client` makes; () if clients keep nothing.

    A class may also have the attributes ``strategy``, ``capacities`` and ``default_label_mask``, see `FedAvg`.
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
        """Return (payload rows [s, d], new client state) after the local steps; row-wise.

        The payload is overwritten later: it may be made from `carry`, but not be `state` or `client_state` itself.
        """
        ...

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the new state.

        Args:
            state: arrays [1, d]; they may be changed in place.
            inbox: the combined payload under the uplink's names, [d] each; ``inbox["held"]`` is a bool mask [d] of the
                coordinates that some participant held, or None if all were.
            num_clients: registered clients.
        """
        ...
