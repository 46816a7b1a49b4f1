"""Text data sets: what counts as a role's speech, how the real file divides, and what is said of wrong data."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigError, DataError
from gossamer.workloads.texts import TextData, parse_roles, shakespeare, synthetic

needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA names no folder with shakespeare"
)
PLAY = """A line before anyone speaks

First Witch:
When shall we three meet again:
In thunder, lightning, or in rain?

Second Witch:
When the hurlyburly's done,

a line after a blank one that names nobody

Ghost:

First Witch:
Where the place?

:
Anon:

ALL:
Fair is foul"""


class TestRoles:
    def test_a_small_play(self) -> None:
        assert parse_roles(PLAY) == {
            "First Witch": "When shall we three meet again:\nIn thunder, lightning, or in rain?"
            "\n\nWhere the place?\n\n:\nAnon:",
            "Second Witch": "When the hurlyburly's done,\n\na line after a blank one that names nobody",
            "ALL": "Fair is foul",
        }

    @pytest.mark.parametrize("text", ["", "\n", "nobody speaks\n", "Ghost:\n\n", "\n\nGhost:\n\n\nGhost:"])
    def test_nobody_speaks(self, text: str) -> None:
        assert parse_roles(text) == {}

    def test_the_first_line_may_name_a_role(self) -> None:
        assert parse_roles("ROMEO:\nAh") == {"ROMEO": "Ah"}
        assert parse_roles("\nROMEO:\nAh\n") == {"ROMEO": "Ah"}

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["A", "King B", "C of D"]),
                st.lists(st.text("xyz ,", min_size=1, max_size=5), max_size=3),
            ),
            max_size=8,
        )
    )
    def test_what_is_put_together_is_taken_apart(self, speeches: list[tuple[str, list[str]]]) -> None:
        play = "\n\n".join("\n".join([f"{role}:", *lines]) for role, lines in speeches)
        expected: dict[str, list[str]] = {}
        for role, lines in speeches:
            expected.setdefault(role, []).extend(["\n".join(lines)] if lines else [])
        assert parse_roles(play) == {role: "\n\n".join(texts) for role, texts in expected.items() if texts}


class TestShakespeare:
    @pytest.fixture
    def play(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "shakespeare" / "input.txt"
        path.parent.mkdir()
        path.write_text(PLAY, encoding="utf-8")
        monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
        return path

    @pytest.mark.usefixtures("play")
    def test_the_end_of_every_role_is_held_out(self) -> None:
        data = shakespeare({"min_characters": 12, "test_share": 0.25})
        roles = parse_roles(PLAY)
        assert data.owners == tuple(roles)
        assert data.vocabulary == "".join(sorted(set(PLAY)))
        for role, train, test in zip(data.owners, data.train, data.test, strict=True):
            assert train + test == roles[role]
            assert len(test) == -(-len(roles[role]) // 4)
        assert shakespeare({"min_characters": 13}).owners == ("First Witch", "Second Witch")

    def test_missing_files(self, play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        play.unlink()
        with pytest.raises(
            DataError, match=r"input\.txt' is missing: put Tiny Shakespeare .* there, or set GOSSAMER_DATA"
        ):
            shakespeare({})
        play.mkdir()
        with pytest.raises(DataError, match="cannot read data file"):
            shakespeare({})
        monkeypatch.delenv("GOSSAMER_DATA")
        with pytest.raises(
            DataError, match=r"GOSSAMER_DATA is not set: set it to a folder that holds shakespeare/input"
        ):
            shakespeare({})

    def test_unreadable_text(self, play: Path) -> None:
        play.write_bytes(b"ROMEO:\n\xff")
        with pytest.raises(DataError, match="cannot read data file"):
            shakespeare({})

    @pytest.mark.usefixtures("play")
    def test_wrong_options(self) -> None:
        with pytest.raises(
            DataError, match=r"no role .* has workload\.dataset\.min_characters = 2000 characters: lower it"
        ):
            shakespeare({})
        with pytest.raises(ConfigError, match=r"min_character'; did you mean 'min_characters'"):
            shakespeare({"min_character": 3})

    @needs_data
    def test_the_real_file(self) -> None:
        everyone, largest = shakespeare({"min_characters": 20}), shakespeare({})
        path = Path(os.environ["GOSSAMER_DATA"]) / "shakespeare" / "input.txt"
        text = path.read_text(encoding="utf-8")
        assert (len(text), len(largest.vocabulary)) == (1_115_394, 65)
        assert (len(parse_roles(text)), len(largest.owners)) == (299, 99)
        assert largest.vocabulary == everyone.vocabulary == "".join(sorted(set(text)))
        for owner, train, test in zip(largest.owners, largest.train, largest.test, strict=True):
            assert f"{owner}:\n" in text
            assert len(train) + len(test) >= 2000
            assert 0 <= len(test) - 0.2 * (len(train) + len(test)) < 1


class TestSynthetic:
    def test_sizes(self) -> None:
        data = synthetic({"num_owners": 4, "num_characters": 40, "num_test_characters": 9, "num_symbols": 3})
        assert [len(text) for text in data.train] == [40, 50, 60, 40]
        assert [len(text) for text in data.test] == [9] * 4
        assert data.vocabulary == "abc"
        assert len({text[:40] for text in data.train}) == 4

    def test_without_noise_the_next_character_is_certain(self) -> None:
        data = synthetic({"noise": 0.0, "num_symbols": 5})
        successors: dict[str, set[str]] = {}
        for text in (*data.train, *data.test):
            for character, following in itertools.pairwise(text):
                successors.setdefault(character, set()).add(following)
        assert all(len(found) == 1 for found in successors.values())

    def test_the_seed_alone_decides(self) -> None:
        assert synthetic({"seed": 1}).train == synthetic({"seed": 1}).train
        assert synthetic({"seed": 1}).train != synthetic({"seed": 2}).train


class TestTextData:
    def build(self, **changes: Any) -> TextData:
        fields = {"name": "mine", "vocabulary": "ab", "owners": ("x",), "train": ("aab",), "test": ("ba",)}
        return TextData(**(fields | changes))  # type: ignore[arg-type]

    def test_encoding(self) -> None:
        data = self.build(vocabulary="\naé🎭", train=("a\n",), test=("é🎭",))
        assert np.array_equal(data.encode("🎭a\né"), [3, 1, 0, 2])
        assert data.encode("").dtype == np.int64

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocabulary": "ba"}, "has the vocabulary 'ba': give every character once, sorted"),
            ({"vocabulary": "aab"}, "give every character once"),
            ({"owners": ("x", "y")}, "has 2 owners, 1 training texts and 1 test texts"),
            ({"owners": (), "train": (), "test": ()}, "at least one owner"),
            ({"test": ("a",)}, "the test text of 'x' in data set 'mine' has 1 characters: give it two or more"),
            ({"train": ("abc",)}, "the training text of 'x' in data set 'mine' has the character 'c'"),
        ],
    )
    def test_wrong_data_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.build(**changes)
