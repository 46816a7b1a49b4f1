"""One exchange of n peers' models, as a multiple of copying them, and consensus among a million peers.

What is timed is the exchange of a run: the local engine with two workers, which draw the round's graph, copy a panel of
columns at a time, apply the mixing to it and write the new state in its place. Peers hold points of the workload
``consensus``, so that a round of DSGD is W x and nothing else (of DSGD-CECA, for the joint kind). Beside it stand what
one would write by hand for ten neighbours, and a copy: torch's `copy_` between two standing arrays of the same size
with as many threads, which reads and writes the state once.

A trial is one pass over all ways in turn, each by a fresh draw of its graph. Before the first one counts, a few columns
of every exchange are compared with W x.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from building import engine_of, parts_of
from gossamer.topology import Mixing
from harness import Gate, Report, machine, spread

STATES = ((10_000, 7_850), (100_000, 1_000))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "shift": ("od-equidyn", {}),
    "matching": ("random-match", {}),
    "ten neighbours": ("random-regular", {"degree": 10}),
    "block average": ("hyper-hypercube", {"k": 4}),
    "joint": ("ceca", {}),
}
GOALS = {"shift": 1.5, "matching": 2.5, "ten neighbours": 12.0}
CHECKED_COLUMNS = 8
MAX_DENSE = 10_000
MILLION, WIDTH = 1_000_000, 16
CONSENSUS = ("od-equidyn", "random-match", "base", "ceca")
TOLERANCES = {"single": 1e-6, "double": 1e-10}
MAX_ROUNDS = 1_000


class Peers:
    """The engine of a run in which peers do nothing but mix."""

    def __init__(self, name: str, options: dict[str, Any], n: int, d: int, workers: int, precision: str) -> None:
        """Start it.

        Args:
            name, options: of the topology.
            n: peers.
            d: coordinates of each; a joint mixing has two rows a peer, of half as many.
            workers: processes.
            precision: "single" or "double".
        """
        is_joint = name == "ceca"
        self.parts = parts_of(
            {
                "rounds": MAX_ROUNDS,
                "workload": {"name": "consensus", "dim": d // 2 if is_joint else d, "precision": precision},
                "peers": {"num": n, "topology": {"name": name, **options}},
                "algorithm": "dsgd-ceca" if is_joint else "dsgd",
                "train": {"steps": 1, "batch_size": 1, "lr": 1},
                "engine": {"workers": workers, "modes": [{"capacity": 1.0, "stacked": True}]},
            }
        )
        self.engine = engine_of(self.parts)
        self._plan = self.parts.planner.plan(0)
        self.round = 0

    def draw(self) -> Mixing:
        """Return the round's mixing, as the workers draw it again."""
        return self.parts.task.topology.mixing(self.round)

    def exchange(self) -> None:
        """Do one round's exchange, as the loop of a run does."""
        self.engine.exchange(dataclasses.replace(self._plan, round=self.round))
        self.round += 1

    def check(self, what: str) -> None:
        """Do one exchange, and compare a few columns with the mixing.

        Raises:
            SystemExit: they differ.
        """
        mixing, state = self.draw(), self.engine.read()
        names = ("x", "y")[: mixing.rows_per_site]
        before = torch.stack([state[name][:, :CHECKED_COLUMNS] for name in names], dim=1)
        expected = mixing.apply(before if len(names) > 1 else before[:, 0]).view(before.shape)
        self.exchange()
        after = torch.stack([self.engine.read()[name][:, :CHECKED_COLUMNS] for name in names], dim=1)
        difference = float((after - expected).abs().max())
        if not difference < 1e-5:
            raise SystemExit(f"{what}: the exchange differs from the mixing by {difference}")

    def distance(self) -> float:
        """Return how far peers are from their mean."""
        return float(self.engine.measure(self.parts.planner.own_models(0, 0))["consensus_distance"])


def seconds_of(way: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def as_torch(mixing: Mixing) -> Tensor:
    """Return W of a mixing as torch's sparse CSR matrix, float32."""
    edges, diagonal = mixing.edges(), mixing.self_weights()
    everyone = torch.arange(mixing.n)
    rows = torch.cat([torch.from_numpy(edges.receiver), everyone])
    columns = torch.cat([torch.from_numpy(edges.sender), everyone])
    values = torch.cat([torch.from_numpy(edges.weight), torch.from_numpy(diagonal)]).float()
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (mixing.n, mixing.n)).to_sparse_csr()


