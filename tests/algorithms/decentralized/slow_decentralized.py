"""Decentralized algorithms by hand, peer by peer in float64, and the smallest engine that drives the real ones.

The slow ones follow the papers' recursions, which are mostly not the forms of the implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from numpy.typing import NDArray
from torch import Tensor

from gossamer import topology
from gossamer.aggregate.codecs import Codec
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.decentralized.base import PeerSGD
from gossamer.errors import ConfigError
from gossamer.topology import Mixing, Sparse, Topology, TopologyOptions
from gossamer.topology.family import static

Rows = NDArray[np.float64]
Rate = Callable[[int], float]

FIXED_SYMMETRIC = ["ring", "star", "complete", "u-equistatic", "erdos-renyi", "torus"]
DOUBLY = [*FIXED_SYMMETRIC, "static-exp", "d-equistatic", "one-peer-exp", "od-equidyn", "ou-equidyn", "base"]
CODEC_SEED = 5


@dataclass(frozen=True)
class Quadratics:
    """Losses ``(x - centre)^T curvature (x - centre) / 2``, one a peer; curvature [n, d, d], centre [n, d]."""

    curvature: Rows
    centre: Rows

    def gradient(self, i: int, x: Any) -> Rows:
        """Return the gradient of one peer's loss."""
        return np.asarray(self.curvature[i] @ (np.asarray(x) - self.centre[i]))

    def gradients(self, x: Rows) -> Rows:
        """Return the gradients of all peers, each at its own row."""
        return np.stack([self.gradient(i, row) for i, row in enumerate(x)])

    @property
    def optimum(self) -> Rows:
        """Minimiser of the mean loss."""
        pull = sum(a @ c for a, c in zip(self.curvature, self.centre, strict=True))
        return np.asarray(np.linalg.solve(self.curvature.sum(0), pull))


def quadratics(n: int, seed: int = 0, d: int = 3) -> Quadratics:
    """Return very different losses, of eigenvalues between 0.5 and 2."""
    source = np.random.default_rng(seed)
    bases = [np.linalg.qr(source.standard_normal((d, d)))[0] for _ in range(n)]
    curvature = np.stack([q @ np.diag(source.uniform(0.5, 2.0, d)) @ q.T for q in bases])
    return Quadratics(curvature, 3.0 * source.standard_normal((n, d)))


def start(n: int, seed: int = 0, d: int = 3) -> Rows:
    return np.random.default_rng(seed + 1000).standard_normal((n, d))


def built(name: str, n: int, seed: int = 0, **parameters: Any) -> Topology:
    """Build a topology, or give the example up if its graph cannot be."""
    try:
        return topology.build(name, n, seed, **parameters)
    except ConfigError:
        assume(False)
        raise


def of_mixing(mixing: Mixing, name: str = "by-hand") -> Topology:
    return Topology(name, mixing.n, 0, TopologyOptions(), "static", static(mixing))


def pushing(n: int, seed: int = 0) -> Topology:
    """Return a directed graph whose peers split evenly what they send: column-stochastic, strongly connected."""
    source = np.random.default_rng(seed)
    links = {(i, (i + 1) % n) for i in range(n)} | {
        (i, j) for i in range(n) for j in range(n) if i != j and source.random() < 0.3
    }
    sender, receiver = np.array(sorted(links), dtype=np.int64).T
    weight = 1.0 / (1.0 + np.bincount(sender, minlength=n)[sender])
    return of_mixing(Sparse.of_edges(n, receiver, sender, weight, stochasticity="column"))


# The real algorithms.


def by_parameter(step: Callable[[Arrays, Tensor, float], Arrays], carry: Arrays, grad: Tensor, lr: float) -> Arrays:
    """Take a step for each of two parameters, the first a matrix."""
    parts = []
    for where in (slice(0, 1), slice(1, None)):
        part = {name: value[:, where].reshape(len(value), 1, -1) for name, value in carry.items()}
        lent = grad[:, where].reshape(len(grad), 1, -1).clone()
        parts.append(step(part, lent, lr))
        lent.fill_(torch.nan)  # the next gradient may take its place
    return {name: torch.cat([part[name].flatten(1) for part in parts], dim=1) for name in carry}


def local_work(
    algorithm: PeerSGD, state: Arrays, problem: Quadratics, steps: Sequence[int], lr: float, block: int
) -> tuple[Arrays, Arrays]:
    """Train all peers, `block` of equal steps at a time."""
    payloads, sites = [], []
    for lo in range(0, len(steps), block):
        peers = range(lo, min(lo + block, len(steps)))
        assert len({steps[i] for i in peers}) == 1
        rows = {name: value[peers.start : peers.stop] for name, value in state.items()}
        before = {name: value.clone() for name, value in rows.items()}
        carry = algorithm.begin(rows, {})
        for _ in range(steps[lo]):
            grad = torch.stack([torch.as_tensor(problem.gradient(i, carry["x"][i - lo])) for i in peers])
            carry = by_parameter(algorithm.step, carry, grad.to(carry["x"].dtype), lr)
        payload, site = algorithm.end(rows, {}, carry, steps[lo], lr)
        assert set(payload) == set(algorithm.traits.uplink)
        assert all(torch.equal(before[name], rows[name]) for name in rows), "the state changed before its time"
        assert not {each.data_ptr() for each in payload.values()} & {each.data_ptr() for each in rows.values()}
        payloads.append(payload)
        sites.append(site)
    return _concatenate(payloads), _concatenate(sites)


