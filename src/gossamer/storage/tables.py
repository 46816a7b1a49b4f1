"""Rows of cells as aligned text, CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_ESCAPED = re.compile("|".join(map(re.escape, LATEX)))


def aligned(rows: Iterable[Iterable[str]]) -> str:
    """Return rows of cells as lines with aligned columns."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def as_csv(rows: Iterable[Iterable[str]]) -> str:
    """Return rows of cells as CSV, a line each."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_markdown(rows: Iterable[Iterable[str]]) -> str:
    """Return rows of cells, the first of which are headings, as a table of Markdown; numbers are at the right."""
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def as_latex(rows: Iterable[Iterable[str]]) -> str:
    """Return rows of cells, the first of which are headings, as a ``tabular`` in the style of ``booktabs``."""
    head, *body = [[escaped(cell) for cell in row] for row in rows]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    parts = [begin, r"\toprule", _line(head), r"\midrule", *map(_line, body), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Return text as LaTeX sets it."""
    return _ESCAPED.sub(lambda found: LATEX[found[0]], text)


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


FORMATS = {"text": aligned, "csv": as_csv, "markdown": as_markdown, "latex": as_latex}
