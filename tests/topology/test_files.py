"""Graphs from outside: files, networkx graphs, links, and the specifications and networks of the topologies folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import yaml

from gossamer import topology
from gossamer.errors import ConfigError, GossamerWarning
from gossamer.topology import networks

FOLDER = Path(__file__).parents[2] / "topologies"
PATH = networkx.path_graph(3)


def weighted(*edges: tuple[int, int, float], directed: bool = False) -> Any:
    graph = networkx.DiGraph() if directed else networkx.Graph()
    graph.add_nodes_from(range(1 + max(max(edge[:2]) for edge in edges)))
    graph.add_weighted_edges_from(edges)
    return graph


class TestGraphs:
    def test_metropolis_by_default(self) -> None:
        found = topology.build("file", graph=PATH)
        third = 1 / 3
        np.testing.assert_allclose(
            found.mixing(0).dense(), [[2 * third, third, 0], [third, third, third], [0, third, 2 * third]]
        )
        assert (found.n, found.kind, found.mixing(0).edges().latency_seconds) == (3, "static", None)

    def test_given_weights(self) -> None:
        found = topology.build("file", graph=weighted((0, 1, 0.5), (1, 2, 0.25)), weights="given")
        np.testing.assert_allclose(
            found.mixing(0).dense(), [[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]], atol=1e-15
        )

    @pytest.mark.parametrize(
        ("stochasticity", "expected"),
        [("row", [[0.5, 0, 0.5], [0.25, 0.75, 0], [0, 1, 0]]), ("column", [[0.75, 0, 0.5], [0.25, 0, 0], [0, 1, 0.5]])],
    )
    def test_directed_given_weights(self, stochasticity: str, expected: list[list[float]]) -> None:
        """An edge u -> v says what v gives to u's row."""
        graph = weighted((0, 1, 0.25), (1, 2, 1.0), (2, 0, 0.5), directed=True)
        mixing = topology.build("file", graph=graph, weights="given", stochasticity=stochasticity).mixing(0)
        np.testing.assert_allclose(mixing.dense(), expected, atol=1e-15)
        assert mixing.send_ranks(0) == [1]
        with pytest.raises(ConfigError, match=r"the weights of column 1 sum to 1.75, not 1"):
            topology.build("file", graph=graph, weights="given")

    def test_attributes_that_are_not_read_are_told(self, recwarn: pytest.WarningsRecorder) -> None:
        graph = networkx.Graph()
        graph.add_edge("a", "b", strength=1.0, relation="peer")
        topology.build("file", graph=graph)
        assert not len(recwarn)  # nobody would take these for links
        graph.add_edge("b", "c", rtt=0.1, link_capacity=3, strength=1.0)
        read = "latency_seconds, bandwidth_bytes_per_second, weight$"
        with pytest.warns(GossamerWarning, match=rf"edges have rtt, link_capacity, which change nothing: .* {read}"):
            topology.build("file", graph=graph)

    def test_links_follow_their_edges(self) -> None:
        graph = networkx.Graph()
        graph.add_nodes_from("abcd")
        graph.add_edge("d", "a", latency_seconds=0.1)
        graph.add_edge("b", "a", latency_seconds=0.2, bandwidth_bytes_per_second=5)
        graph.add_edge("c", "b")
        for lazy in (False, True):
            edges = topology.build("file", graph=graph, lazy=lazy).mixing(0).edges()
            assert edges.latency_seconds is not None
            assert edges.bandwidth_bytes_per_second is not None
            pairs = list(zip(edges.receiver.tolist(), edges.sender.tolist(), strict=True))
            assert pairs == [(0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (3, 0)]
            np.testing.assert_array_equal(edges.latency_seconds, [0.2, 0.1, 0.2, math.nan, math.nan, 0.1])
            np.testing.assert_array_equal(edges.bandwidth_bytes_per_second[:3], [5, math.nan, 5])

    @pytest.mark.parametrize(
        ("graph", "parameters", "message"),
        [
            (networkx.Graph([(0, 1), (2, 3)]), {}, "the graph is not connected"),
            (networkx.path_graph(1), {}, "the graph has 1 peers, but at least two are needed"),
            (networkx.path_graph(0), {}, "the graph has 0 peers"),
            (PATH, {"n": 4}, "the graph has 3 peers, but n = 4 was asked for: leave n out"),
            (networkx.Graph([(0, 1), (1, 1)]), {}, "the graph has a loop at 1"),
            (networkx.MultiGraph([(0, 1), (0, 1)]), {}, "the graph has parallel edges"),
            (networkx.DiGraph([(0, 1), (1, 0)]), {}, "directed, but metropolis weights need an undirected graph"),
            (weighted((0, 1, 0.5), (1, 2, 1.0), directed=True), {"weights": "given"}, "is not connected"),
            (PATH, {"weights": "given"}, r"the weight of edge \(0, 1\) is nan: give each edge a positive"),
            (weighted((0, 1, -0.5)), {"weights": "given"}, r"the weight of edge \(0, 1\) is -0.5"),
            (weighted((0, 1, 0.7), (1, 2, 0.7)), {"weights": "given"}, "weights of peer 1 sum to 1.4, above 1"),
            (PATH, {"stochasticity": "row"}, "metropolis weights are doubly stochastic, not row"),
            (PATH, {"path": "a.graphml"}, "give either a path or a networkx graph"),
            (None, {}, "give either a path or a networkx graph"),
            ([(0, 1)], {}, r"file.graph = list is not a networkx graph"),
            (
                networkx.Graph([(0, 1, {"latency_seconds": -1})]),
                {},
                "latency_seconds of edge .* is -1, but must be in 0",
            ),
            (
                networkx.Graph([(0, 1, {"latency_seconds": "far"})]),
                {},
                "latency_seconds of edge .*, 'far', is not a number",
            ),
            (
                networkx.Graph([(0, 1, {"bandwidth_bytes_per_second": 0})]),
                {},
                "is 0, but must be in 0.001..1e.18: correct",
            ),
            (networkx.Graph([(0, 1, {"latency_seconds": math.nan})]), {}, "is nan, but must be in"),
            (networkx.Graph([(0, 1, {"latency_seconds": True})]), {}, "'?True'?, is not a number"),
            (
                networkx.Graph([(0, 1, {"latency": 0.5})]),
                {},
                "the attribute 'latency' of edges has no effect.*rename it",
            ),
            (
                networkx.Graph([(0, 1, {"bandwith_bytes_per_second": 5})]),
                {},
                "no effect; did you mean 'bandwidth_bytes_",
            ),
            (
                weighted((0, 1, 0.5)),
                {},
                "edges with weights: set weights to 'given' to mix by them, or to 'metropolis'",
            ),
            (weighted((0, 1, math.inf)), {"weights": "given"}, "is inf, but must be finite"),
            (weighted((0, 1, math.nan)), {"weights": "given"}, "is nan, but must be finite"),
        ],
        ids=lambda value: value[:24] if isinstance(value, str) else "",
    )
    def test_refusals(self, graph: Any, parameters: dict[str, Any], message: str) -> None:
        given = parameters if graph is None else {"graph": graph, **parameters}
        with pytest.raises(ConfigError, match=message) as caught:
            topology.build("file", **given)
        assert "\n" not in str(caught.value)


class TestFiles:
    def test_graphml_and_lists_of_edges(self, tmp_path: Path) -> None:
        graph = networkx.cycle_graph(5)
        networkx.write_graphml_xml(graph, tmp_path / "a.graphml")
        (tmp_path / "a.txt").write_text('# a ring\n0 1 {"latency_seconds": 0.5}\n1 2\n2 3\n3 4\n4 0\n')
        digests = {topology.build("file", path=tmp_path / name).mixing(0).digest() for name in ("a.graphml", "a.txt")}
        assert digests == {topology.build("file", graph=graph).mixing(0).digest()}
        latency = topology.build("file", path=str(tmp_path / "a.txt")).mixing(0).edges().latency_seconds
        assert latency is not None
        assert sorted(latency[~np.isnan(latency)]) == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("none.graphml", None), ("none.txt", None), ("bad.graphml", "<graphml"), ("other.graphml", "<a></a>")],
    )
    def test_what_cannot_be_read(self, tmp_path: Path, name: str, content: str | None) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=f"cannot read the graph .*{name}") as caught:
            topology.build("file", path=tmp_path / name)
        assert "\n" not in str(caught.value)


