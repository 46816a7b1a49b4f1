"""Federated algorithms by hand in float64, one client and one step at a time, and federations with a known optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.aggregate import Part, combine
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.build import Parts
from gossamer.planning.schedule import learning_rate
from gossamer.submodel import Layout, cut_of, extract
from gossamer.submodel.windows import Window
from slow import AXES, initial_model, perceptron, sample_order, training_samples

Params = dict[str, Tensor]
Gradient = Callable[[Params], Params]
Local = Callable[[int, Params, Sequence[Gradient], float], Params]

# Very unequal clients: from 4 to 22 local steps.
UNEQUAL: dict[str, Any] = {
    "clients.partition": {"name": "dirichlet", "alpha": 0.3},
    "clients.per_round": 6,
    "train.batch_size": 4,
    "train.epochs": 2,
}


def add(*terms: tuple[float, Params]) -> Params:
    """Return a weighted sum of models."""
    return {name: sum(weight * params[name] for weight, params in terms) + 0.0 for name in terms[0][1]}


class Sent(NamedTuple):
    """What one participant of a round returned; `where` indexes the whole model's parameters."""

    client: int
    weight: float
    steps: int
    where: dict[str, Any]
    change: Params


def gradients_of(parts: Parts, round: int, client: int, scale: float, phase: int = 0) -> list[Gradient]:
    """Return one function from a model to the gradient of its loss for each local step of a client."""

    def gradient(params: Params, batch: list[int]) -> Params:
        """Return the gradient on a batch."""
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        images, labels = training_samples(parts, batch)
        loss = F.cross_entropy(perceptron(leaves, images.double(), scale), labels)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    return [lambda params, batch=batch: gradient(params, batch) for batch in sample_order(parts, round, client, phase)]


def window_of(parts: Parts, round: int, client: int, capacity: float, model: Params) -> dict[str, Any]:
    """Return which entries of each parameter a client holds in a round."""
    sub, whole = parts.config.submodel, {name: value.float() for name, value in model.items()}
    windows = extract(whole, AXES, capacity, round, sub.strategy, parts.config.seed, client, sub.stride).windows
    return {
        name: np.ix_(
            *(
                windows[axis].indices if axis in windows else np.arange(size)
                for axis, size in zip(AXES[name], value.shape, strict=True)
            )
        )
        for name, value in model.items()
    }


def train_round(parts: Parts, round: int, model: Params, local: Local) -> list[Sent]:
    """Let every participant of a round compute its change, each on its own window of the model."""
    config, sub, sent = parts.config, parts.config.submodel, []
    rate = learning_rate(config.train.lr, config.train.schedule, round, config.rounds)
    plan = parts.planner.plan(round)
    for client, variant, weight in zip(plan.client.tolist(), plan.variant.tolist(), plan.weight.tolist(), strict=True):
        capacity = parts.task.capacities[variant]
        where = window_of(parts, round, client, capacity, model)
        gradients = gradients_of(parts, round, client, 1 / capacity if sub.scaler else 1.0)
        start = {name: value[where[name]].clone() for name, value in model.items()}
        sent.append(Sent(client, weight, len(gradients), where, local(client, start, gradients, rate)))
    return sent


def mean_change(model: Params, sent: Sequence[Sent]) -> tuple[Params, dict[str, Tensor]]:
    """Return the weighted mean change over the holders of each coordinate, 0 where there are none, and who has some."""
    totals, weights = add((0.0, model)), add((0.0, model))
    for one in sent:
        for name, value in one.change.items():
            totals[name][one.where[name]] += one.weight * value
            weights[name][one.where[name]] += one.weight
    held = {name: weight > 0 for name, weight in weights.items()}
    return {name: totals[name] / weights[name].clamp_min(1e-300) for name in model}, held


def slow_federation(
    parts: Parts, local: Local, server: Callable[[int, Params, Sequence[Sent]], Params] | None = None
) -> Params:
    """Run all rounds; without `server`, the mean change is added to the model."""
    model = {name: value.double() for name, value in initial_model(parts).items()}
    for round in range(parts.config.rounds):
        sent = train_round(parts, round, model, local)
        model = server(round, model, sent) if server else add((1.0, model), (1.0, mean_change(model, sent)[0]))
    return model


def local_sgd(momentum: float = 0.0, weight_decay: float = 0.0, mu: float = 0.0) -> Local:
    """Return local SGD on ``loss + mu / 2 * |x - start|^2``."""

    def train(client: int, start: Params, gradients: Sequence[Gradient], rate: float) -> Params:
        """Take the steps of a client."""
        own, velocity = add((1.0, start)), add((0.0, start))
        for gradient in gradients:
            slope = add((1.0, gradient(own)), (weight_decay, own), (mu, own), (-mu, start))
            velocity = add((momentum, velocity), (1.0, slope))
            own = add((1.0, own), (-rate, velocity))
        return add((1.0, own), (-1.0, start))

    return train


# ---- federations with a known optimum

SIZE = 16
LAYOUT = Layout.of({"w": (SIZE,)}, {"w": ("a",)})
CUT = cut_of(LAYOUT, {"a": Window(SIZE, ((0, SIZE),))})


class Quadratic(NamedTuple):
    """A client that minimises ``curvature / 2 * |x - centre|^2`` with exact gradients."""

    curvature: float
    centre: float
    weight: float
    steps: int


def optimum(clients: Sequence[Quadratic]) -> float:
    """Return where the weighted mean of the clients' losses is least."""
    pull = [one.weight * one.curvature for one in clients]
    return sum(share * one.centre for share, one in zip(pull, clients, strict=True)) / sum(pull)


def federate(algorithm: Algorithm, clients: Sequence[Quadratic], num_rounds: int, lr: float, x: float = 0.0) -> Arrays:
    """Run rounds of all clients through the functions that an engine calls; return the server's state.

    All coordinates of the model start at `x`, so that the state's are constant.
    """
    state = algorithm.init(torch.full((1, SIZE), x))
    private = [algorithm.init_client(torch.zeros(1, SIZE)) for _ in clients]
    total = sum(one.weight for one in clients)
    for _ in range(num_rounds):
        sums: dict[str, Tensor] = {}
        before = {name: value.clone() for name, value in state.items()}
        for number, one in enumerate(clients):
            received = {name: state[name] for name in algorithm.traits.downlink or ()}
            carry = algorithm.begin(received, private[number])
            for _ in range(one.steps):
                carry = algorithm.step(carry, one.curvature * (carry["x"] - one.centre), lr)
            payload, private[number] = algorithm.end(received, private[number], carry, one.steps, lr)
            for name, rows in payload.items():
                weight = one.weight if algorithm.traits.uplink[name] == "mean" else 1.0
                sums[name] = sums.get(name, torch.zeros(())) + weight * rows[0]
        assert all(torch.equal(state[name], value) for name, value in before.items()), "training changed the state"
        parts = [Part(CUT, sums, total, None)]
        inbox: Mapping[str, Tensor | None] = combine(LAYOUT, algorithm.traits.uplink, parts, algorithm.traits.scalars)
        views = {name: None if value is None else value[None] for name, value in inbox.items()}
        state = state | algorithm.update(state, views, len(clients))
    return state
