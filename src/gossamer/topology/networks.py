"""Writes the networks of ``topologies/*.graphml``: ``python -m gossamer.topology.networks topologies``.

Four are small social networks that networkx ships. Two look like the internet's autonomous systems (Elmokashfi et al.,
"On the scalability of BGP", 2008; `networkx.random_internet_as_graph`), with these links:

- latency, one way: log-normal with median 20 ms between transit networks, 10 ms from a network to its provider, 5 ms
  between others that peer, sigma 0.5;
- bandwidth, bytes per second: uniform among 10, 40 and 100 Gbit/s between transit networks, 1 and 10 Gbit/s elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer import rng
from gossamer.errors import storage_errors

GIGABIT_BYTES = 125_000_000
SIGMA = 0.5
INTERNET_SEED = 0
SOCIAL = {
    "karate-club": ("karate_club_graph", "Zachary, Journal of Anthropological Research 33, 1977"),
    "davis-southern-women": ("davis_southern_women_graph", "Davis, Gardner and Gardner, Deep South, 1941"),
    "florentine-families": ("florentine_families_graph", "Padgett and Ansell, American Journal of Sociology 98, 1993"),
    "les-miserables": ("les_miserables_graph", "Knuth, The Stanford GraphBase, 1993"),
}
INTERNET = {"internet-50": 50, "internet-200": 200}


def social(name: str) -> Any:
    """Return one of the networks of `SOCIAL`, as a networkx graph without node attributes."""
    import networkx

    function, source = SOCIAL[name]
    make: Callable[[], Any] = getattr(networkx, function)
    found = make()
    graph = networkx.Graph(source=f"{source}; as shipped by networkx")
    graph.add_nodes_from(str(node) for node in found)
    for one, other, data in found.edges(data=True):
        strength = {"strength": float(data["weight"])} if "weight" in data else {}
        graph.add_edge(str(one), str(other), **strength)
    return graph


def internet(n: int, seed: int = INTERNET_SEED) -> Any:
    """Return a network of n autonomous systems with latency and bandwidth of each link, as a networkx graph."""
    import networkx

    source = rng.generator(seed, "internet-graph", extra=n)
    found = networkx.random_internet_as_graph(n, seed=source)
    graph = networkx.Graph(
        source=f"networkx.random_internet_as_graph, n = {n}, seed = {seed}; latency and bandwidth drawn, see"
        " gossamer.topology.networks"
    )
    kinds = networkx.get_node_attributes(found, "type")
    for node in sorted(found):
        graph.add_node(str(node), type=kinds[node])
    links = sorted((min(pair), max(pair), data["type"]) for *pair, data in found.edges(data=True))
    draws = rng.generator(seed, "internet-links", extra=n)
    for one, other, kind in links:
        core = {kinds[one], kinds[other]} <= {"T", "M"}
        median = 0.020 if core else 0.010 if kind == "transit" else 0.005
        speeds = (10, 40, 100) if core else (1, 10)
        graph.add_edge(
            str(one),
            str(other),
            relation=kind,
            latency_seconds=round(median * float(draws.lognormal(0.0, SIGMA)), 6),
            bandwidth_bytes_per_second=float(speeds[int(draws.integers(len(speeds)))] * GIGABIT_BYTES),
        )
    return graph


def write(folder: Path) -> list[Path]:
    """Write all networks as GraphML and return their paths.

    Raises:
        StorageError: a file cannot be written.
    """
    import networkx

    graphs = {name: social(name) for name in SOCIAL} | {name: internet(n) for name, n in INTERNET.items()}
    paths = []
    for name, graph in graphs.items():
        path = folder / f"{name}.graphml"
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            networkx.write_graphml_xml(graph, path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    print("\n".join(map(str, write(Path(sys.argv[1] if len(sys.argv) > 1 else "topologies")))))
