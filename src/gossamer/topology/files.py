"""Topologies from files or networkx graphs, with the latency and bandwidth of their links."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, model_validator

from gossamer.errors import ConfigError
from gossamer.topology.base import Floats, Integers, Stochasticity
from gossamer.topology.family import Family, Schedule, TopologyOptions, static
from gossamer.topology.sparse import TOLERANCE, Sparse
from gossamer.topology.weights import fastest, is_connected, metropolis

LINK_ATTRIBUTES = ("latency_seconds", "bandwidth_bytes_per_second")


class FileOptions(TopologyOptions):
    """Options of a graph from a file or from networkx.

    Attributes:
        path: path of a GraphML file (.graphml or .xml), or of a list of edges: two names a line, then attributes as in
            networkx, such as ``{"latency_seconds": 0.01}``; # starts a comment.
        graph: networkx graph, instead of a path. Peers are numbered in the order of its nodes.
        weights: "metropolis" (Metropolis-Hastings), "fastest" (best rate of symmetric weights; small n), or
            "given": the attribute "weight" of an edge sender -> receiver is W[receiver, sender]; the rest to 1 is the
            peer's own weight, and loops are refused.
        stochasticity: stochasticity of given weights: "doubly", "row" or "column".
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Path | None = None
    graph: Any = None
    weights: Literal["metropolis", "given", "fastest"] = "metropolis"
    stochasticity: Stochasticity = "doubly"

    @model_validator(mode="after")
    def _one_source(self) -> FileOptions:
        if (self.path is None) == (self.graph is None):
            raise ValueError("give either a path or a networkx graph")
        if self.weights != "given" and self.stochasticity != "doubly":
            raise ValueError(f"{self.weights} weights are doubly stochastic, not {self.stochasticity}: leave it out")
        return self


def read_graph(path: Path) -> Any:
    """Read a networkx graph from a file.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    from xml.etree.ElementTree import ParseError

    import networkx

    try:
        if path.suffix.lower() in (".graphml", ".xml"):
            return networkx.read_graphml(path)
        return networkx.read_edgelist(path)
    except (OSError, ParseError, networkx.NetworkXException, ValueError, TypeError, KeyError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read the graph {str(path)!r} ({reason}): give GraphML (.graphml) or a list of edges"
        ) from None


def _attribute(where: str, edges: list[Any], name: str, default: float) -> Floats:
    """Return one attribute of all edges, float64 [e], with `default` where an edge lacks it.

    Raises:
        ConfigError: a value is not a number, or below 0.
    """
    try:
        values = np.array([float(data.get(name, default)) for _, _, data in edges], dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: an edge's attribute {name!r} is not a number: correct the file") from None
    if name in LINK_ATTRIBUTES and bool(((values < 0) | np.isinf(values)).any()):
        raise ConfigError(f"{where}: an edge's {name} = {values.min():g} must be finite and not negative: correct it")
    return values


def _links(where: str, edges: list[Any]) -> tuple[Floats | None, Floats | None]:
    """Return latency and bandwidth of the edges, nan where unknown; None for what no edge has."""
    latency, bandwidth = (_attribute(where, edges, name, math.nan) for name in LINK_ATTRIBUTES)
    return (None if np.isnan(latency).all() else latency), (None if np.isnan(bandwidth).all() else bandwidth)


def _make(n: int, seed: int, options: FileOptions) -> Schedule:
    graph = read_graph(options.path) if options.path is not None else options.graph
    where = repr(str(options.path)) if options.path is not None else "the graph"
    if not hasattr(graph, "number_of_nodes") or not hasattr(graph, "is_multigraph"):
        raise ConfigError(f"file.graph = {type(graph).__name__} is not a networkx graph: give one, or a path")
    _check(graph, n, where, options)
    place = {name: number for number, name in enumerate(graph.nodes)}
    edges = list(graph.edges(data=True))
    sender = np.array([place[u] for u, _, _ in edges], dtype=np.int64)
    receiver = np.array([place[v] for _, v, _ in edges], dtype=np.int64)
    n, directed = len(place), graph.is_directed()
    if not is_connected(n, sender, receiver, directed):
        raise ConfigError(f"{where} is not connected: peers of different parts never agree; give a connected graph")
    weight = _weights(where, edges, n, receiver, sender, options)
    links = _links(where, edges)
    if not directed:
        receiver, sender = np.concatenate([receiver, sender]), np.concatenate([sender, receiver])
        weight = np.tile(weight, 2)
        links = tuple(None if link is None else np.tile(link, 2) for link in links)  # type: ignore[assignment]
    try:
        mixing = Sparse.of_edges(n, receiver, sender, weight, options.stochasticity, links)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    own = mixing.self_weights()
    if options.weights == "given" and own.min() < -TOLERANCE:
        raise ConfigError(
            f"{where}: the weights of peer {int(own.argmin())} sum to {1.0 - own.min():.6g}, above 1: scale them down"
        )
    return static(mixing, facts={"weights": options.weights})


def _check(graph: Any, n: int, where: str, options: FileOptions) -> None:
    """Check a graph before its weights.

    Raises:
        ConfigError: the graph has another number of peers than n, parallel edges or loops, or directed edges without
            weights.
    """
    found = graph.number_of_nodes()
    if n not in (0, found) or found < 2:
        wanted = f"n = {n} was asked for: leave n out" if found >= 2 else "at least two are needed: give a larger graph"
        raise ConfigError(f"{where} has {found} peers, but {wanted}")
    if graph.is_multigraph() and any(graph.number_of_edges(u, v) > 1 for u, v in graph.edges()):
        raise ConfigError(f"{where} has parallel edges: keep one for each pair")
    loop = next((u for u, v in graph.edges() if u == v), None)
    if loop is not None:
        raise ConfigError(f"{where} has a loop at {loop!r}: remove it, because a peer's own weight is the rest to 1")
    if graph.is_directed() and options.weights != "given":
        raise ConfigError(
            f"{where} is directed, but {options.weights} weights need an undirected graph: set weights to 'given'"
        )


def _weights(
    where: str, edges: list[Any], n: int, receiver: Integers, sender: Integers, options: FileOptions
) -> Floats:
    if options.weights == "metropolis":
        return metropolis(n, receiver, sender)
    if options.weights == "fastest":
        return fastest(n, receiver, sender)
    weight = _attribute(where, edges, "weight", math.nan)
    if not (weight > 0).all():
        bad = int((~(weight > 0)).argmax())
        raise ConfigError(
            f"{where}: the weight of edge {edges[bad][:2]} is {weight[bad]:g}: give each edge a positive attribute"
            " 'weight', or set weights to 'metropolis'"
        )
    return weight


file = Family(_make, "static", "as given", "as given", "a GraphML file or a list of edges", FileOptions, sets_n=True)
