"""DiLoCo: many local steps of any optimizer, then a step of Nesterov momentum along the mean change of the model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.federated import FedAvg
from gossamer.errors import ConfigError
from gossamer.submodel import Layout

T = TypeVar("T")


class DiLoCo(FedAvg):
    """DiLoCo (Douillard et al., arXiv 2311.08105, Algorithm 1): the mean change of the workers is an outer gradient::

        D = mean_k(theta_k - phi);  v <- mu v + D;  phi <- phi + outer_lr (D + mu v)

    A round is `train.steps` inner steps of each worker, H in the paper, which takes 500 of AdamW
    (``train.optimizer: {name: adamw, betas: [0.9, 0.95], state: keep}``). With momentum 0 and a rate of 1 it is FedAvg;
    without Nesterov's lookahead it is FedAvgM. Everything is coordinatewise, so sub-models of any strategy will do:
    coordinates that nobody held keep phi and v.
    """

    class Options(BaseAlgorithm.Options):
        """Options of DiLoCo; the defaults are the paper's.

        Attributes:
            outer_lr: step size of the outer optimizer.
            outer_momentum: its momentum, mu.
            nesterov: whether it looks ahead; otherwise phi moves by ``outer_lr v``.
        """

        outer_lr: float = Field(default=0.7, gt=0)
        outer_momentum: float = Field(default=0.9, ge=0, lt=1)
        nesterov: bool = True

    def init(self, x: Tensor) -> Arrays:
        """Return the model and the outer momentum, 0."""
        return {"x": x, "velocity": torch.zeros_like(x)}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the model by the outer optimizer; what nobody held keeps its bits."""
        outer, change = self.options, inbox["x"]
        velocity = state["velocity"] * outer.outer_momentum + change
        direction = change + outer.outer_momentum * velocity if outer.nesterov else velocity
        new = {"x": torch.add(state["x"], direction, alpha=outer.outer_lr), "velocity": velocity}
        return where_held(inbox["held"], new, state)


class StreamingDiLoCo(DiLoCo):
    """Streaming DiLoCo (Douillard et al., arXiv 2501.18512): a fragment of the model is exchanged at a time.

    A round has as many phases as there are fragments, each of `train.steps` inner steps, after which the phase's own
    fragment is sent and takes its outer step. When the next phase begins, workers take it over (the paper's alpha)::

        theta <- alpha theta_local + (1 - alpha) theta_global

    and go on with what they have of the others, which they keep; so all workers should take part in every round
    (``clients.per_round: <clients.num>``). Fragments are runs of whole parameters of about equal size. With
    ``communication.uplink: int4`` changes travel in 4 bits, as in the paper. Its delay between sending and taking over,
    which hides communication, is not there.
    """

    class Options(DiLoCo.Options):
        """Options of Streaming DiLoCo.

        Attributes:
            fragments: number of fragments.
            alpha: share of their own parameters that workers keep when a fragment comes back.
        """

        fragments: int = Field(default=4, ge=2)
        alpha: float = Field(default=0.5, ge=0, lt=1)

    options: StreamingDiLoCo.Options

    traits = replace(
        DiLoCo.traits,
        client_arrays=("local",),
        whole_models_only="a worker keeps its own parameters between the exchanges of their fragments",
    )

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        self.traits = replace(self.traits, num_phases=self.options.fragments)
        self._phase, self._fragments, self._masks = 0, list[list[str]](), list[Tensor]()

    def of_model(self, layout: Layout) -> Self:
        """Return a copy that has divided the model into fragments."""
        bound = copy.copy(self)
        sizes = [math.prod(shape) for shape in layout.shapes]
        bound._fragments = divided(layout.names, sizes, self.options.fragments)
        bound._masks = [layout.mask(names) for names in bound._fragments]
        return bound

    def of_phase(self, phase: int) -> Self:
        """Return a copy that exchanges the fragment of a phase."""
        bound = copy.copy(self)
        bound._phase, bound.traits = phase, replace(self.traits, num_phases=1)
        return bound

    def sent(self, names: Sequence[str]) -> Collection[str]:
        """Return the parameters of the phase's fragment."""
        return self._fragments[self._phase] if self.traits.num_phases == 1 else names

    def init_client(self, x: Tensor) -> Arrays:
        """Return what newcomers keep: NaN for parameters, which they have none of yet, and moments."""
        return {"local": torch.full_like(x, torch.nan)} | super().init_client(x)

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the worker's own model, into which the last fragment was taken over; and moments."""
        local = client_state["local"]
        arrived = self._masks[self._phase - 1].to(local.device)
        own = torch.where(arrived, self.taken_over(local, state["x"]), local)
        x = torch.where(local.isnan(), state["x"], own)
        return {"x": x} | self.moments(x, client_state)

    def taken_over(self, local: Tensor, shared: Tensor) -> Tensor:
        """Return what a worker goes on with of parameters that have come back."""
        return self.options.alpha * local + (1 - self.options.alpha) * shared

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return how far the worker is from the server's model; its own model, and moments that it keeps."""
        return {"x": carry["x"] - state["x"]}, {"local": carry["x"]} | self.private(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move the phase's fragment by the outer optimizer; the others keep their bits."""
        moved = super().update(state, {**inbox, "held": None}, num_clients)
        held, mask = inbox["held"], self._masks[self._phase]
        return where_held(mask if held is None else mask & held, moved, state)


def divided(parameters: Sequence[T], sizes: Sequence[int], count: int) -> list[list[T]]:
    """Divide the parameters of a model, in their order, into fragments of about equal size.

    Args:
        parameters: names of parameters, or themselves.
        sizes: numbers in each of them.
        count: number of fragments.

    Raises:
        ConfigError: there are fewer parameters than fragments.
    """
    if count > len(parameters):
        raise ConfigError(
            f"algorithm.fragments = {count}, but the model has {len(parameters)} parameters only: lower it"
        )
    totals, found, start = list(itertools.accumulate(sizes)), list[list[T]](), 0
    for number in range(1, count + 1):
        end, last = start + 1, len(sizes) - (count - number)  # one parameter at least for each fragment that is left
        while end < last and (number == count or totals[end] <= totals[-1] * number / count):
            end += 1
        found.append(list(parameters[start:end]))
        start = end
    return found
