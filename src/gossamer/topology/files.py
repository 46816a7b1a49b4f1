"""Topologies from files or networkx graphs, with the latency and bandwidth of their links."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, model_validator

from gossamer.errors import ConfigError, nearest, warn
from gossamer.topology.base import Floats, Integers, Stochasticity
from gossamer.topology.edgelists import read_edges
from gossamer.topology.family import Family, Schedule, TopologyOptions, static
from gossamer.topology.sparse import TOLERANCE, Sparse
from gossamer.topology.weights import fastest, is_connected, metropolis

LINK_RANGES = {"latency_seconds": (0.0, 1e9), "bandwidth_bytes_per_second": (1e-3, 1e18)}
KNOWN = (*LINK_RANGES, "weight")
OF_LINKS = {
    *("rtt", "ping", "time", "ms", "distance", "dist", "length", "km"),
    *("capacity", "throughput", "speed", "rate", "bps", "bw", "cost", "loss"),
}  # words in names of attributes that are meant for links, but not read
GRAPHML = (".graphml", ".xml")


class FileOptions(TopologyOptions):
    """Options of a graph from a file or from networkx.

    Attributes:
        path: path of a GraphML file (.graphml or .xml), or of a list of edges, see `edgelists`.
        graph: networkx graph, instead of a path. Peers are numbered in the order of its nodes.
        weights: "metropolis" (Metropolis-Hastings), "fastest" (best rate of symmetric weights; small n), or
            "given": the attribute "weight" of an edge sender -> receiver is W[receiver, sender]; the rest to 1 is the
            peer's own weight, and loops are refused. None: "metropolis", where no edge has a weight.
        stochasticity: stochasticity of given weights: "doubly", "row" or "column".
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Path | None = None
    graph: Any = None
    weights: Literal["metropolis", "given", "fastest"] | None = None
    stochasticity: Stochasticity = "doubly"

    @model_validator(mode="after")
    def _one_source(self) -> FileOptions:
        if (self.path is None) == (self.graph is None):
            raise ValueError("give either a path or a networkx graph")
        if self.weights != "given" and self.stochasticity != "doubly":
            weights = self.weights or "metropolis"
            raise ValueError(
                f"{weights} weights are doubly stochastic, not {self.stochasticity}: leave it out, or set weights to"
                " 'given'"
            )
        return self


def read_graph(path: Path, options: FileOptions) -> Any:
    """Read a networkx graph from a file.

    Raises:
        ConfigError: the file is missing or malformed, or may be read in several ways.
    """
    from xml.etree.ElementTree import ParseError

    import networkx

    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"{str(path)!r} is no graph but a topology: name it as the topology itself, without 'file'")
    try:
        if path.suffix.lower() in GRAPHML:
            return _read_graphml(path)
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("<"):
            return _read_graphml(path)
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except (OSError, ParseError, networkx.NetworkXException, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read the graph {str(path)!r} ({reason}): give GraphML (.graphml) or a list of edges, as UTF-8"
        ) from None
    return read_edges(path, text, options.weights == "given", options.stochasticity != "doubly")


def _read_graphml(path: Path) -> Any:
    """Read GraphML of one graph, with the defaults of its edges, and nothing but what it declares."""
    from xml.etree import ElementTree

    import networkx

    def named(element: Any, name: str) -> list[Any]:
        """Return the children of a name, whatever their namespace."""
        return [each for each in element if each.tag.rpartition("}")[2] == name]

    root = ElementTree.parse(path).getroot()
    graphs = named(root.iter(), "graph")
    if len(graphs) != 1 or graphs[0].get("edgedefault") not in ("directed", "undirected"):
        raise ValueError("not one graph whose edgedefault is directed or undirected")
    declared = [node.get("id") for node in named(graphs[0], "node")]
    if len({*declared} - {None}) < len(declared):
        raise ValueError("a node without an id, or two with the same one")
    ends = [edge.get(end) for edge in named(graphs[0], "edge") for end in ("source", "target")]
    unknown = next((end for end in ends if end not in {*declared}), "")
    if unknown != "":
        raise ValueError(f"an edge to {unknown!r}, which is not declared as a node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ports, which change nothing
        graph = networkx.read_graphml(path)
    if (graph.number_of_nodes(), 2 * graph.number_of_edges()) != (len(declared), len(ends)):
        raise ValueError("nodes or edges outside of the graph's namespace")
    for _, _, data in graph.edges(data=True):
        data.update({**graph.graph["edge_default"], **data})
    return graph


def attribute_of(where: str, edges: list[Any], name: str) -> Floats:
    """Return one attribute of all edges, float64 [e], nan where an edge lacks it.

    Args:
        where: what the edges are of, for messages.
        edges: (node, node, attributes) each.
        name: of the attribute.

    Raises:
        ConfigError: it is no number, or out of `LINK_RANGES`.
    """
    low, high = LINK_RANGES.get(name, (-math.inf, math.inf))
    values = np.full(len(edges), math.nan)
    for index, (*ends, data) in enumerate(edges):
        given = data.get(name, "")
        if given == "":  # an empty cell, or an empty element
            continue
        try:
            if isinstance(given, bool) or "_" in str(given):
                raise ValueError
            values[index] = float(given)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}: the {name} of edge {tuple(ends)}, {given!r:.40}, is not a number: correct it"
            ) from None
        if not low <= values[index] <= high or math.isinf(values[index]):
            proper = f"in {low:g}..{high:g}" if name in LINK_RANGES else "finite"
            raise ConfigError(
                f"{where}: the {name} of edge {tuple(ends)} is {values[index]:g}, but must be {proper}: correct it, or"
                " remove an edge that carries nothing"
            )
    return values


