"""Files of graphs: whatever is written in them ends in the right graph, or in a sentence that says how to write it."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.topology import Topology

SQUARE = {(0, 1), (1, 2), (2, 3), (0, 3)}
GRAPHML = "<graphml xmlns='http://graphml.graphdrawing.org/xmlns'>{}<graph {}>{}</graph></graphml>"
NODES = "".join(f"<node id='{name}'/>" for name in "abc")
EDGES = "<edge source='a' target='b'/><edge source='b' target='c'/>"


def built(path: Path, content: str | bytes, **parameters: Any) -> Topology:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return topology.load(path, **parameters)


def pairs(found: Topology) -> set[tuple[int, int]]:
    """Return the (sender, receiver) of all edges; of an undirected graph each pair once, the lower number first."""
    edges = found.mixing(0).edges()
    every = set(zip(edges.sender.tolist(), edges.receiver.tolist(), strict=True))
    return {pair for pair in every if pair[0] < pair[1] or pair[::-1] not in every}


class TestWhatIsRead:
    @pytest.mark.parametrize(
        "text",
        [
            "0 1\n1 2\n2 3\n3 0\n",
            "0\t1\n1\t2\n2\t3\n3\t0",
            "0\t1\n1 2\n2  3\n 3 0 \n\n",
            "0,1\n1,2\n2,3\n3,0\n",
            "0, 1\n1, 2\n2, 3\n3, 0\n",
            "0;1\n1;2\n2;3\n3;0\n",
            '"0","1"\n"1","2"\n"2","3"\n"3","0"\n',
            "\ufeff0 1\r\n1 2\r\n2 3\r\n3 0\r\n",
            "0 1\r1 2\r2 3\r3 0\r",
            "# a square\n0 1 # an edge\n1 2\n#\n2 3\n3 0#\n",
            "source,target\n0,1\n1,2\n2,3\n3,0\n",
            "\ufeffSource,Target\r\n0,1\r\n1,2\r\n2,3\r\n3,0\r\n",
            "from to\n0 1\n1 2\n2 3\n3 0\n",
            "relation,receiver,sender\nx,1,0\ny,2,1\nz,3,2\n,0,3\n",
            "source,target\nNew York,Boston\nBoston,Rome\nRome,Oslo\nOslo,New York\n",
            "0 1\n1 0\n1 2\n2 1\n2 3\n3 2\n3 0\n0 3\n",
            "# Undirected graph: each pair once or twice\n0 1\n1 0\n1 2\n2 3\n3 0\n",
            "0 1 {}\n1 2 {'colour': 'red'}\n2 3\n3 0\n",
            "0,1,{}\n1,2,{'a': 1, 'b': 2}\n2,3,{}\n3,0,{}\n",
            "source,target,type\n0,1,Undirected\n1,2,Undirected\n2,3,Undirected\n3,0,Undirected\n",
        ],
        ids=range(20),
    )
    def test_a_square(self, tmp_path: Path, text: str) -> None:
        found = built(tmp_path / "a.txt", text)
        assert (found.n, pairs(found)) == (4, SQUARE)
        assert found.mixing(0).is_symmetric

    @pytest.mark.parametrize(
        ("text", "stochasticity", "expected"),
        [
            ("# undirected\n0 1 0.5\n1 2 0.25\n", "doubly", [[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.25, 0.75]]),
            (
                "# Directed: 3 edges\n0 1 .25\n1 2 .25\n2 0 .25",
                "doubly",
                [[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]],
            ),
            ("0,1,.25\n1,2,1\n2,0,.5", "row", [[0.5, 0, 0.5], [0.25, 0.75, 0], [0, 1, 0]]),
            ("0 1 .25\n1 0 .5", "row", [[0.5, 0.5], [0.25, 0.75]]),
            ("0 1 .25\n1 0 .25", "doubly", [[0.75, 0.25], [0.25, 0.75]]),
            ("target;weight;source\n1;.25;0\n0;.5;1", "row", [[0.5, 0.5], [0.25, 0.75]]),
            ("0 1 {'weight': .25}\n1 0 {'weight': .5}", "row", [[0.5, 0.5], [0.25, 0.75]]),
            ("source,target,type,weight\n0,1,Directed,.25\n1,0,Directed,.5", "row", [[0.5, 0.5], [0.25, 0.75]]),
        ],
        ids=range(8),
    )
    def test_directions_and_weights(self, tmp_path: Path, text: str, stochasticity: str, expected: Any) -> None:
        found = built(tmp_path / "a.csv", text, weights="given", stochasticity=stochasticity)
        np.testing.assert_allclose(found.mixing(0).dense(), expected, atol=1e-15)

    def test_links_in_columns(self, tmp_path: Path) -> None:
        text = "source,target,latency_seconds,bandwidth_bytes_per_second\n0,1,0.5,\n1,2,,8\n"
        edges = built(tmp_path / "a.csv", text).mixing(0).edges()
        np.testing.assert_array_equal(edges.latency_seconds, [0.5, 0.5, math.nan, math.nan])
        np.testing.assert_array_equal(edges.bandwidth_bytes_per_second, [math.nan, math.nan, 8, 8])

    @pytest.mark.parametrize("name", ["a.graphml", "a.GRAPHML", "a.xml", "a.txt", "noending", "a.XML"])
    def test_graphml_by_any_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        found = built(Path(name), GRAPHML.format("", "edgedefault='undirected'", NODES + EDGES))
        assert pairs(found) == {(0, 1), (1, 2)}

    def test_defaults_of_graphml(self, tmp_path: Path) -> None:
        """Networkx reads them, and leaves them out."""
        key = "<key id='d' for='edge' attr.name='latency_seconds' attr.type='double'><default>0.5</default></key>"
        edges = "<edge source='a' target='b'/><edge source='b' target='c'><data key='d'>2</data></edge>"
        found = built(tmp_path / "a.graphml", GRAPHML.format(key, "edgedefault='undirected'", NODES + edges))
        np.testing.assert_array_equal(found.mixing(0).edges().latency_seconds, [0.5, 0.5, 2.0, 2.0])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("text", "parameters", "message"),
        [
            ("", {}, "has no edges: write two names a line"),
            ("# nothing\n\n", {}, "has no edges"),
            (
                "0 1\n1\n",
                {},
                "line 2 of the graph .*, '1', has not 2 columns as the first one|has no second name: write two",
            ),
            ("0\n1\n", {}, "line 1 of the graph .*, '0', has no second name"),
            ("0 1 0.5\n1 2 0.5\n", {}, "has a third column: set weights to 'given' if it is a weight, or name all col"),
            ("0 1 0.5\n1 2 0.5\n", {"weights": "metropolis"}, "has a third column: "),
            ("0 1 0.5\n1 2 0.5\n", {"weights": "given"}, "has weights, each pair once: write '# undirected'"),
            ("# undirected\n0 1 x\n", {"weights": "given"}, "the weight of edge .'0', '1'., 'x', is not a number"),
            ("# undirected\n0 1 nan\n", {"weights": "given"}, "is nan, but must be finite"),
            ("# undirected\n0 1 -1\n", {"weights": "given"}, "is -1: give each edge a positive"),
            ("# undirected\n0 1 0\n", {"weights": "given"}, "is 0: give each edge a positive"),
            ("# undirected\n0 1\n", {"weights": "given"}, "is nan: give each edge a positive attribute 'weight'"),
            ("0 1 2\n1 2 0\n2 0 1\n", {}, "has a third column"),  # neighbours of each peer
            ("0 1 1\n1 0 1\n1 1 0\n", {"weights": "given"}, "has a loop at '1'"),  # a matrix
            ("0 1 .5 .5\n", {"weights": "given"}, "has too many columns: write two names"),
            ("0 1\n1 2\n0 1\n", {}, "line 3 of the graph .*, '0 1', repeats line 1"),
            ("0 1\n1 1\n", {}, "has a loop at '1'"),
            ("0 1\n1 2\n2 0\n1 0\n", {}, "is directed, but metropolis weights need an undirected graph"),
            ("# directed\n0 1\n1 0\n", {}, "is directed, but metropolis weights"),
            ("# directed\n# undirected\n0 1\n", {}, "says of its edges directed, undirected: keep one"),
            ("# undirected\n0 1 .5\n1 0 .25\n", {"weights": "given"}, "has other attributes the other way round"),
            ("source,target,type\n0,1,directed\n1,2,\n", {}, "says of its edges directed, none"),
            ("0 1\n2 3\n", {}, "line 1 .*, '0 1', has names that stand nowhere else"),
            ("0 1\n1 2\n3 4\n", {}, "is not connected"),
            (
                "Knoten,Nachbar\n0,1\n1,2\n",
                {},
                "'Knoten Nachbar', has names that stand nowhere else: write two names a line",
            ),
            ("source,target,source\n0,1,2\n", {}, "names a column twice"),
            ("source,target\n0,1,2\n", {}, "has not 2 columns as the first line"),
            ("source,target\n0,\n", {}, "has a name without letters and digits"),
            ("source,target,weight\n0,1,.5\n", {}, "has edges with weights: set weights to 'given'"),
            ("source,target,latency\n0,1,.5\n", {}, "the attribute 'latency' of edges has no effect"),
            ("source,target,bandwidth_bytes_per_second\n0,1,0\n", {}, "is 0, but must be in 0.001..1e.18"),
            ("New York,Boston\nBoston,Rome\n", {}, "has a name with a space: name the columns"),
            ("0 1,.5\n1 2,.5\n", {}, "has names that stand|has a name with a space"),
            (
                "0;1;0,5\n1;2;0,5\n",
                {"weights": "given", "stochasticity": "row"},
                "not connected|'0,5', is not a number",
            ),
            ("0 -> 1\n1 -> 2\n", {"weights": "given"}, "has a name without letters and digits"),
            ("0 -- 1\n1 -- 2\n", {}, "has a third column"),
            ("0 1 {oops\n", {}, "'0 1 {oops', cannot be read .no mapping of names to values"),
            ("0 1 {1: 2}\n", {}, "cannot be read .no mapping of names to values"),
            ('0 1 {"a"}\n', {}, "cannot be read"),
            ('"0,1\n', {}, "cannot be read"),
            ("graph [\n  node [\n", {}, "without letters|nowhere else|no second name"),
            ("digraph G {\n 0 -> 1;\n}\n", {}, "line 1 .* cannot be read"),
            (
                "%%MatrixMarket matrix coordinate real general\n3 3 2\n1 2 .5\n2 3 .5\n",
                {"weights": "given"},
                "nowhere else",
            ),
            ("*Vertices 2\n1 a\n2 b\n*Edges\n1 2\n", {}, "nowhere else|columns"),
            ("topology: ring\nn: 5\n", {}, "nowhere else"),
            (b"\xff\xfe0\x00 \x001\x00", {}, "cannot read the graph .*utf-8.*as UTF-8"),
            (b"0\x00 1\x00", {}, "zero bytes"),
        ],
        ids=range(47),
    )
    def test_lists(self, tmp_path: Path, text: str | bytes, parameters: dict[str, Any], message: str) -> None:
        self.refuse(tmp_path / "a.txt", text, message, parameters)

    @pytest.mark.parametrize(
        ("graph", "message"),
        [
            (
                GRAPHML.format("", "edgedefault='undirected'", NODES + EDGES.replace("'c'", "'d'")),
                "an edge to 'd', which",
            ),
            (
                GRAPHML.format("", "edgedefault='undirected'", NODES + EDGES.replace("source='a'", "")),
                "an edge to None",
            ),
            (GRAPHML.format("", "edgedefault='undirected'", NODES + NODES + EDGES), "two with the same one"),
            (GRAPHML.format("", "edgedefault='undirected'", "<node/>" + NODES + EDGES), "a node without an id"),
            (GRAPHML.format("", "", NODES + EDGES), "edgedefault is directed or undirected"),
            (GRAPHML.format("", "edgedefault='Directed'", NODES + EDGES), "edgedefault is directed or undirected"),
            (GRAPHML.format("", "edgedefault='directed'", NODES + EDGES), "is directed, but metropolis"),
            (GRAPHML.format("<graph/>", "edgedefault='undirected'", NODES + EDGES), "not one graph"),
            (GRAPHML.format("", "edgedefault='undirected'", NODES + EDGES + EDGES), "parallel edges"),
            (
                GRAPHML.format("", "edgedefault='undirected'", NODES + EDGES.replace("/>", " directed='true'/>")),
                "directed=true",
            ),
            (
                GRAPHML.format("", "edgedefault='undirected'", NODES + "<edge source='a' target='a'/>" + EDGES),
                "a loop at 'a'",
            ),
            (
                GRAPHML.format(
                    "", "edgedefault='undirected'", NODES + "<x:edge xmlns:x='y' source='a' target='c'/>" + EDGES
                ),
                "namespace",
            ),
            (
                GRAPHML.format(
                    "<key id='d' for='edge' attr.name='weight' attr.type='real'/>",
                    "edgedefault='undirected'",
                    NODES + EDGES,
                ),
                "cannot read .*real",
            ),
        ],
        ids=range(13),
    )
    def test_graphml(self, tmp_path: Path, graph: str, message: str) -> None:
        self.refuse(tmp_path / "a.graphml", graph, message, {})

    def test_a_topology_as_a_graph(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("{topology: ring, n: 5, source: this test}")
        with pytest.raises(ConfigError, match=r"a\.yaml' is no graph but a topology: name it as the topology itself"):
            topology.build("file", path=tmp_path / "a.yaml")
        with pytest.raises(ConfigError, match=r"b\.yaml\.topology = 'a\.yaml' is a file: write 'topology: file'"):
            built(tmp_path / "b.yaml", "{topology: a.yaml, source: this test}")

    def refuse(self, path: Path, content: str | bytes, message: str, parameters: dict[str, Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            built(path, content, **parameters)
        assert re.search(message, str(caught.value)), caught.value
        assert "\n" not in str(caught.value)


NAMES = st.text(st.sampled_from("abcXYZ0189_.-é"), min_size=1, max_size=4).filter(
    lambda name: any(map(str.isalnum, name))
)


@st.composite
def graphs(draw: st.DrawFn) -> Any:
    """A connected undirected graph with some links."""
    names = draw(st.lists(NAMES, min_size=2, max_size=7, unique=True))
    graph = networkx.Graph()
    graph.add_edges_from((names[draw(st.integers(0, i - 1))], names[i]) for i in range(1, len(names)))
    for one, other in draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=4)):
        if one != other:
            graph.add_edge(one, other)
    for *_, data in graph.edges(data=True):
        data.update(draw(st.fixed_dictionaries({}, optional={"latency_seconds": st.floats(0, 9)})))
    return graph


def written(draw: Any, graph: Any) -> str:
    """Return a list of the edges in one of many ways to write it."""
    delimiter = draw(st.sampled_from([" ", "\t", ",", ", ", ";"]))
    named, end = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    lines = ["# edges"] if draw(st.booleans()) else []
    lines += [delimiter.join(["source", "target", "latency_seconds"])] if named else []
    missing = "" if delimiter.strip() else None
    for one, other, data in graph.edges(data=True):
        value = data.get("latency_seconds", missing)
        cells = [one, other, *([] if not named else [str(value)])]
        braces = " " + repr(data) if not named and (data or draw(st.booleans())) else ""
        lines.append(delimiter.join(cells) + (delimiter if braces and draw(st.booleans()) else "") + braces)
    return draw(st.sampled_from(["", "\ufeff"])) + end.join(lines) + draw(st.sampled_from(["", end]))


class TestFuzz:
    @given(graph=graphs(), data=st.data())
    def test_however_it_is_written(
        self, tmp_path_factory: pytest.TempPathFactory, graph: Any, data: st.DataObject
    ) -> None:
        text = written(data.draw, graph)
        path = tmp_path_factory.mktemp("graph") / "a.txt"
        if "None" in text:  # no empty cell between spaces
            return
        expected = networkx.Graph()  # numbered in the order of lines
        expected.add_edges_from(graph.edges(data=True))
        ours, theirs = built(path, text), topology.build("file", graph=expected)
        assert ours.digest() == theirs.digest(), text

    @given(graph=graphs(), data=st.data())
    def test_damage(self, tmp_path_factory: pytest.TempPathFactory, graph: Any, data: st.DataObject) -> None:
        """A piece is cut out, repeated or replaced: the file is read, or refused in one line."""
        is_xml = data.draw(st.booleans())
        text = "\n".join(networkx.generate_graphml(graph)) if is_xml else written(data.draw, graph)
        low = data.draw(st.integers(0, len(text)))
        high = data.draw(st.integers(low, min(len(text), low + 12)))
        new = data.draw(
            st.sampled_from(["", "\0", "#", "{", "}", '"', ",", "\n", "<", ">", "&x;", "nan", "-1", text[low:high] * 2])
        )
        weights = data.draw(st.sampled_from([None, "given", "metropolis"]))
        path = tmp_path_factory.mktemp("graph") / ("a.graphml" if is_xml else "a.txt")
        message, found = "", None
        try:
            found = built(path, text[:low] + new + text[high:], **({} if weights is None else {"weights": weights}))
        except ConfigError as error:
            message = str(error)
        assert "\n" not in message
        assert found is None or found.mixing(0).self_weights().min() > -1e-9

    @given(
        lines=st.lists(
            st.lists(
                st.sampled_from(["0", "1", "2", "a", "0.5", "source", "target", "#", "->"]), min_size=1, max_size=4
            ),
            max_size=4,
        ),
        delimiter=st.sampled_from([" ", ",", "\t"]),
        weights=st.sampled_from(["given", "metropolis"]),
    )
    def test_any_words(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[list[str]], delimiter: str, weights: str
    ) -> None:
        """What is accepted has the names and the edges of its lines, one for one, but for their other way round."""
        text, found = "\n".join(map(delimiter.join, lines)), None
        with contextlib.suppress(ConfigError):
            found = built(tmp_path_factory.mktemp("graph") / "a.txt", text, weights=weights)
        if found is None:
            return
        rows = [line[: line.index("#")] if "#" in line else line for line in lines]
        rows = [row for row in rows if row]
        names = {name for row in rows for name in row[:2]}
        if len(names) > found.n:  # the first line is a header
            assert {"source", "target"} <= {*rows[0]}
            order = [rows[0].index(name) for name in ("source", "target")]
            rows = [[row[place] for place in order] for row in rows[1:]]
            names = {name for row in rows for name in row}
        assert {len(row) for row in rows} <= {2, 3}
        assert found.n == len(names)
        number = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row[:2]))}
        listed = {(number[row[0]], number[row[1]]) for row in rows}
        assert pairs(found) <= {*listed, *(pair[::-1] for pair in listed)}
        assert {frozenset(pair) for pair in pairs(found)} == {frozenset(pair) for pair in listed}
