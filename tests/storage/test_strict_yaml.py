"""YAML of configurations: what is read, and what is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gossamer.errors import ConfigError
from gossamer.storage.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


class TestRead:
    @pytest.mark.parametrize(
        "text",
        [
            "a: 1\nb: [1.5, -2, 1e3, .5, true, null, ~, text, 'quoted', \"x\"]\nc: {d: {e: []}}\n",
            "base: &base {lr: 0.1, steps: 1}\none: {<<: *base, lr: 0.2}\nother: *base\n",
            "both: [&one {a: 1}, {<<: [*one, {b: 2}], a: 3}]\n",
            "",
            "- 1\n- 2\n",
            "'2001-01-01': '0.5'\n",
            "a: !!str 1\nb: !!float 1\n",
            "text: |\n  two\n  lines\n",
        ],
    )
    def test_as_yaml_does(self, text: str) -> None:
        assert parse_yaml(text, "it") == yaml.safe_load(text)

    def test_the_deepest(self) -> None:
        text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
        assert parse_yaml(text, "it") == yaml.safe_load(text)

    def test_a_file_with_a_byte_order_mark(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_bytes("a: ä\n".encode("utf-8-sig"))
        assert read_yaml(tmp_path / "a.yaml", "configuration") == {"a": "ä"}


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a: 1\nb: 2\na: 3\n", "it has the key 'a' a second time: keep one of them (line 3)"),
            ("a: {b: 1, b: 1}\n", "it has the key 'b' a second time"),
            ("a: {<<: {x: 1}, <<: {y: 2}}\n", "it has the key '<<' a second time"),
            ("1: 2\n", "it has a key that is no text: put it in quotes (line 1)"),
            ("yes: 2\n", "it has a key that is no text"),
            ("[1]: 2\n", "it has a key that is no text"),
            ("? {a: 1}\n: 2\n", "it has a key that is no text"),
            (
                "a: 2001-01-01\n",
                "it has a value of the kind 'timestamp', which no configuration needs: put it in quotes",
            ),
            ("a: 2001-99-99\n", "the kind 'timestamp'"),
            ("a: 010\n", "it has '010', which YAML reads as 8: write that, or put it in quotes (line 1)"),
            ("a: [1:30]\n", "it has '1:30', which YAML reads as 90"),
            ("a: -1:30.5\n", "it has '-1:30.5', which YAML reads as -90.5"),
            (f"a: 0x{'f' * 5000}\n", "it has a number of more than 100 digits: shorten it (line 1)"),
            ("a: !!timestamp x\n", "the kind 'timestamp'"),
            ("a: !!binary aGk=\n", "the kind 'binary', which no configuration needs: write it plainly (line 1)"),
            ("a: !!set {b, c}\n", "the kind 'set'"),
            ("a: !!omap [b: 1]\n", "the kind 'omap'"),
            ("a: !!python/object/apply:os.system [true]\n", "the kind 'python/object/apply:os.system'"),
            ("a: !mine 1\n", "the kind '!mine'"),
            ("a: =\n", "the kind 'value'"),
            ("a: !!int x\n", "it has 'x' where 'int' is meant: correct it (line 1)"),
            ("a: !!float x\n", "it has 'x' where 'float' is meant"),
            ("a: !!bool maybe\n", "it has 'maybe' where 'bool' is meant"),
            ("a: " + "9" * 5000, "where 'int' is meant"),
            ("a: !!int ''\n", "it has '' where 'int' is meant"),
            ("a: &a [*a]\n", "it refers to *a inside itself (line 1)"),
            ("a: &a {b: {c: *a}}\n", "it refers to *a inside itself"),
            ("a: *b\n", "it is not valid YAML: found undefined alias"),
            ("[" * (MAX_DEPTH + 1), f"it is nested deeper than {MAX_DEPTH} levels"),
            ("- " * 20000 + "x", "it is nested deeper"),
            (BOMB, "it has more than 100,000 values, those behind an alias counted each time"),
            ("a" * (MAX_CHARACTERS + 1), "it has 262,145 characters: give 262,144 at most"),
            ("a: 1\n---\na: 2\n", "it is not valid YAML: expected a single document"),
            ("a: [\n", "it is not valid YAML: while parsing a flow node"),
            ("a: \x00\n", "it is not valid YAML: unacceptable character"),
            ("%YAML 3.0\n---\na: 1\n", "it is not valid YAML: found incompatible YAML document"),
        ],
        ids=lambda text: text[:24],
    )
    def test_in_a_sentence(self, text: str, expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_yaml(text, "it")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_files(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b", tmp_path / ("a" * 300)):
            with pytest.raises(ConfigError, match=r"^cannot read topology '.*' \(.*\): give the path of a YAML file"):
                read_yaml(path, "topology")
        (tmp_path / "a.yaml").write_bytes(b"\xff\xff")
        with pytest.raises(ConfigError, match=r"^cannot read topology '.*a.yaml' \('utf-8' codec"):
            read_yaml(tmp_path / "a.yaml", "topology")
        (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
        with pytest.raises(ConfigError, match=r"^topology '.*a.yaml' has the key 'a' a second time"):
            read_yaml(tmp_path / "a.yaml", "topology")
