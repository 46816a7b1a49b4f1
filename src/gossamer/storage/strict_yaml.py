"""YAML as far as a configuration needs it: mappings with distinct text keys, lists, text, numbers, true, false, null.

What goes beyond is refused in a sentence: duplicate keys, other tags, dates, values that do not parse as what they are
tagged, and files whose size, nesting or aliases exceed a bound.
"""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from gossamer.errors import ConfigError

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 32
MAX_DIGITS = 100
MAX_NODES = 100_000  # with those behind an alias counted each time
_PREFIX = "tag:yaml.org,2002:"
_TAGS_OF_KEYS = {_PREFIX + "str", _PREFIX + "merge"}
_NUMBERS = {_PREFIX + "int", _PREFIX + "float"}
_NOT_DECIMAL = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-9_.]+)+)")  # to the base of 8 or 60
_TAGS = _TAGS_OF_KEYS | {_PREFIX + name for name in ("map", "seq", "int", "float", "bool", "null")}


class _Refused(Exception):
    """What is beyond a configuration, and in which line."""

    def __init__(self, found: Any, problem: str) -> None:
        super().__init__(f"{problem} (line {found.start_mark.line + 1})")


class _Loader(yaml.SafeLoader):
    """Refuses what goes beyond a configuration."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of nodes, with all below them

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node, within the bounds."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(event, f"is nested deeper than {MAX_DEPTH} levels")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            raise _Refused(event, f"refers to *{event.anchor} inside itself")
        if node is not None and id(node) not in self._sizes:
            self._check(node)
        return node

    def _check(self, node: Node) -> None:
        """Check kind, keys and size of a node, below which all are checked."""
        if node.tag not in _TAGS:
            kind = node.tag.removeprefix(_PREFIX)
            remedy = "put it in quotes" if kind == "timestamp" else "write it plainly"
            raise _Refused(node, f"has a value of the kind {kind!r}, which no configuration needs: {remedy}")
        below = [] if isinstance(node, ScalarNode) else list(node.value)
        if isinstance(node, MappingNode):
            keys = set[str]()
            for key, _ in node.value:
                if key.tag not in _TAGS_OF_KEYS:
                    raise _Refused(key, "has a key that is no text: put it in quotes")
                if key.value in keys:
                    raise _Refused(key, f"has the key {key.value!r} a second time: keep one of them")
                keys.add(key.value)
            below = [part for pair in node.value for part in pair]
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(part)] for part in below)
        if size > MAX_NODES:
            raise _Refused(node, f"has more than {MAX_NODES:,} values, those behind an alias counted each time")

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Construct a value."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            kind = node.tag.removeprefix(_PREFIX)
            raise _Refused(node, f"has {str(node.value)[:40]!r} where {kind!r} is meant: correct it") from None
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _Refused(node, f"has a number of more than {MAX_DIGITS} digits: shorten it")
        if node.tag in _NUMBERS and _NOT_DECIMAL.fullmatch(node.value):
            raise _Refused(node, f"has {node.value!r}, which YAML reads as {value}: write that, or put it in quotes")
        return value


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML document.

    Args:
        where: what the text is, for errors, such as ``"'mine.yaml'"``.

    Raises:
        ConfigError: it is no YAML, or goes beyond what a configuration needs.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where} has {len(text):,} characters: give {MAX_CHARACTERS:,} at most")
    try:
        return _Loader(text).get_single_data()
    except _Refused as error:
        raise ConfigError(f"{where} {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace(' in "<unicode string>",', ",")
        raise ConfigError(f"{where} is not valid YAML: {reason}") from None


def read_yaml(path: Path | Traversable, what: str) -> Any:
    """Return the value of a YAML file in UTF-8.

    Args:
        what: what the file is, for errors, such as ``"topology"``.

    Raises:
        ConfigError: it cannot be read, see `parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {what} {str(path)!r} ({reason}): give the path of a YAML file") from None
    return parse_yaml(text, f"{what} {str(path)!r}")


def dump_yaml(data: Any) -> str:
    """Return YAML that is read as `data` again, with letters of all languages as they are."""
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    # PyYAML folds these, which end lines for Unicode alone.
    return yaml.safe_dump(data, sort_keys=False) if set("\x85\u2028\u2029") & set(text) else text
