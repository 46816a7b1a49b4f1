"""The documents name files that exist, and keep their bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gossamer

ROOT = Path(__file__).parents[1]
SOURCE = Path(gossamer.__file__).parent


def paths(text: str) -> set[str]:
    """Return everything in backticks that looks like a module or a folder."""
    return {name for name in re.findall(r"`([\w/]+(?:\.py|/))`", text) if "/" in name or name.endswith(".py")}


def exists(path: str) -> bool:
    """Say whether a path exists below the source, below the repository, or as a file of that name anywhere below."""
    if (SOURCE / path).exists() or (ROOT / path).exists():
        return True
    return "/" not in path and any(SOURCE.rglob(path))


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_paths_exist(name: str) -> None:
    found = paths((ROOT / name).read_text())
    assert [path for path in sorted(found) if not exists(path)] == []


def test_missing_paths_are_noticed() -> None:
    assert paths("`engines/nowhere.py` and `rounds.py` in `engines/`, `a.b`") == {
        "engines/nowhere.py",
        "rounds.py",
        "engines/",
    }
    assert not exists("engines/nowhere.py")
    assert not exists("nowhere.py")


def test_the_tree_of_the_readme() -> None:
    """Every package and module at the top of the source stands in it."""
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("src/gossamer/       ") : text.index("Read first:")]
    names = [path.name for path in SOURCE.iterdir() if path.name.removesuffix(".py").isidentifier()]
    top = [name for name in names if not name.startswith("__")]
    assert [name for name in sorted(top) if not re.search(rf"(?<![\w/.]){re.escape(name)}", tree)] == []


def read_first(name: str) -> list[str]:
    """Return the files that a document says to read first."""
    text = (ROOT / name).read_text()
    return re.findall(r"`([\w/]+\.py)`", text[text.index("Read first") :].split("\n\n")[0])


def test_the_walk_is_short_and_names_five_files() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 80
    assert len(read_first("README.md")) == 5
    assert read_first("README.md") == read_first("docs/architecture.md")
