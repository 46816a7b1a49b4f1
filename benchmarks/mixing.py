"""One round of mixing n peers' models, as a multiple of copying them, and consensus among a million peers.

Every repeat times all ways in turn, each by a fresh draw of its topology. A copy is torch's `copy_` between two
standing arrays of the same size with as many threads, so it reads and writes the state once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gossamer import topology
from gossamer.threads import torch_threads
from gossamer.topology import Mixing
from gossamer.topology.streaming import mix, mix_
from harness import goal, machine

STATES = ((10_000, 7_850), (100_000, 1_000))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "shift": ("od-equidyn", {}),
    "matching": ("random-match", {}),
    "ten neighbours": ("random-regular", {"degree": 10}),
    "block average": ("hyper-hypercube", {"k": 4}),
    "joint": ("ceca", {}),
}
GOALS = {"shift": 1.5, "matching": 2.5, "ten neighbours": 12.0}
MOST_DENSE = 10_000
MILLION, WIDTH = 1_000_000, 16
CONSENSUS = ("od-equidyn", "random-match", "base", "ceca")
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-10}
MOST_ROUNDS = 1_000

Report = dict[str, Any]


def seconds_of(way: Callable[[], object], threads: int) -> float:
    """Time one call."""
    with torch_threads(threads):
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


def rivals(mixing: Mixing, x: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """Return what one would write by hand for the sparse mixing."""
    import scipy.sparse

    sparse = as_torch(mixing)
    arrays = (part.numpy() for part in (sparse.values(), sparse.col_indices(), sparse.crow_indices()))
    csr = scipy.sparse.csr_array(tuple(arrays), shape=(mixing.n, mixing.n))
    return {
        "ten neighbours, torch sparse CSR": lambda: torch.mm(sparse, x, out=out),
        "ten neighbours, scipy CSR (one thread)": lambda: csr @ x.numpy(),
    }


def one_state(n: int, d: int, threads: int, repeats: int) -> Report:
    """Time all ways on a state of n models of d coordinates, float32."""
    topologies = {kind: topology.build(name, n, 0, **options) for kind, (name, options) in KINDS.items()}
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    regular = topologies["ten neighbours"].mixing(0)
    by_hand = rivals(regular, x, out)
    seconds: dict[str, list[float]] = {}
    for repeat in range(-1, repeats):  # the first one warms up
        mixings = {kind: each.mixing(repeat + 1) for kind, each in topologies.items()}
        ways: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
        for kind, mixing in mixings.items():
            # A joint mixing has two rows a peer: half of the columns make the same bytes.
            shape = (n * mixing.rows_per_site, d // mixing.rows_per_site)
            ways[kind] = lambda mixing=mixing, shape=shape: mix(mixing, x.view(shape), out.view(shape), threads)
            ways[f"{kind}, in place"] = lambda mixing=mixing, shape=shape: mix_(mixing, x.view(shape), threads=threads)
        for name, way in (ways | by_hand).items():
            spent = seconds_of(way, threads)
            if repeat >= 0:
                seconds.setdefault(name, []).append(spent)
    if n <= MOST_DENSE:
        dense = as_torch(regular).to_dense()
        seconds["ten neighbours, dense matrix (once)"] = [seconds_of(lambda: torch.mm(dense, x, out=out), threads)]
    return summary(n, d, seconds)


def summary(n: int, d: int, seconds: dict[str, list[float]]) -> Report:
    """Return medians, ranges and multiples of the copy."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    multiples = {name: value / medians["copy"] for name, value in medians.items()}
    return {
        "n": n,
        "d": d,
        "copy_bytes_per_second": 2 * 4 * n * d / medians["copy"],
        "seconds": medians,
        "ranges": {name: [min(values), max(values)] for name, values in seconds.items()},
        "multiples of the copy": multiples,
        "goals": {kind: goal(multiples[kind], most) for kind, most in GOALS.items()},
    }


def consensus(name: str, dtype: torch.dtype, threads: int) -> Report:
    """Mix normal numbers, a million peers of a few each, until all agree with the mean."""
    found = topology.build(name, MILLION, 0)
    start = torch.randn(MILLION, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    first = distance(start)
    state = found.mixing(0).start(start)
    other = torch.empty_like(state)
    drawing, mixing_seconds, left = [], [], 1.0
    while left > TOLERANCES[dtype] and len(drawing) < MOST_ROUNDS:
        began = time.perf_counter()
        mixing = found.mixing(len(drawing))
        drawing.append(time.perf_counter() - began)
        mixing_seconds.append(
            seconds_of(lambda mixing=mixing, x=state, out=other: mix(mixing, x, out, threads), threads)
        )
        state, other = other, state
        left = distance(mixing.read(state)) / first
    return {
        "rounds": len(drawing),
        "relative distance": left,
        "reached": left <= TOLERANCES[dtype],
        "seconds a round": statistics.median(mixing_seconds),
        "seconds a draw": statistics.median(drawing),
    }


def distance(x: Tensor) -> float:
    """Return the Frobenius distance of the rows from their mean, computed in float64."""
    wide = x.double()
    return float((wide - wide.mean(0)).norm())


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    threads = arguments.threads
    before = machine()
    result = {
        "benchmark": "mixing",
        "machine": before,
        "versions": {name: version(name) for name in ("torch", "scipy", "numpy")}
        | {"python": platform.python_version()},
        "threads": threads,
        "repeats": arguments.repeats,
        "states": [one_state(n, d, threads, arguments.repeats) for n, d in STATES],
        "consensus": {
            "n": MILLION,
            "d": WIDTH,
            **{
                f"{name}, {str(dtype).removeprefix('torch.')} to {tolerance:g}": consensus(name, dtype, threads)
                for name in CONSENSUS
                for dtype, tolerance in TOLERANCES.items()
            },
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
