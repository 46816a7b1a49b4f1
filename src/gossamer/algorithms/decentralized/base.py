"""What a decentralized algorithm is: pure functions over the state of peers, whose payloads a topology mixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.errors import ConfigError
from gossamer.topology import Mixing, Topology

MAX_PEERS = 2_000  # of whose mixing eigenvalues are computed


class PeerSGD(BaseAlgorithm):
    """A method of peers without a server; derive your own from this one: local steps, whose moments a peer keeps.

    In a round every peer calls `begin` on its rows of the state, `step` for each local step and `end`. The payloads are
    mixed by the round's W, and `update` makes the new state. ``state["x"]`` is always the model of each peer: where
    gradients are taken, and what is evaluated. Nothing is received, so `downlink` is None, and there is no client
    state.
    """

    traits = AlgorithmTraits(downlink=None)

    def init(self, x: Tensor) -> Arrays:
        """Return the models, and moments of the optimizer if these are kept."""
        return {"x": x} | (self.optimizer.init(x) if self.keeps_moments else {})

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return copies of the model and of moments, [s, d] each; of scalars, [s, 1]."""
        return {"x": state["x"].clone()} | self.moments(state["x"], state)

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return the models, to be mixed; moments, state arrays of the peer that local work changes.

        A payload that has the name of a state array takes that array's place, so `update` does not see the old one; a
        payload with a name of its own has a buffer of its own. With 0 steps, right after `begin`, the peer idles, but
        still mixes.
        """
        return {"x": carry["x"]}, self.kept(carry)

    def kept(self, carry: Arrays) -> Arrays:
        """Return what of the carry is no payload, without moments that end with the round."""
        dropped = {*self.traits.uplink, *(() if self.keeps_moments else self.moment_names)}
        return {name: value for name, value in carry.items() if name not in dropped}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the state arrays that change: what was mixed; what nobody near held stays as it is.

        Args:
            state: after `end`, [n, any slice of the coordinates]; scalars are [n, 1].
            inbox: the mixed payload under the uplink's names; ``inbox["sent"]``: each peer's own payload as it was
                sent, after the codec, not to be written to; ``inbox["lr"]``: the round's learning rate;
                ``inbox["held"]``: bool [n, slice] of the coordinates that the peer or a neighbour held, or None if all
                were; the others keep the state, which for payloads in the place of a state array is what was "sent".
            num_clients: number of peers.
        """
        return where_held(inbox["held"], {name: inbox[name] for name in self.traits.uplink}, inbox["sent"])

    def check(self, topology: Topology) -> list[str]:
        """Refuse column-stochastic and joint mixings; warn of row-stochastic ones."""
        self.refuse_joint(topology)
        kind = stochasticity(topology)
        if kind == "column":
            raise self.refusal(
                topology, "only its columns sum to 1, so that models shrink or grow", "take algorithm 'push-sum'"
            )
        if kind == "row":
            return [
                f"topology {topology.name!r} is row-stochastic only: the mean of the models drifts, so that peers may"
                " agree on a point that is not best for all of them; choose a doubly stochastic topology"
            ]
        return []

    def refuse_joint(self, topology: Topology) -> None:
        """Refuse mixings of two rows a peer.

        Raises:
            ConfigError: there is one.
        """
        if any(mixing.kind == "joint" for mixing in mixings(topology)):
            raise self.refusal(
                topology, "it mixes two rows of each peer, of which this method has one", "take algorithm 'dsgd-ceca'"
            )

    def require_doubly(self, topology: Topology, reason: str, remedy: str) -> None:
        """Refuse topologies whose mixings do not keep both means and constants.

        Raises:
            ConfigError: a mixing is row-stochastic, column-stochastic or joint.
        """
        self.refuse_joint(topology)
        kind = stochasticity(topology)
        if kind != "doubly":
            raise self.refusal(topology, f"it is {kind}-stochastic only, and {reason}", remedy)

    def require_fixed_symmetric(self, topology: Topology, reason: str, remedy: str) -> None:
        """Refuse all topologies but those of one symmetric W.

        Raises:
            ConfigError: mixings change, or are not symmetric and doubly stochastic.
        """
        self.require_doubly(topology, reason, remedy)
        if topology.schedule.cycle != 1:
            raise self.refusal(topology, f"its mixings change from round to round, and {reason}", remedy)
        if not topology.mixing(0).is_symmetric:
            raise self.refusal(topology, f"its mixing is not symmetric, and {reason}", remedy)

    def refusal(self, topology: Topology, reason: str, remedy: str) -> ConfigError:
        """Return the error that a topology is excluded."""
        return ConfigError(
            f"{type(self).__name__} does not go with topology {topology.name!r}, because {reason}: {remedy}"
        )


def mixings(topology: Topology) -> list[Mixing]:
    """Return the mixings of a cycle, or the first one where each round draws one of the same kind afresh."""
    return [topology.mixing(round) for round in range(topology.schedule.cycle or 1)]


def stochasticity(topology: Topology) -> Literal["doubly", "row", "column"]:
    """Return what all mixings are: "doubly" stochastic, or the weaker property of one of them."""
    return next((each.stochasticity for each in mixings(topology) if each.stochasticity != "doubly"), "doubly")


def min_real_part(topology: Topology) -> float | None:
    """Return the least real part of an eigenvalue of W, or None where it is too expensive or undefined."""
    if topology.n > MAX_PEERS:
        return None
    try:
        return topology.min_real_part(num_rounds=1)
    except ConfigError:
        return None
