"""Algorithms whose rounds have two phases: first gradients at a common model, then local steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.algorithms.federated import FedAvg, FedRolex


class Gradients:
    """What a phase of gradients has in common: local steps that stay where they are, and the mean of the gradients."""

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone(), "sum": torch.zeros_like(state["x"])}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["sum"].add_(grad)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        mean = carry["sum"] / max(steps, 1)
        return {"gradient": mean}, {name: mean.clone() for name in client_state}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        held = inbox["held"]
        return {"gradient": inbox["gradient"] if held is None else inbox["gradient"].where(held, state["gradient"])}


class FedLin(FedAvg):
    """FedLin (Mitra et al., arXiv 2102.07053), with mean gradients of as many batches as there are local steps.

    In phase 0 the participants send, and keep, their gradient at the server's model; in phase 1 a local step goes along
    ``gradient - own gradient there + mean of all gradients there``.
    """

    traits = replace(FedAvg.traits, num_phases=2, client_arrays=("gradient",))
    phases: ClassVar[tuple[str, str]] = ("LinGradients", "LinSteps")

    def init(self, x: Tensor) -> Arrays:
        return {"x": x, "gradient": torch.zeros_like(x)}

    def init_client(self, x: Tensor) -> Arrays:
        return {"gradient": torch.zeros_like(x)} if self.traits.client_arrays else {}

    def of_phase(self, phase: int) -> FedLin:
        found: type[FedLin] = globals()[self.phases[phase]]
        return found(self.options.model_dump(), weight_decay=self.weight_decay)


class LinGradients(Gradients, FedLin):
    """Phase 0."""

    traits = replace(FedLin.traits, num_phases=1, uplink={"gradient": "mean"})


class LinSteps(FedLin):
    """Phase 1."""

    traits = replace(FedLin.traits, num_phases=1, downlink=("x", "gradient"))

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone(), "correction": state["gradient"] - client_state["gradient"]}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["x"].sub_(grad + carry["correction"], alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        return {"x": carry["x"] - state["x"]}, {"gradient": client_state["gradient"].clone()}


class MimeLite(FedLin):
    """Local steps along the mean of a client's own gradient and that of all at the server's model, on sub-models."""

    traits = replace(FedRolex.traits, num_phases=2)
    phases = ("MimeGradients", "MimeSteps")


class MimeGradients(Gradients, MimeLite):
    """Phase 0."""

    traits = replace(MimeLite.traits, num_phases=1, uplink={"gradient": "mean"})


class MimeSteps(MimeLite):
    """Phase 1."""

    traits = replace(MimeLite.traits, num_phases=1, downlink=("x", "gradient"))

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone(), "gradient": state["gradient"].clone()}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["x"].sub_(grad + carry["gradient"], alpha=lr / 2)
        return carry


class TwoGossips(PeerSGD):
    """Peers that first mix their gradients, then go along them and mix their models."""

    traits = replace(PeerSGD.traits, num_phases=2)

    def init(self, x: Tensor) -> Arrays:
        return {"x": x, "gradient": torch.zeros_like(x)}

    def of_phase(self, phase: int) -> TwoGossips:
        return (PeerGradients, PeerSteps)[phase]({}, weight_decay=self.weight_decay)


class PeerGradients(Gradients, TwoGossips):
    """Phase 0."""

    traits = replace(TwoGossips.traits, num_phases=1, uplink={"gradient": "mean"})
    update = PeerSGD.update


class PeerSteps(TwoGossips):
    """Phase 1."""

    traits = replace(TwoGossips.traits, num_phases=1)

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone(), "gradient": state["gradient"].clone()}

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["x"].sub_(carry["gradient"], alpha=lr)
        return carry
