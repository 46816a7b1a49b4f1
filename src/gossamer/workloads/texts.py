"""Texts of many owners: the roles of plays, and a synthetic one.

A data set of your own is a function ``(options: Mapping) -> TextData``, named as ``my_package.my_module:my_texts``.
"""

from __future__ import annotations

import math
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gossamer import rng
from gossamer.errors import DataError
from gossamer.memory import require_memory
from gossamer.options import Options, parse_options, takes

WHERE = "workload.dataset"


@dataclass(frozen=True, eq=False)
class TextData:
    """A training and a test text of every owner.

    Attributes:
        name: name in messages.
        vocabulary: all characters that may occur, each once, in ascending order.
        owners: whose texts they are, such as the roles of a play.
        train, test: one text an owner, of two characters or more.

    Raises:
        DataError: a text is missing or too short, or has a character that the vocabulary lacks.
    """

    name: str
    vocabulary: str
    owners: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.vocabulary or self.vocabulary != "".join(sorted(set(self.vocabulary))):
            raise DataError(
                f"data set {self.name!r} has the vocabulary {self.vocabulary!r:.80}: give every character once, sorted"
            )
        if not len(self.owners) == len(self.train) == len(self.test) >= 1:
            raise DataError(
                f"data set {self.name!r} has {len(self.owners)} owners, {len(self.train)} training texts and"
                f" {len(self.test)} test texts: give one of each to every owner, and at least one owner"
            )
        for split, texts in (("training", self.train), ("test", self.test)):
            for owner, text in zip(self.owners, texts, strict=True):
                where = f"the {split} text of {owner!r} in data set {self.name!r}"
                if len(text) < 2:
                    raise DataError(f"{where} has {len(text)} characters: give it two or more, or leave the owner out")
                unknown = set(text) - set(self.vocabulary)
                if unknown:
                    raise DataError(f"{where} has the character {min(unknown)!r}: add it to the vocabulary or drop it")

    @property
    def num_labels(self) -> int:
        """Characters of the vocabulary."""
        return len(self.vocabulary)

    def hold_out(self, share: float, seed: int) -> TextData:
        """Return this data set with the ends of the training texts, a share of each, in the place of the test texts.

        The seed changes nothing.

        Raises:
            DataError: a text is too short for it.
        """
        lengths = [len(text) - math.ceil(len(text) * share) for text in self.train]
        train, test = zip(*((text[:n], text[n:]) for text, n in zip(self.train, lengths, strict=True)), strict=True)
        return replace(self, train=train, test=test)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the place of each character in the vocabulary, int64 [len(text)]."""
        points = np.frombuffer(self.vocabulary.encode("utf-32-le"), dtype=np.uint32)
        return np.searchsorted(points, np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)).astype(np.int64)


class RoleOptions(Options):
    """Options of `shakespeare`.

    Attributes:
        min_characters: length of the shortest text, line breaks included, that makes a role an owner.
        test_share: share of each role's text, its end, that is held out for testing; rounded up to characters.
    """

    min_characters: int = Field(2000, ge=1)
    test_share: float = Field(0.2, gt=0, lt=1)


def parse_roles(text: str) -> dict[str, str]:
    """Collect what every role of a play says.

    A line that ends in a colon, has something before it, and stands at the start or after a blank line names the role
    that speaks from the next line on, until another one is named. A role's text is its speeches in their order, with a
    blank line between two of them. Roles of the same name are one, even in different plays; silent ones are left out,
    as is what stands before the first name.

    Returns:
        ``{role: text}`` in the order of first appearance; no text begins or ends with a line break.
    """
    speeches: dict[str, list[list[str]]] = {}
    speech: list[str] = []
    previous = ""
    for line in text.split("\n"):
        if not previous and len(line) > 1 and line.endswith(":"):
            speech = []
            speeches.setdefault(line[:-1], []).append(speech)
        else:
            speech.append(line)
        previous = line
    spoken = {role: ["\n".join(lines).strip("\n") for lines in each] for role, each in speeches.items()}
    texts = {role: "\n\n".join(speech for speech in each if speech) for role, each in spoken.items()}
    return {role: found for role, found in texts.items() if found}


@takes(RoleOptions)
def shakespeare(options: Mapping[str, Any]) -> TextData:
    """Tiny Shakespeare (1,115,394 characters of his plays; Karpathy, char-rnn, 2015), one owner a role.

    The file is ``$GOSSAMER_DATA/shakespeare/input.txt``. It has 299 roles with a speech (see `parse_roles`), 99 of them
    with 2,000 characters or more. The vocabulary is that of the whole file: 65 characters.

    Args:
        options: see `RoleOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the file is missing or unreadable, or no role has enough characters.
    """
    chosen = parse_options(RoleOptions, options, WHERE)
    text = _read_play()
    roles = {role: spoken for role, spoken in parse_roles(text).items() if len(spoken) >= chosen.min_characters}
    if not roles:
        raise DataError(
            f"no role of data set 'shakespeare' has {WHERE}.min_characters = {chosen.min_characters} characters:"
            " lower it"
        )
    texts = tuple(roles.values())
    whole = TextData("shakespeare", "".join(sorted(set(text))), tuple(roles), texts, texts)
    return whole.hold_out(chosen.test_share, seed=0)


def _read_play() -> str:
    """Return the text of the file.

    Raises:
        DataError: it is missing or unreadable.
    """
    root = os.environ.get("GOSSAMER_DATA")
    if not root:
        raise DataError(
            "data set 'shakespeare' needs a file but GOSSAMER_DATA is not set: set it to a folder that holds"
            " shakespeare/input.txt"
        )
    path = Path(root) / "shakespeare" / "input.txt"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"data file {str(path)!r} is missing: put Tiny Shakespeare (1,115,394 characters) there, or set"
            " GOSSAMER_DATA to the folder that holds shakespeare/input.txt"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read data file {str(path)!r} ({error}): fetch it again") from None


class SyntheticTextOptions(Options):
    """Options of `synthetic`.

    Attributes:
        num_owners: number of owners.
        num_characters: length of the shortest training text; owner i has ``i % 3`` quarters of it more.
        num_test_characters: length of each test text.
        num_symbols: size of the vocabulary, lower-case letters.
        noise: probability that a character is drawn at random.
        seed: seed of all draws.
    """

    num_owners: int = Field(8, ge=1)
    num_characters: int = Field(200, ge=2)
    num_test_characters: int = Field(50, ge=2)
    num_symbols: int = Field(8, ge=1, le=26)
    noise: float = Field(0.2, ge=0, le=1)
    seed: int = 0


@takes(SyntheticTextOptions)
def synthetic(options: Mapping[str, Any]) -> TextData:
    """Letters each of which has one likely successor: learnable, and made in code.

    A character follows the last one by a fixed random permutation of the vocabulary, or is uniform noise.

    Args:
        options: see `SyntheticTextOptions`.

    Raises:
        ConfigError: an unknown or wrong option, or more text than this machine could hold.
    """
    chosen = parse_options(SyntheticTextOptions, options, WHERE)
    length = chosen.num_characters + chosen.num_test_characters
    what = f"{WHERE} 'synthetic' of {chosen.num_owners:,} owners and {length:,} characters each"
    require_memory(chosen.num_owners * length, what, "take fewer or shorter texts")
    successor = rng.generator(chosen.seed, "synthetic-text").permutation(chosen.num_symbols)

    def written(owner: int, purpose: str, length: int) -> str:
        """Return one owner's text."""
        source = rng.generator(chosen.seed, purpose, participant=owner)
        noisy, drawn = source.random(length) < chosen.noise, source.integers(chosen.num_symbols, size=length)
        codes = [int(drawn[0])]
        for i in range(1, length):
            codes.append(int(drawn[i] if noisy[i] else successor[codes[-1]]))
        return "".join(string.ascii_lowercase[code] for code in codes)

    quarter, owners = chosen.num_characters // 4, range(chosen.num_owners)
    return TextData(
        "synthetic",
        string.ascii_lowercase[: chosen.num_symbols],
        tuple(f"owner {owner}" for owner in owners),
        tuple(written(i, "synthetic-text-train", chosen.num_characters + i % 3 * quarter) for i in owners),
        tuple(written(i, "synthetic-text-test", chosen.num_test_characters) for i in owners),
    )
