"""Lists of edges as text: one edge a line, read as exactly one graph or refused.

A line has two names, separated by spaces, tabs, commas or semicolons, then attributes: a number, the weight, or a
mapping such as ``{"latency_seconds": 0.01}``. A first line such as ``source,target,weight`` names the columns instead.
# starts a comment, and a comment ``# directed`` or ``# undirected`` says what lines are. Where none does, a list that
has both directions of some pairs is directed, unless each line has an equal line the other way round.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import ConfigError

ENDS = (("source", "target"), ("sender", "receiver"), ("from", "to"), ("src", "dst"))
DIRECTIONS = {"directed", "undirected"}
ADVICE = "write two names a line, or name all columns in the first line, such as 'source target latency_seconds'"


class Line(NamedTuple):
    """The cells of a line, its attributes in braces, and its number."""

    number: int
    cells: list[str]
    attributes: dict[str, Any]


class Edge(NamedTuple):
    """An edge, and the number of its line."""

    number: int
    sender: str
    receiver: str
    attributes: dict[str, Any]


def read_edges(path: Path, text: str, weighted: bool, directed: bool) -> Any:
    """Return the networkx graph of a list of edges, its nodes in the order in which they are named.

    Args:
        path: path of the file, for errors.
        text: text of the file.
        weighted: whether the weights of edges are going to be used.
        directed: whether edges have a direction where the file does not say.

    Raises:
        ConfigError: the list may be read in several ways, or in none.
    """
    stated, lines = _split(path, text)
    if not lines:
        raise ConfigError(f"the graph {str(path)!r} has no edges: {ADVICE}")
    edges = list(_named(path, lines) if _has_header(lines) else _plain(path, lines, weighted))
    types = {str(edge.attributes.get("type")).lower() for edge in edges}  # as Gephi writes it
    stated |= types if types & DIRECTIONS else set()
    if len(stated) > 1:
        raise ConfigError(f"the graph {str(path)!r} says of its edges {', '.join(sorted(stated))}: keep one of them")
    return _graph(path, edges, next(iter(stated), None), weighted, directed)


def _split(path: Path, text: str) -> tuple[set[str], list[Line]]:
    """Return what comments say of the direction, and the lines."""
    stated, contents = set[str](), []
    for number, line in enumerate(text.split("\n"), start=1):
        content, _, comment = line.partition("#")
        if content.strip():
            contents.append((number, *content.strip().partition("{")))
        elif comment.split():
            stated |= {comment.split()[0].lower().rstrip(":,.;")} & DIRECTIONS
    heads = [head for _, head, *_ in contents]
    delimiter = next((one for one in ";," if any(one in head for head in heads)), None)
    if delimiter is None and all("\t" in head for head in heads):
        delimiter = "\t"
    lines = []
    for number, head, brace, rest in contents:
        try:
            attributes = ast.literal_eval(brace + rest) if brace else {}
            if not isinstance(attributes, dict) or not all(isinstance(key, str) for key in attributes):
                raise ValueError
            cells = next(csv.reader([head], delimiter=delimiter, strict=True), []) if delimiter else head.split()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, csv.Error) as error:
            reason = "no mapping of names to values" if brace else " ".join(str(error).split())
            raise _refusal(path, number, head + brace + rest, f"cannot be read ({reason})") from None
        cells = [cell.strip() for cell in cells]
        lines.append(Line(number, cells[:-1] if brace and cells[-1:] == [""] else cells, attributes))
    return stated, lines


def _has_header(lines: list[Line]) -> bool:
    """Say whether the first line names columns: if its names stand nowhere else, no peer of a graph has them."""
    head = {cell.lower() for cell in lines[0].cells}
    others = {cell.lower() for line in lines[1:] for cell in line.cells}
    return len(lines) > 1 and any({*pair} <= head and not {*pair} & others for pair in ENDS)


def _named(path: Path, lines: list[Line]) -> Iterator[Edge]:
    """Yield the edges below a first line that names the columns."""
    head = [cell.lower() for cell in lines[0].cells]
    if len({*head}) < len(head):
        raise _refusal(path, lines[0].number, " ".join(head), "names a column twice", "rename one of them")
    ends = next(pair for pair in ENDS if {*pair} <= {*head})
    for number, cells, attributes in lines[1:]:
        if len(cells) != len(head):
            raise _refusal(path, number, " ".join(cells), f"has not {len(head)} columns as the first line")
        row = {name: cell for name, cell in zip(head, cells, strict=True) if cell} | attributes
        sender, receiver = (_name(path, number, str(row.pop(end, ""))) for end in ends)
        yield Edge(number, sender, receiver, row)


def _plain(path: Path, lines: list[Line], weighted: bool) -> Iterator[Edge]:
    """Yield the edges of lines without named columns: two names, and the weight if it is going to be used."""
    first, width = lines[0].cells[:2], len(lines[0].cells)
    if len(lines) > 1 and width > 1 and not {*first} & {cell for line in lines[1:] for cell in line.cells[:2]}:
        raise _refusal(path, lines[0].number, " ".join(first), "has names that stand nowhere else")
    for number, cells, attributes in lines:
        text = " ".join(cells)
        if len(cells) < 2:
            raise _refusal(path, number, text, "has no second name")
        if len(cells) > 3 or len(cells) != width:
            reason = "has too many columns" if len(cells) > 3 else f"has not {width} columns as the first one"
            raise _refusal(path, number, text, reason)
        if width == 3 and not weighted:
            remedy = "set weights to 'given' if it is a weight, or name all columns in the first line, such as"
            raise _refusal(path, number, text, "has a third column", f"{remedy} 'source target weight'")
        sender, receiver = (_name(path, number, cell) for cell in cells[:2])
        if len((sender + receiver).split()) > 1:
            remedy = "name the columns in the first line, such as 'source,target'"
            raise _refusal(path, number, text, "has a name with a space", remedy)
        yield Edge(number, sender, receiver, attributes | ({"weight": cells[2]} if width == 3 else {}))


def _name(path: Path, number: int, name: str) -> str:
    if not any(character.isalnum() for character in name):
        raise _refusal(path, number, name, "has a name without letters and digits")
    return name


def _graph(path: Path, edges: list[Edge], direction: str | None, weighted: bool, directed: bool) -> Any:
    import networkx

    seen: dict[tuple[str, str], Edge] = {}
    for edge in edges:
        known = seen.setdefault((edge.sender, edge.receiver), edge)
        if known is not edge:
            reason = f"repeats line {known.number}"
            raise _refusal(path, edge.number, f"{edge.sender} {edge.receiver}", reason, "keep one of them")
    both = [pair for pair in seen if pair[::-1] in seen and pair[0] != pair[1]]
    unlike = next((pair for pair in both if seen[pair].attributes != seen[pair[::-1]].attributes), None)
    if direction == "undirected" and unlike is not None:
        reason = "has other attributes the other way round"
        raise _refusal(path, seen[unlike].number, " ".join(unlike), reason, "keep one of them")
    has_weights = weighted and any("weight" in edge.attributes for edge in edges)
    if direction is None and has_weights and not both and not directed:
        raise ConfigError(
            f"the graph {str(path)!r} has weights, each pair once: write '# undirected' into its first line if both"
            " ends weigh each other so, or '# directed' if only the second one weighs the first"
        )
    if direction is None and (directed or unlike is not None or 0 < len(both) < len(seen)):
        direction = "directed"
    graph = networkx.DiGraph() if direction == "directed" else networkx.Graph()
    graph.add_edges_from((*pair, edge.attributes) for pair, edge in seen.items())
    return graph


def _refusal(path: Path, number: int, line: str, reason: str, remedy: str = ADVICE) -> ConfigError:
    return ConfigError(f"line {number} of the graph {str(path)!r}, {line[:60]!r}, {reason}: {remedy}")