def _check_attributes(where: str, edges: list[Any], weights: str | None) -> None:
    """Refuse attributes that would change nothing: misspelt ones, and weights that nothing says to mix by."""
    names = {str(name): None for *_, data in edges for name in data}  # in order
    for name in names:
        near = nearest(name.lower(), KNOWN, cutoff=0.85)
        if name not in KNOWN and (near or any(word in name.lower() for word in ("latency", "bandwidth", "delay"))):
            raise ConfigError(
                f"{where}: the attribute {name!r} of edges has no effect{near} (known: {', '.join(KNOWN)}): rename it"
            )
    unread = [name for name in names if name not in KNOWN and {*re.split(r"[\W_\d]+", name.lower())} & OF_LINKS]
    if unread:
        read = ", ".join(KNOWN)
        warn([f"{where}: edges have {', '.join(unread)}, which change nothing: what is read of an edge is {read}"])
    if weights is None and "weight" in names:
        raise ConfigError(
            f"{where} has edges with weights: set weights to 'given' to mix by them, or to 'metropolis' to compute"
            " others from the degrees"
        )


def _links(where: str, edges: list[Any]) -> tuple[Floats | None, Floats | None]:
    """Return latency and bandwidth of the edges, nan where unknown; None for what no edge has."""
    latency, bandwidth = (attribute_of(where, edges, name) for name in LINK_RANGES)
    return (None if np.isnan(latency).all() else latency), (None if np.isnan(bandwidth).all() else bandwidth)


def _make(n: int, seed: int, options: FileOptions) -> Schedule:
    """A graph of your own, from GraphML, a list of edges or networkx; its links may have latency and bandwidth."""
    graph = read_graph(options.path, options) if options.path is not None else options.graph
    where = repr(str(options.path)) if options.path is not None else "the graph"
    if not hasattr(graph, "number_of_nodes") or not hasattr(graph, "is_multigraph"):
        raise ConfigError(f"file.graph = {type(graph).__name__} is not a networkx graph: give one, or a path")
    _check(graph, n, where, options)
    place = {name: number for number, name in enumerate(graph.nodes)}
    edges = list(graph.edges(data=True))
    _check_attributes(where, edges, options.weights)
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
    return static(mixing, facts={"weights": options.weights or "metropolis"})


def _check(graph: Any, n: int, where: str, options: FileOptions) -> None:
    """Refuse another number of peers than n, parallel edges, loops, and directed edges without weights."""
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
            f"{where} is directed, but {options.weights or 'metropolis'} weights need an undirected graph: set weights"
            " to 'given', or give each pair once, without a direction"
        )


def _weights(
    where: str, edges: list[Any], n: int, receiver: Integers, sender: Integers, options: FileOptions
) -> Floats:
    if options.weights != "given":
        return (fastest if options.weights == "fastest" else metropolis)(n, receiver, sender)
    weight = attribute_of(where, edges, "weight")
    if not (weight > 0).all():
        bad = int((~(weight > 0)).argmax())
        raise ConfigError(
            f"{where}: the weight of edge {edges[bad][:2]} is {weight[bad]:g}: give each edge a positive attribute"
            " 'weight', or set weights to 'metropolis'"
        )
    return weight


file = Family(_make, "static", "as given", "as given", "a GraphML file or a list of edges", FileOptions, sets_n=True)