def by_hand(mixing: Mixing, x: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """Return what one would write by hand for the sparse mixing."""
    import scipy.sparse

    sparse = as_torch(mixing)
    arrays = (part.numpy() for part in (sparse.values(), sparse.col_indices(), sparse.crow_indices()))
    csr = scipy.sparse.csr_array(tuple(arrays), shape=(mixing.n, mixing.n))
    return {
        "ten neighbours, torch sparse CSR": lambda: torch.mm(sparse, x, out=out),
        "ten neighbours, scipy CSR (one thread)": lambda: csr @ x.numpy(),
    }


def one_state(n: int, d: int, workers: int, repeats: int, gate: Gate) -> Report:
    """Time all ways on a state of n models of d coordinates, float32."""
    kinds = {kind: Peers(*chosen, n, d, workers, "single") for kind, chosen in KINDS.items()}
    width = kinds["shift"].engine.read()["x"].shape[1]  # with padding
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    regular = kinds["ten neighbours"].draw()
    ways: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
    ways |= {kind: peers.exchange for kind, peers in kinds.items()} | by_hand(regular, x, out)

    def one_pass() -> dict[str, float]:
        """Return the seconds of every way, and of every draw alone."""
        draws = {f"{kind}, the draw alone": seconds_of(peers.draw) for kind, peers in kinds.items()}
        return {name: seconds_of(way) for name, way in ways.items()} | draws

    for kind, peers in kinds.items():
        peers.check(kind)
    one_pass()  # warms up
    passes = gate.gated(one_pass, repeats).results
    seconds = {name: [one[name] for one in passes] for name in passes[0]}
    for peers in kinds.values():
        peers.engine.close()
    if n <= MAX_DENSE:
        dense = as_torch(regular).to_dense()
        once = gate.gated(lambda: seconds_of(lambda: torch.mm(dense, x, out=out)))
        seconds["ten neighbours, dense matrix (once)"] = once.results
    return summary(n, d, seconds, gate)


def summary(n: int, d: int, seconds: dict[str, list[float]], gate: Gate) -> Report:
    """Return medians, ranges and multiples of the copy."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    multiples = {name: value / medians["copy"] for name, value in medians.items()}
    return {
        "n": n,
        "d": d,
        "copy_bytes_per_second": 2 * 4 * n * d / medians["copy"],
        "seconds": medians,
        "ranges": {name: spread(values) for name, values in seconds.items()},
        "multiples of the copy": multiples,
        "goals": {kind: gate.goal(multiples[kind], most) for kind, most in GOALS.items()},
    }


def consensus(name: str, n: int, precision: str, workers: int) -> Report:
    """Mix normal numbers, a million peers of a few each, until all agree with the mean."""
    peers = Peers(name, {}, n, 2 * WIDTH if name == "ceca" else WIDTH, workers, precision)
    first, left, draws, exchanges = peers.distance(), 1.0, [], []
    while left > TOLERANCES[precision] and peers.round < MAX_ROUNDS:
        draws.append(seconds_of(peers.draw))
        exchanges.append(seconds_of(peers.exchange))
        left = peers.distance() / first
    peers.engine.close()
    return {
        "rounds": peers.round,
        "relative distance": left,
        "reached": left <= TOLERANCES[precision],
        "seconds an exchange, its draw included": statistics.median(exchanges),
        "seconds a draw": statistics.median(draws),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2, help="of the engine, and torch's threads of all else")
    parser.add_argument("--divide", type=int, default=1, help="numbers of peers by this, for a quick look")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate, workers = machine(), Gate.of(arguments), arguments.workers
    torch.set_num_threads(workers)
    states = [one_state(n // arguments.divide, d, workers, arguments.repeats, gate) for n, d in STATES]
    agreed = {}
    for name in CONSENSUS:
        for precision, tolerance in TOLERANCES.items():
            way = (name, MILLION // arguments.divide, precision, workers)
            found = gate.gated(lambda way=way: consensus(*way))
            agreed[f"{name}, {precision} precision to {tolerance:g}"] = found.results[0]
    result = {
        "benchmark": "mixing",
        "machine": before,
        **gate.report(),
        "versions": {name: version(name) for name in ("torch", "scipy", "numpy")}
        | {"python": platform.python_version()},
        "workers": workers,
        "repeats": arguments.repeats,
        "states": states,
        "consensus": {"n": MILLION // arguments.divide, "d": WIDTH, **agreed},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
