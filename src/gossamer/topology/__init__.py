"""Topologies: graphs and sequences of graphs on peers, as mixings of their states, and how fast these contract."""

from gossamer.topology.base import Edges, Mixing
from gossamer.topology.consensus import Measurement, measure
from gossamer.topology.family import Family, Schedule, TopologyOptions
from gossamer.topology.mixings import BlockAverage, Matching, Shift
from gossamer.topology.sparse import Joint, Sparse
from gossamer.topology.topology import Topology, build, find, is_file, load

__all__ = [
    "BlockAverage",
    "Edges",
    "Family",
    "Joint",
    "Matching",
    "Measurement",
    "Mixing",
    "Schedule",
    "Shift",
    "Sparse",
    "Topology",
    "TopologyOptions",
    "build",
    "find",
    "is_file",
    "load",
    "measure",
]
