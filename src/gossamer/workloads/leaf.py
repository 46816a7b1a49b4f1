"""Data sets of LEAF (Caldas et al., arXiv 1812.01097), as its scripts write them: JSON files of users, each with tests.

FEMNIST becomes images, Shakespeare tokens, lists of numbers a table. Sent140 is words, for which nothing here is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets import WHERE
from gossamer.workloads.sample_data import OwnTestData

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"  # LEAF's 80
FEMNIST_PIXELS, FEMNIST_CLASSES = 28 * 28, 62


class LeafOptions(Options):
    """Options of `leaf`.

    Attributes:
        path: folder with the folders ``train`` and ``test`` of JSON files, such as LEAF's ``data/femnist/data``.
        num_users: number of users that are kept, the first by name; None: all of them.
    """

    path: str
    num_users: int | None = Field(None, ge=1)


@takes(LeafOptions)
def leaf(options: Mapping[str, Any]) -> OwnTestData:
    """Samples of LEAF's users; `owner` is the user, so that the partition ``natural-id`` gives each a client.

    Users without training samples are left out.

    Args:
        options: see `LeafOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: a file is missing or malformed, or its samples are words.
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
    (samples, labels, owner), (test_samples, test_labels, test_owner) = (
        _joined([part.get(user, ([], [])) for user in users], str(root)) for part in (train, test)
    )
    num_labels = {FEMNIST_PIXELS: FEMNIST_CLASSES}.get(samples[0].size, int(labels.max()) + 1)
    if samples.dtype == np.int64:
        num_labels = len(LETTERS)
    shape = (-1, 1, 28, 28) if samples[0].size == FEMNIST_PIXELS else (-1, *samples.shape[1:])
    return OwnTestData(
        root.name,
        torch.from_numpy(samples.reshape(shape)),
        torch.from_numpy(labels),
        torch.from_numpy(test_samples.reshape(shape)),
        torch.from_numpy(test_labels),
        num_labels,
        owner=torch.from_numpy(owner),
        test_owner=torch.from_numpy(test_owner),
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


def _joined(users: list[tuple[list[Any], list[Any]]], root: str) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """Return samples, labels and owners of users.

    Raises:
        DataError: they are malformed.
    """
    samples = [sample for xs, _ in users for sample in xs]
    labels = [label for _, ys in users for label in ys]
    owner = np.repeat(np.arange(len(users)), [len(ys) for _, ys in users])
    if len(samples) != len(labels) or not samples:
        raise DataError(f"{root!r} has {len(samples)} samples but {len(labels)} labels of its users: fetch it again")
    if isinstance(samples[0], str):
        return _letters(samples, root), _letters(labels, root)[:, 0], owner
    try:
        array, numbers = np.array(samples, dtype=np.float32), np.array(labels, dtype=np.int64)
    except (TypeError, ValueError):
        raise DataError(
            f"{root!r} has samples that are no lists of numbers of one length, such as the words of Sent140: write a"
            " data set of your own for them"
        ) from None
    return array.reshape(len(array), -1), numbers, owner


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
