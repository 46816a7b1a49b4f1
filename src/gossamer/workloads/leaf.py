"""Data sets of LEAF (Caldas et al., arXiv 1812.01097), as its scripts write them: JSON files of users, each with tests.

FEMNIST becomes images, Shakespeare and Sent140 tokens, lists of numbers a table. A sample of Sent140 is a list of six
texts (number, date, query, user, tweet, and which part of Sentiment140 it is of), of which the tweet is read by words:
these are fewer than its characters, and what LEAF's own models see.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from gossamer.errors import DataError, warn
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets import WHERE
from gossamer.workloads.sample_data import OwnTestData

Arrays = tuple[NDArray[Any], NDArray[np.int64]]  # samples, labels
LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"  # LEAF's 80
FEMNIST_PIXELS, FEMNIST_CLASSES = 28 * 28, 62
TWEET = 4  # its place in a sample of Sent140
POLARITIES = {0: 0, 1: 1, 2: 0, 4: 1}  # LEAF writes 0 and 1, neutral tweets as 0; Sentiment140 itself 0, 2 and 4
WORD = re.compile(r"[\w']+|[.,!?;]")  # as LEAF divides texts
PADDING, UNKNOWN = 0, 1  # tokens that are no words


class LeafOptions(Options):
    """Options of `leaf`.

    Attributes:
        path: folder with the folders ``train`` and ``test`` of JSON files, such as LEAF's ``data/femnist/data``.
        num_users: number of users that are kept, the first by name; None: all of them.
        max_words: words of a tweet that are kept, the first.
        num_tokens: most tokens of the vocabulary of tweets: 0 is padding, 1 an unknown word, then come the commonest
            words of the training tweets, all in small letters.
    """

    path: str
    num_users: int | None = Field(None, ge=1)
    max_words: int = Field(25, ge=1)
    num_tokens: int = Field(5000, ge=3)


@takes(LeafOptions)
def leaf(options: Mapping[str, Any]) -> OwnTestData:
    """Samples of LEAF's users; `owner` is the user, so that the partition ``natural-id`` gives each a client.

    Users without training samples are left out. Of Sent140, words are numbers, int64 [N, max_words], in two classes: 1
    is happy; the model ``transformer`` takes them, or a module of your own, see `LeafOptions`.

    Args:
        options: see `LeafOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: a file is missing or malformed.
    """
    chosen = parse_options(LeafOptions, options, WHERE)
    root = Path(chosen.path)
    train, test = (_read_split(root / split) for split in ("train", "test"))
    users = sorted(user for user, (_, labels) in train.items() if len(labels))
    if chosen.num_users is not None and chosen.num_users > len(users):
        raise DataError(
            f"{WHERE}.num_users = {chosen.num_users} exceeds the {len(users)} users of {str(root)!r}: lower it"
        )
    users = users[: chosen.num_users]
    given, test_given = (_joined([part.get(user, ([], [])) for user in users], str(root)) for part in (train, test))
    (samples, labels), (test_samples, test_labels), num_labels = _read(given, test_given, chosen)
    shape = (-1, 1, 28, 28) if samples[0].size == FEMNIST_PIXELS else (-1, *samples.shape[1:])
    return OwnTestData(
        root.name,
        torch.from_numpy(samples.reshape(shape)),
        torch.from_numpy(labels),
        torch.from_numpy(test_samples.reshape(shape)),
        torch.from_numpy(test_labels),
        num_labels,
        owner=torch.from_numpy(given.owner),
        test_owner=torch.from_numpy(test_given.owner),
    )


def _read_split(folder: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return samples and labels of each user.

    Raises:
        DataError: there are none, or a file is malformed.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(
            f"{str(folder)!r} holds no .json files: give the folder of LEAF's train and test in {WHERE}.path"
        )
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for file in files:
        try:
            users = json.loads(file.read_text(encoding="utf-8"))["user_data"]
            found |= {user: (one["x"], one["y"]) for user, one in users.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{str(file)!r} is no JSON file of LEAF ({type(error).__name__}: {error})") from None
    return found


@dataclass(frozen=True)
class _Split:
    """Samples of a split and their labels as they are stored, and the number of each one's user, int64 [N]."""

    samples: list[Any]
    labels: list[Any]
    owner: NDArray[np.int64]


def _joined(users: list[tuple[list[Any], list[Any]]], root: str) -> _Split:
    """Join what users have.

    Raises:
        DataError: it is nothing, or samples lack labels.
    """
    samples = [sample for xs, _ in users for sample in xs]
    labels = [label for _, ys in users for label in ys]
    owner = np.repeat(np.arange(len(users)), [len(ys) for _, ys in users])
    if len(samples) != len(labels) or not samples:
        raise DataError(f"{root!r} has {len(samples)} samples but {len(labels)} labels of its users: fetch it again")
    return _Split(samples, labels, owner)


def _read(train: _Split, test: _Split, options: LeafOptions) -> tuple[Arrays, Arrays, int]:
    """Return samples and labels of both splits, and the number of classes.

    Raises:
        DataError: they are malformed.
    """
    root, first = options.path, train.samples[0]
    if isinstance(first, list) and len(first) > TWEET and all(isinstance(one, str) for one in first):
        vocabulary = _vocabulary([_words(sample, root) for sample in train.samples], options.num_tokens)
        return _tweets(train, vocabulary, options), _tweets(test, vocabulary, options), 2
    if unused := sorted({"max_words", "num_tokens"} & options.model_fields_set):
        warn([f"{WHERE}.{unused[0]} changes nothing, because {root!r} holds no tweets: leave it out"])
    if isinstance(first, str):
        made, tested = ((_letters(split.samples, root), _letters(split.labels, root)[:, 0]) for split in (train, test))
        return made, tested, len(LETTERS)
    made, tested = (_numbers(split, root) for split in (train, test))
    return made, tested, FEMNIST_CLASSES if made[0].shape[1] == FEMNIST_PIXELS else int(made[1].max()) + 1


def _numbers(split: _Split, root: str) -> Arrays:
    """Return samples, float32 [N, length], and labels.

    Raises:
        DataError: they are no numbers.
    """
    try:
        array, labels = np.array(split.samples, dtype=np.float32), np.array(split.labels, dtype=np.int64)
    except (TypeError, ValueError):
        raise DataError(
            f"{root!r} has samples that are no lists of numbers of one length, nor texts as of Shakespeare or Sent140:"
            " write a data set of your own for them"
        ) from None
    return array.reshape(len(array), -1), labels


def _words(sample: Any, root: str) -> list[str]:
    """Return the words of a tweet in small letters, and what stands between them.

    Raises:
        DataError: it is no sample of Sent140.
    """
    if not isinstance(sample, list) or len(sample) <= TWEET or not isinstance(sample[TWEET], str):
        raise DataError(f"{root!r} has the sample {sample!r:.80}, whose entry {TWEET} is no text: fetch it again")
    return WORD.findall(sample[TWEET].lower())


def _vocabulary(texts: Sequence[Sequence[str]], num_tokens: int) -> dict[str, int]:
    """Return tokens of the commonest words, from 2 on; of words that are equally common the first by alphabet."""
    counts = Counter(word for text in texts for word in text)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: num_tokens - 2]
    return {word: token for token, word in enumerate(common, start=2)}


def _tweets(split: _Split, vocabulary: Mapping[str, int], options: LeafOptions) -> Arrays:
    """Return the tokens of tweets, int64 [N, max_words], and whether each is happy.

    Raises:
        DataError: a sample or a label is malformed.
    """
    tokens = np.full((len(split.samples), options.max_words), PADDING, dtype=np.int64)
    for row, sample in zip(tokens, split.samples, strict=True):
        found = [vocabulary.get(word, UNKNOWN) for word in _words(sample, options.path)[: options.max_words]]
        row[: len(found)] = found
    try:
        return tokens, np.array([POLARITIES[int(label)] for label in split.labels], dtype=np.int64)
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{options.path!r} has the label {error} of a tweet: give 0 or 1, or 0 or 4") from None


def _letters(texts: list[str], root: str) -> NDArray[np.int64]:
    """Return the number of each letter of texts of one length, int64 [N, length].

    Raises:
        DataError: a letter is unknown, or lengths differ.
    """
    numbers = {letter: number for number, letter in enumerate(LETTERS)}
    try:
        return np.array([[numbers[letter] for letter in text] for text in texts], dtype=np.int64)
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{root!r} has texts of more than one length, or with another letter than LEAF's 80 ({error}): fetch it"
            " again"
        ) from None
