"""Peers by hand: one peer and one step at a time in float64, dense matrices, and the papers' recursions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation import BASE
from gossamer import rng
from gossamer.build import Parts, build
from gossamer.config.loading import parse, with_value
from gossamer.planning.schedule import learning_rate
from gossamer.submodel import extract
from gossamer.topology import Sparse, TopologyOptions
from gossamer.topology.family import Family, Schedule, static
from gossamer.workloads.convex import LeastSquares
from slow import AXES

Rows = NDArray[np.float64]
Gradient = Callable[[Rows], Rows]

# Full gradients would hide which batch is taken when: 12 samples are three batches.
LEAST_SQUARES: dict[str, Any] = {
    "workload": {"name": "least-squares", "dim": 5, "num_samples": 12, "heterogeneity": 1.0},
    "train.batch_size": 4,
    "engine.modes": [{"capacity": 1.0, "stacked": True}],
}


def decentralized(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the base experiment (DSGD of 8 peers on a ring, synthetic images) with entries at dotted keys replaced."""
    data = {key: value for key, value in BASE.items() if key not in ("clients", "algorithm")}
    data |= {"peers": {"num": 8, "topology": "ring"}, "algorithm": "dsgd"}
    for key, value in (changes or {}).items():
        data = with_value(data, key.split("."), value)
    return data


def error(rows: Tensor, expected: Any) -> float:
    """Return the distance of all models from the expected ones, relative to the latter's norm."""
    return float(np.linalg.norm(rows.double().numpy() - expected) / np.linalg.norm(expected))


class Scattered(LeastSquares):
    """Least squares whose peers start from models of their own."""

    traits = replace(LeastSquares.traits, has_peer_init=True)

    def peer_init(self, seed: int) -> Tensor:
        """Return normal models [num_clients, d]; padding is 0."""
        rows = torch.zeros(self.num_clients, self.layout.d, dtype=torch.float64)
        self.layout.views(rows)["x"].copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=(8, 5))))
        return rows


def _pushing(n: int, seed: int, options: TopologyOptions) -> Schedule:
    links = [(i, (i + u) % n) for i in range(n) for u in sorted({1, 1 + i % (n - 1)})]
    sender, receiver = np.array(sorted(links), dtype=np.int64).T
    weight = 1.0 / (1.0 + np.bincount(sender, minlength=n)[sender])
    return static(Sparse.of_edges(n, receiver, sender, weight, stochasticity="column"))


# A directed graph whose peers split evenly what they send: column-stochastic, so that push-sum's weights differ.
pushing = Family(_pushing, "static", "2", "below 1", "made up")


def mix(matrix: Rows, rows: Rows) -> Rows:
    """Let every peer add up what reaches it."""
    new = np.zeros_like(rows)
    for i in range(len(rows)):
        for j in range(len(rows)):
            if matrix[i, j]:
                new[i] += matrix[i, j] * rows[j]
    return new


def mix_held(matrix: Rows, rows: Rows, held: NDArray[np.bool_]) -> Rows:
    """Let every peer average each coordinate over those near it that hold it; where nobody does, it keeps its own."""
    new = rows.copy()
    for i in range(len(rows)):
        for c in range(rows.shape[1]):
            holders = [j for j in range(len(rows)) if matrix[i, j] > 0 and held[j, c]]
            if holders:
                total = sum(matrix[i, j] for j in holders)
                new[i, c] = sum(matrix[i, j] * rows[j, c] for j in holders) / total
    return new