def _concatenate(parts: Sequence[Arrays]) -> Arrays:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mixed(algorithm: PeerSGD, topology: Topology, round: int, sent: Arrays) -> Arrays:
    """Mix the payloads as an engine does."""
    if algorithm.traits.merge_every and (round + 1) % algorithm.traits.merge_every == 0:
        return {name: value.mean(0, keepdim=True).expand_as(value).clone() for name, value in sent.items()}
    mixing = topology.mixing(round)
    if algorithm.traits.lazy:
        mixing = mixing.lazy()
    if algorithm.traits.joint:
        pair = mixing.apply(torch.stack([sent["x"], sent["y"]], dim=1))
        return {"x": pair[:, 0], "y": pair[:, 1]}
    return {name: mixing.apply(value) for name, value in sent.items()}


def drive(
    algorithm: PeerSGD,
    topology: Topology,
    problem: Quadratics,
    x: Rows,
    num_rounds: int,
    lr: float | Rate,
    steps: int | Sequence[int] = 1,
    block: int | None = None,
) -> list[Arrays]:
    """Return the states before the first round and after each; None: all peers are one block, if their steps agree."""
    state = algorithm.init(torch.from_numpy(x.copy()))
    states = [dict(state)]
    counts = [steps] * len(x) if isinstance(steps, int) else list(steps)
    block = block or (len(x) if isinstance(steps, int) else 1)
    for round in range(num_rounds):
        rate = lr if isinstance(lr, float) else lr(round)
        payload, site = local_work(algorithm, state, problem, counts, rate, block)
        assert set(site) <= set(state) - set(payload)
        for name, codec in algorithm.traits.codecs.items():
            peers = np.arange(len(x))
            payload[name] = codec.compress(payload[name], seed=CODEC_SEED, round=round, peers=peers)
        inbox: dict[str, Any] = mixed(algorithm, topology, round, payload)
        left = {name: value for name, value in (state | site).items() if name not in payload}
        state = state | site | _update_by_slices(algorithm, left, inbox, payload, rate)
        states.append(dict(state))
    return states


def _update_by_slices(algorithm: PeerSGD, left: Arrays, inbox: Arrays, sent: Arrays, lr: float) -> Arrays:
    """Call `update` for slices of the coordinates; what payloads replaced is gone."""
    parts = []
    for where in (slice(0, 2), slice(2, None)):

        def cut(arrays: Arrays, where: slice = where) -> Arrays:
            return {name: each if name in algorithm.traits.scalars else each[:, where] for name, each in arrays.items()}

        held = {"held": None, "lr": lr, "sent": cut(sent)}
        parts.append(algorithm.update(cut(left), cut(inbox) | held, len(next(iter(sent.values())))))
    names = [name for name in parts[0] if name not in algorithm.traits.scalars]
    scalars = {name: parts[0][name] for name in parts[0] if name in algorithm.traits.scalars}
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in names} | scalars


def models(states: Sequence[Arrays]) -> Rows:
    """Return the models of all rounds, [rounds + 1, n, d]."""
    return np.stack([state["x"].numpy() for state in states])


# The slow ones. All return the models of all rounds, [rounds + 1, n, d].


def mix(matrix: Rows, rows: Rows) -> Rows:
    """Let every peer add up what reaches it."""
    new = np.zeros_like(rows)
    for i in range(len(rows)):
        for j in range(len(rows)):
            if matrix[i, j]:
                new[i] = new[i] + matrix[i, j] * rows[j]
    return new


def slow_dsgd(
    topology: Topology,
    problem: Quadratics,
    x: Rows,
    num_rounds: int,
    lr: Rate,
    steps: int = 1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    mix_momentum: bool = False,
    combine_first: bool = False,
    merge_every: int | None = None,
) -> Rows:
    """DSGD in both orders, with the optimizer of torch at each peer."""
    found, velocity, n = [x], np.zeros_like(x), len(x)
    for round in range(num_rounds):
        matrix = topology.mixing(round).dense()
        if merge_every and (round + 1) % merge_every == 0:
            matrix = np.full((n, n), 1.0 / n)
        x, changes = found[-1], np.zeros_like(x)
        for i in range(n):
            own = torch.tensor(x[i], requires_grad=True)
            optimizer = torch.optim.SGD([own], lr=lr(round), momentum=momentum, weight_decay=weight_decay)
            if momentum:
                optimizer.state[own]["momentum_buffer"] = torch.tensor(velocity[i])
            for _ in range(steps):
                own.grad = torch.from_numpy(problem.gradient(i, own.detach().numpy()))
                optimizer.step()
            changes[i] = own.detach().numpy() - x[i]
            if momentum:
                velocity[i] = optimizer.state[own]["momentum_buffer"].numpy()
        if mix_momentum:
            velocity = mix(matrix, velocity)
        found.append(mix(matrix, x) + changes if combine_first else mix(matrix, x + changes))
    return np.stack(found)


