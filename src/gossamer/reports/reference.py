"""Descriptions as tables: on a terminal, and as the Markdown of docs/reference.md.

``python -m gossamer.reports.reference docs/reference.md`` writes the latter, as ``make reference`` does.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gossamer.errors import storage_errors
from gossamer.reports.describe import GENERAL, KEYS, Entry, entry, kinds, names
from gossamer.reports.option_docs import Option
from gossamer.storage.tables import aligned

COLUMNS = 100
HEAD = """\
# Reference

Everything that a configuration may name, and every key that it may have. Written by `make reference` from the
docstrings and options of the code; `gossamer describe KIND NAME` shows the same on a terminal, plug-ins of your own
(`module:attribute`) included.
"""


def render(kind: str | None, name: str | None) -> str:
    """Return, as text, all kinds; or the names of one; or what there is to say of a name.

    Raises:
        RegistryError: the kind or the name is unknown.
    """
    if kind is None:
        return render_kinds()
    return render_kind(kind) if name is None else render_entry(entry(kind, name))


def as_json(kind: str | None, name: str | None) -> str:
    """Return the same as JSON: ``{kind: names}``, a list of entries, or an entry.

    Raises:
        RegistryError: the kind or the name is unknown.
    """
    if kind is None:
        found: Any = {one: names(one) for one in kinds()}
    else:
        found = [asdict(entry(kind, one)) for one in names(kind)] if name is None else asdict(entry(kind, name))
    return json.dumps(found, indent=2)


def render_kinds() -> str:
    """Return a table of all kinds and their names."""
    rows = [(kind, names(kind)) for kind in kinds()]
    lines = [_folded(f"{kind}: {', '.join(known)}") for kind, known in rows]
    return "\n".join([*lines, "", "gossamer describe KIND [NAME] says more."])


def render_kind(kind: str) -> str:
    """Return a table of the names of a kind, with a sentence each."""
    found = [entry(kind, name) for name in names(kind)]
    width = max(len(one.name) for one in found)
    rows = ((one.name, textwrap.shorten(_plain(one.about), COLUMNS - width, placeholder=" ...")) for one in found)
    where = [f"in a configuration: {KEYS[kind]}"] if kind in KEYS else []
    return "\n".join([aligned(rows), *where])


def render_entry(one: Entry) -> str:
    """Return what there is to say of one name, for a terminal."""
    lines = [f"{one.kind} {one.name}", "", *textwrap.wrap(_plain(one.about), COLUMNS), ""]
    facts = {**one.facts, **({"source": one.source} if one.source else {})}
    if one.kind in KEYS:
        facts["in a configuration"] = KEYS[one.kind]
    if facts:
        lines += [*(_folded(_plain(f"{name}: {value}")) for name, value in facts.items()), ""]
    for option in one.options:
        lines.append(f"{option.name}: {option.type}{_default(option)}")
        lines += textwrap.wrap(_plain(option.about), COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).rstrip()


def render_markdown() -> str:
    """Return everything as Markdown."""
    lines = [HEAD]
    for kind in ("config", *(one for one in kinds() if one != "config")):
        lines += _markdown_of_kind(kind)
    return "\n".join(lines)


def _markdown_of_kind(kind: str) -> Iterator[str]:
    found = [entry(kind, name) for name in names(kind)]
    yield f"## {'Configuration' if kind == 'config' else kind}\n"
    if kind in KEYS:
        yield f"In a configuration: {KEYS[kind]}.\n"
    if not any(one.options or one.source or one.facts for one in found):
        yield from ("| name | what it is |", "|---|---|")
        yield from (f"| `{one.name}` | {_cell(one.about)} |" for one in found)
        yield ""
        return
    shown: dict[tuple[Option, ...], str] = {}
    for one in found:
        yield f"### {'Keys outside of sections' if one.name == GENERAL else f'`{one.name}`'}\n"
        facts = [f"{name}: {value}" for name, value in one.facts.items()]
        facts += [f"source: {one.source}"] if one.source else []
        yield f"{_text(one.about)}\n"
        if facts:
            yield f"*{'; '.join(facts)}*\n"
        if one.options in shown:
            yield f"Options: those of `{shown[one.options]}`.\n"
        elif one.options:
            shown[one.options] = one.name
            yield from _table(one.options)


def _table(options: Sequence[Option]) -> Iterator[str]:
    yield from ("| key | type | default | |", "|---|---|---|---|")
    for one in options:
        default = "required" if one.required else f"`{one.default}`" if one.default else ""
        yield f"| `{one.name}` | {_cell(one.type)} | {_cell(default)} | {_cell(one.about)} |"
    yield ""


def _default(option: Option) -> str:
    return " (required)" if option.required else f" (default {option.default})" if option.default else ""


def _plain(text: str) -> str:
    """Return a text of a docstring without marks of code."""
    return text.replace("``", "").replace("`", "")


def _text(text: str) -> str:
    """Return a text of a docstring as Markdown."""
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _folded(text: str) -> str:
    return "\n".join(textwrap.wrap(text, COLUMNS, subsequent_indent="    ", break_on_hyphens=False))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference.md")
    with storage_errors(target):
        target.write_text(render_markdown(), encoding="utf-8")