class SlowPeers:
    """A decentralized run of which everything is in sight; `run` returns the models of all rounds, [rounds + 1, n, d].

    Attributes:
        held: bool [n, d], who trained which coordinate in the last round; padding counts as trained by all.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.parts: Parts = build(parse(config))
        self.config, self.topology = self.parts.config, self.parts.task.topology
        assert self.topology is not None
        self.n, self.num_rounds, self.train = self.topology.n, self.config.rounds, self.config.train
        self.options = {key: value for key, value in self.config.algorithm.items() if key != "name"}
        workload, seed = self.parts.workload, self.config.seed
        own = workload.peer_init(seed) if workload.traits.has_peer_init else workload.init(seed).repeat(self.n, 1)
        self.x = own.double().numpy()
        self.held = np.ones(self.x.shape, dtype=bool)
        self.padding = np.ones(self.x.shape[1], dtype=bool)
        self.padding[self.parts.workload.layout.coordinates] = False

    def run(self) -> Rows:
        """Run all rounds of whatever the configuration names."""
        methods = {
            "dsgd": self.dsgd,
            "gossip-pga": self.dsgd,
            "quasi-global-momentum": self.quasi_global,
            "dsgt": self.tracking,
            "d2": self.d2,
            "exact-diffusion": self.d2,
            "push-sum": self.push_sum,
            "choco-sgd": self.choco,
            "dsgd-ceca": self.ceca,
        }
        return methods[self.config.algorithm["name"]]()

    # ---- what a round consists of

    def rate(self, round: int) -> float:
        """Return the learning rate of a round."""
        return learning_rate(self.train.lr, self.train.schedule, round, self.num_rounds)

    def is_merged(self, round: int) -> bool:
        """Say whether a round ends with the mean of all."""
        peers = self.config.peers
        assert peers is not None
        every = peers.merge_every
        if self.config.algorithm["name"] == "gossip-pga":
            every = every or self.options.get("period", 10)
        return bool(every and (round + 1) % every == 0) or (peers.final_merge and round + 1 == self.num_rounds)

    def matrix(self, round: int) -> Rows:
        """Return the dense W of a round."""
        assert self.topology is not None
        if self.is_merged(round):
            return np.full((self.n, self.n), 1.0 / self.n)
        matrix = self.topology.mixing(round).dense()
        return (np.eye(self.n) + matrix) / 2 if self.config.algorithm["name"] == "exact-diffusion" else matrix

    def mixed(self, round: int, rows: Rows) -> Rows:
        """Return W times rows; a mean over the holders of each coordinate where windows differ."""
        if self.held.all():
            return mix(self.matrix(round), rows)
        return mix_held(self.matrix(round), rows, self.held)

    def near_holders(self, round: int) -> NDArray[np.bool_]:
        """Return bool [n, d]: whether somebody in the closed neighbourhood holds the coordinate."""
        matrix = self.matrix(round)
        return np.stack([self.held[matrix[i] > 0].any(0) for i in range(self.n)])

    def capacity(self, round: int, peer: int) -> float:
        """Return the capacity of a peer."""
        plan = self.parts.planner.plan(round)
        (row,) = np.flatnonzero(plan.client == peer)
        return self.parts.task.capacities[int(plan.variant[row])]

    def window(self, round: int, peer: int) -> dict[str, Tensor]:
        """Return where, in a flat row, the entries of the parameters of a peer's sub-model lie."""
        layout, capacity = self.parts.workload.layout, self.capacity(round, peer)
        places = layout.views(torch.arange(layout.d))
        if capacity == 1.0:
            return places
        sub = self.config.submodel
        assert sub.strategy is not None
        numbers = {name: value.float() for name, value in places.items()}
        cut = extract(numbers, AXES, capacity, round, sub.strategy, self.config.seed, peer, sub.stride)
        return {name: value.long() for name, value in cut.params.items()}

    def batches(self, round: int, peer: int) -> list[list[int]]:
        """Return the positions, in the peer's own data, of the samples of each local step."""
        size, num_samples = self.train.batch_size, int(self.parts.workload.num_samples[peer])
        per_epoch = -(-num_samples // size)
        num_steps = self.train.steps or per_epoch * (self.train.epochs or 0)
        found: list[list[int]] = []
        for epoch in range(-(-num_steps // per_epoch)):
            one, sizes = np.array([peer]), np.array([num_samples])
            (order,) = rng.permutations(self.config.seed, "shuffle", round, 0, one, sizes, extra=epoch)
            found += [order[at : at + size].tolist() for at in range(0, num_samples, size)]
        return found[:num_steps]

    def gradients(self, round: int, peer: int) -> list[Gradient]:
        """Return one function from a row to the gradient there (0 outside the window) for each local step."""
        window, workload = self.window(round, peer), self.parts.workload
        scale = 1.0 / self.capacity(round, peer) if self.config.submodel.scaler else 1.0
        self.held[peer] = self.padding
        for place in window.values():
            self.held[peer, place.numpy()] = True

        def gradient(row: Rows, positions: list[int]) -> Rows:
            """Differentiate the loss of one batch."""
            leaves = {name: torch.from_numpy(row[place.numpy()]).requires_grad_() for name, place in window.items()}
            samples, constants = workload.batch(np.array([peer]), np.array([positions]), round=round)
            batch = {key: value[0] for key, value in (samples | constants).items()}
            batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
            grads = torch.autograd.grad(workload.loss(leaves, batch | {"scale": scale}), list(leaves.values()))
            found = np.zeros_like(row)
            for place, grad in zip(window.values(), grads, strict=True):
                found[place.numpy()] = grad.numpy()
            if self.train.clip_norm is not None:
                found *= min(1.0, self.train.clip_norm / np.linalg.norm(found))
            return found + self.train.weight_decay * np.where(self.held[peer], row, 0.0)

        return [lambda row, positions=one: gradient(row, positions) for one in self.batches(round, peer)]

    def descend(self, round: int, peer: int, row: Rows, velocity: Rows | None = None) -> Rows:
        """Return a row after local SGD; `velocity`, if given, is momentum that is changed in place."""
        row = row.copy()
        for gradient in self.gradients(round, peer):
            step = gradient(row)
            if velocity is not None:
                held = self.held[peer]
                velocity[held] = self.train.momentum * velocity[held] + step[held]
                step = np.where(held, velocity, 0.0)
            row -= self.rate(round) * step
        return row

    def descended(self, round: int, rows: Rows, velocity: Rows | None = None) -> Rows:
        """Return the rows of all peers after local SGD."""
        one = [None] * self.n if velocity is None else velocity
        return np.stack([self.descend(round, i, rows[i], one[i]) for i in range(self.n)])

    # ---- the methods

    def dsgd(self) -> Rows:
        """DSGD in both orders, with local or mixed momentum."""
        found, velocity = [self.x], np.zeros_like(self.x)
        for round in range(self.num_rounds):
            after = self.descended(round, found[-1], velocity)
            if self.options.get("mix_momentum"):
                velocity = self.mixed(round, velocity)
            if self.options.get("order") == "combine-while-adapt":
                found.append(self.mixed(round, found[-1]) + after - found[-1])
            else:
                found.append(self.mixed(round, after))
        return np.stack(found)

    def quasi_global(self) -> Rows:
        """QG-DSGDm, Algorithm 1."""
        found, m = [self.x], np.zeros_like(self.x)
        beta = self.train.momentum
        mu = self.options.get("mu", beta)
        for round in range(self.num_rounds):
            half, lr, num_steps = found[-1].copy(), self.rate(round), np.zeros((self.n, 1))
            for i in range(self.n):
                for gradient in self.gradients(round, i):
                    half[i] -= lr * (gradient(half[i]) + beta * np.where(self.held[i], m[i], 0.0))
                    num_steps[i] += 1
            new, near = self.mixed(round, half), self.near_holders(round)
            moved = (found[-1] - new) / (lr * num_steps)
            m = np.where(near, mu * m + (1 - mu) * moved, m)
            found.append(np.where(near, new, found[-1]))
        return np.stack(found)

    def tracking(self) -> Rows:
        """Gradient tracking: trackers start from the first gradients, and follow how they change."""
        x, y, last, found = self.x, np.zeros_like(self.x), np.zeros_like(self.x), [self.x]
        for round in range(self.num_rounds):
            x, y = x.copy(), y.copy()
            for i in range(self.n):
                for gradient in self.gradients(round, i):
                    new = gradient(x[i])
                    y[i] = y[i] + new - last[i]
                    last[i] = new
                    x[i] = x[i] - self.rate(round) * y[i]
            x, y = self.mixed(round, x), self.mixed(round, y)
            found.append(x)
        return np.stack(found)

    def d2(self) -> Rows:
        """D2 and exact diffusion by the recursion over two rounds."""
        found, before = [self.x], np.zeros_like(self.x)
        for round in range(self.num_rounds):
            now, earlier = found[-1], found[max(len(found) - 2, 0)]
            step = now - self.descended(round, now)
            found.append(self.mixed(round, 2 * now - earlier - step + before))
            before = step
        return np.stack(found)

    def push_sum(self) -> Rows:
        """Stochastic gradient push: biased models, weights, and their quotients, where gradients are taken."""
        biased, weight, found = self.x.copy(), np.ones((self.n, 1)), [self.x]
        for round in range(self.num_rounds):
            biased = biased + self.descended(round, biased / weight) - biased / weight
            biased, weight = self.mixed(round, biased), self.mixed(round, weight)
            found.append(biased / weight)
        return np.stack(found)

    def choco(self) -> Rows:
        """CHOCO-SGD, Algorithm 2: every peer has a copy of what it knows of each other one."""
        codec, gamma = self.parts.algorithm.traits.codecs["q"], self.parts.algorithm.options.gamma
        real, seed, found, velocity = self.parts.workload.layout.coordinates, self.config.seed, [self.x], None
        known = np.zeros((self.n, *self.x.shape))  # of i about j
        for round in range(self.num_rounds):
            half, matrix = self.descended(round, found[-1], velocity), self.matrix(round)
            for j in range(self.n):
                row = torch.from_numpy(half[j] - known[j, j])[real][None]
                sent = codec.compress(row, seed=seed, round=round, peers=np.array([j]))[0].numpy()
                for i in range(self.n):
                    known[i, j, real] += sent
            pull = [sum(matrix[i, j] * (known[i, j] - known[i, i]) for j in range(self.n)) for i in range(self.n)]
            found.append(half + gamma * np.stack(pull))
        return np.stack(found)

    def ceca(self) -> Rows:
        """DSGD-CECA by its formulas, with the gradient at x."""
        n, found, y, m = self.n, [self.x], self.x, 0
        bits = [int(bit) for bit in f"{n - 1:b}"]
        for round in range(self.num_rounds):
            place = round % len(bits)
            m = 0 if place == 0 else m
            a = self.descended(round, found[-1])
            b = y + a - found[-1]
            new, y = np.empty_like(a), np.empty_like(b)
            for i in range(n):
                if self.is_merged(round):
                    new[i], y[i] = a.mean(0), b.mean(0)
                elif bits[place]:
                    r = a[(i - m - 1) % n]
                    new[i], y[i] = (a[i] + r) / 2, ((m + 1) * r + m * b[i]) / (2 * m + 1)
                else:
                    r = b[(i - m) % n]
                    new[i], y[i] = ((m + 1) * a[i] + m * r) / (2 * m + 1), (b[i] + r) / 2
            m = 2 * m + bits[place]
            found.append(new)
        return np.stack(found)