def slow_quasi_global(
    topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, lr: Rate, steps: int, beta: float, mu: float
) -> Rows:
    """QG-DSGDm, Algorithm 1."""
    found, m = [x], np.zeros_like(x)
    for round in range(num_rounds):
        half = found[-1].copy()
        for i in range(len(x)):
            for _ in range(steps):
                half[i] = half[i] - lr(round) * (beta * m[i] + problem.gradient(i, half[i]))
        new = mix(topology.mixing(round).dense(), half)
        m = mu * m + (1 - mu) * (found[-1] - new) / (lr(round) * steps)
        found.append(new)
    return np.stack(found)


def slow_tracking(topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, lr: Rate, steps: int = 1) -> Rows:
    """Gradient tracking as one sequence of gradient steps, of which every `steps`-th is followed by a mixing."""
    found, y = [x], problem.gradients(x)
    for time in range(num_rounds * steps):
        round, last = time // steps, (time + 1) % steps == 0
        matrix = topology.mixing(round).dense() if last else np.eye(len(x))
        new = mix(matrix, x - lr(round) * y)
        y = mix(matrix, y) + problem.gradients(new) - problem.gradients(x)
        x = new
        if last:
            found.append(x)
    return np.stack(found)


def slow_d2(matrix: Rows, problem: Quadratics, x: Rows, num_rounds: int, lr: Rate) -> Rows:
    """D2's recursion over two rounds."""
    found = [x, mix(matrix, x - lr(0) * problem.gradients(x))]
    for k in range(1, num_rounds):
        now, before = found[-1], found[-2]
        step = lr(k) * problem.gradients(now) - lr(k - 1) * problem.gradients(before)
        found.append(mix(matrix, 2 * now - before - step))
    return np.stack(found)


def slow_push(topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, lr: Rate, steps: int = 1) -> Rows:
    """SGP, Algorithm 1: biased models, weights and de-biased models."""
    biased, weight, found = x.copy(), np.ones((len(x), 1)), [x]
    for round in range(num_rounds):
        for i in range(len(x)):
            z = biased[i] / weight[i]
            for _ in range(steps):
                gradient = problem.gradient(i, z)
                z, biased[i] = z - lr(round) * gradient, biased[i] - lr(round) * gradient
        matrix = topology.mixing(round).dense()
        biased, weight = mix(matrix, biased), mix(matrix, weight)
        found.append(biased / weight)
    return np.stack(found)


def slow_choco(
    topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, lr: Rate, codec: Codec, gamma: float
) -> Rows:
    """CHOCO-SGD, Algorithm 2: each peer has a copy of what it knows of each neighbour."""
    matrix, n, found = topology.mixing(0).dense(), len(x), [x]
    known = [{j: np.zeros(x.shape[1]) for j in range(n) if matrix[i, j] or i == j} for i in range(n)]
    for round in range(num_rounds):
        half = found[-1] - lr(round) * problem.gradients(found[-1])
        for i in range(n):
            row = torch.from_numpy(half[i] - known[i][i])[None]
            q = codec.compress(row, seed=CODEC_SEED, round=round, peers=np.array([i]))[0].numpy()
            for j in range(n):
                if i in known[j]:
                    known[j][i] = known[j][i] + q
        pull = [sum(matrix[i, j] * (known[i][j] - known[i][i]) for j in known[i]) for i in range(n)]
        found.append(half + gamma * np.stack(pull))
    return np.stack(found)


def slow_ceca(problem: Quadratics, x: Rows, num_rounds: int, lr: Rate) -> Rows:
    """DSGD-CECA by its formulas, with the gradient at x."""
    n, found, y = len(x), [x], x.copy()
    bits = [int(bit) for bit in f"{n - 1:b}"]
    for round in range(num_rounds):
        place = round % len(bits)
        m = 0 if place == 0 else m  # noqa: F821
        step = lr(round) * problem.gradients(found[-1])
        a, b = found[-1] - step, y - step
        new, y = np.empty_like(a), np.empty_like(b)
        for i in range(n):
            if bits[place]:
                r = a[(i - m - 1) % n]
                new[i], y[i] = (a[i] + r) / 2, ((m + 1) * r + m * b[i]) / (2 * m + 1)
            else:
                r = b[(i - m) % n]
                new[i], y[i] = ((m + 1) * a[i] + m * r) / (2 * m + 1), (b[i] + r) / 2
        m = 2 * m + bits[place]
        found.append(new)
    return np.stack(found)
