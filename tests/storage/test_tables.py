"""Tables of text: what is read back is what was written, whatever characters there are."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from gossamer.storage.tables import aligned, as_csv, as_latex, as_markdown, escaped

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=8)
ROWS = [["method", "a_b"], ["50 % & more", "1 ± 2"], ["x|y", "-"]]


@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_csv_comes_back(rows: list[list[str]]) -> None:
    assert list(csv.reader(io.StringIO(as_csv(rows), newline=""))) == rows


def test_aligned() -> None:
    assert aligned(ROWS).splitlines() == ["method       a_b", "50 % & more  1 ± 2", "x|y          -"]


def test_markdown() -> None:
    assert as_markdown(ROWS).splitlines() == [
        "| method | a_b |",
        "| --- | ---: |",
        "| 50 % & more | 1 ± 2 |",
        r"| x\|y | - |",
    ]


def test_latex_in_the_style_of_booktabs() -> None:
    assert as_latex(ROWS).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & a\_b \\",
        r"\midrule",
        r"50 \% \& more & 1 $\pm$ 2 \\",
        r"x|y & - \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_special_characters_of_latex() -> None:
    assert escaped(r"\{a}~^$#") == r"\textbackslash{}\{a\}\textasciitilde{}\textasciicircum{}\$\#"