class TestSpecifications:
    @pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_one_builds_and_names_its_source(self, path: Path) -> None:
        found = topology.load(path)
        assert found.consensus_rate() < 1 - 1e-6
        assert yaml.safe_load(path.read_text())["source"]
        assert found.mixing(0).n == found.n

    def test_arguments_replace_what_it_says(self) -> None:
        path = FOLDER / "onepeer-od-equidyn.yaml"
        plain, changed = topology.load(path), topology.load(path, n=17, seed=4, M=3)
        assert (plain.n, plain.seed, plain.facts["M"], plain.facts["eta"]) == (300, 0, 9, 0.5)
        assert (changed.n, changed.seed, changed.facts["M"], changed.facts["eta"]) == (17, 4, 3, 0.5)

    def test_paths_start_at_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert topology.load(FOLDER / "karate-club.yaml").n == 34

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("topology: ring\nn: 5\n", "missing key 'a.yaml.source'"),
            ("topology: ring\nsource: x\nm: 5\n", "unknown key 'a.yaml.m'"),
            ("- ring\n", r"a.yaml must be a mapping"),
            ("topology: [", r"topology .*a.yaml' is not valid YAML"),
            (None, r"cannot read topology .*did you mean 'b.yaml'"),
        ],
        ids=["source", "unknown", "list", "malformed", "missing"],
    )
    def test_refusals(self, tmp_path: Path, content: str | None, message: str) -> None:
        (tmp_path / "b.yaml").write_text("topology: ring\n")
        if content is not None:
            (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            topology.load(tmp_path / "a.yaml")


class TestDigests:
    """What tells an edited file from one that draws the same graph."""

    def of(self, path: Path, text: str) -> str:
        path.write_text(text)
        return topology.load(path).digest()

    def test_of_specifications(self, tmp_path: Path) -> None:
        path, text = tmp_path / "a.yaml", "{topology: d-equistatic, n: 40, seed: 1, parameters: {M: 5}, source: x}"
        first = self.of(path, text)
        assert self.of(path, "# a comment\n" + text.replace("source: x", "source: y")) == first
        for change in (("n: 40", "n: 41"), ("seed: 1", "seed: 2"), ("M: 5", "M: 4"), ("d-equi", "u-equi")):
            assert self.of(path, text.replace(*change)) != first

    @pytest.mark.parametrize("name", ["od-equidyn", "ou-equidyn"])
    def test_of_rounds_that_are_drawn_anew(self, tmp_path: Path, name: str) -> None:
        """Even where their first rounds agree."""
        text = f"{{topology: {name}, n: 3, seed: 0, parameters: {{M: 1}}, source: x}}"
        found = {self.of(tmp_path / "a.yaml", text.replace("seed: 0", f"seed: {seed}")) for seed in range(6)}
        assert len(found) == 6

    def test_of_cycles(self) -> None:
        assert len({topology.build("base", n, k=k).digest() for n in (11, 12) for k in (1, 2, 3)}) == 6
        assert topology.build("ring", 5, seed=1).digest() == topology.build("ring", 5, seed=2).digest()

    def test_of_graphs_and_their_links(self, tmp_path: Path) -> None:
        path, text = tmp_path / "a.txt", '0 1 {"latency_seconds": 0.5}\n1 2\n2 3\n'
        first = self.of(path, text)
        assert self.of(path, text.replace("1 2", "1  2  # the same")) == first
        changes = [("0.5", "0.25"), ("latency_seconds", "bandwidth_bytes_per_second"), ("2 3", "1 3"), ("0.5", "0")]
        assert first not in {self.of(path, text.replace(*change)) for change in changes}


class TestNetworks:
    def test_the_folder_is_what_the_program_writes(self, tmp_path: Path) -> None:
        written = networks.write(tmp_path)
        assert {path.name for path in written} == {path.name for path in FOLDER.glob("*.graphml")}
        for path in written:
            ours, theirs = (networkx.read_graphml(folder / path.name) for folder in (tmp_path, FOLDER))
            assert list(ours.nodes(data=True)) == list(theirs.nodes(data=True)), path.name
            assert list(ours.edges(data=True)) == list(theirs.edges(data=True)), path.name
            assert ours.graph == theirs.graph
            assert ours.graph["source"]

    @pytest.mark.parametrize(("name", "n"), networks.INTERNET.items())
    def test_links_of_the_internet(self, name: str, n: int) -> None:
        edges = topology.build("file", path=FOLDER / f"{name}.graphml").mixing(0).edges()
        assert edges.latency_seconds is not None
        assert edges.bandwidth_bytes_per_second is not None
        assert 0.0005 < edges.latency_seconds.min() < 0.01 < edges.latency_seconds.max() < 0.2
        assert set(edges.bandwidth_bytes_per_second / networks.GIGABIT_BYTES) <= {1, 10, 40, 100}
        assert np.bincount(edges.receiver, minlength=n).min() >= 1

    def test_sizes(self) -> None:
        sizes = {path.stem: networkx.read_graphml(path).number_of_nodes() for path in FOLDER.glob("*.graphml")}
        assert sizes == {
            "karate-club": 34,
            "davis-southern-women": 32,
            "florentine-families": 15,
            "les-miserables": 77,
            "internet-50": 50,
            "internet-200": 200,
        }

    def test_no_python_among_the_data(self) -> None:
        assert {path.suffix for path in FOLDER.iterdir()} == {".yaml", ".graphml"}
