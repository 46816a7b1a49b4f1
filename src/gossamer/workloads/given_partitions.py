"""Partitions that are given as the sample numbers of each client: in Python, or in a JSON or CSV file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.errors import DataError
from gossamer.options import parse_options, takes
from gossamer.workloads.partitions import WHERE, IidOptions, Ints, PartialPartition, Partition

INDICES, PARTIAL = "indices", "partial"
SUFFIXES = (".json", ".csv")


def read_lists(name: str, given: Any, is_partial: bool = False) -> Partition:
    """Read a partition.

    Args:
        name: name in errors.
        given: a sequence with the sample numbers of each client; or a mapping of clients to them, whose keys are
            either 0, 1, ... (also as text) or any names, which are then in the order of the clients.
        is_partial: whether samples may be left out.

    Raises:
        DataError: it is something else. What it says of the data is checked later, see `Partition.checked`.
    """
    if isinstance(given, Mapping):
        given = _in_order(name, given)
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray) or len(given) == 0:
        what = f"holds {given!r}" if given == [] else f"is a {type(given).__name__}"
        raise DataError(
            f"partition {name!r} {what}: give a list with the list of sample numbers of each client, or a mapping of"
            " clients to such lists"
        )
    kind = PartialPartition if is_partial else Partition
    return kind.of_lists([_numbers(name, client, one) for client, one in enumerate(given)])


def _in_order(name: str, given: Mapping[Any, Any]) -> list[Any]:
    """Return the values in the order of the clients.

    Raises:
        DataError: keys are numbers, but not 0, 1, ...
    """
    if not all(str(key).isdecimal() for key in given):
        return list(given.values())
    by_number = {int(key): value for key, value in given.items()}
    missing = sorted(set(range(len(given))) - set(by_number))
    if missing:
        raise DataError(
            f"partition {name!r} has {len(given)} clients, but none of number {missing[0]}: number them from 0 on"
        )
    return [by_number[number] for number in range(len(by_number))]


def _numbers(name: str, client: int, given: Any) -> Ints:
    """Return the sample numbers of a client, int64 [k].

    Raises:
        DataError: they are no list of whole numbers.
    """
    try:
        numbers = np.asarray(given)
    except (ValueError, TypeError, RuntimeError):  # ragged, or on another device
        numbers = np.asarray(None)
    if numbers.size == 0 and numbers.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        shown = " ".join(repr(given).split())[:60]
        raise DataError(f"partition {name!r} gives client {client} {shown}: give a list of sample numbers")
    return numbers.astype(np.int64)


class FileOptions(IidOptions):
    """Options of `file`.

    Attributes:
        path: a JSON file, with a list of lists of sample numbers, or a mapping of clients to such lists; or a CSV file,
            with the columns ``client`` (numbers from 0 on) and ``sample``. Relative to the working folder.
        partial: whether samples may be left out, which are then not trained on.
    """

    path: str
    partial: bool = False


@takes(FileOptions)
def file(labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any) -> Partition:
    """Divide the samples as a file says.

    Raises:
        ConfigError: an unknown or wrong parameter, see `FileOptions`.
        DataError: the file is missing or malformed, or does not fit the data or the number of clients.
    """
    options = parse_options(FileOptions, params, WHERE)
    partition = read_lists(options.path, read_file(Path(options.path)), options.partial)
    return partition.checked(options.path, num_clients, len(labels), options.min_samples)


def read_file(path: Path) -> Any:
    """Return what a file says, see `FileOptions`, for `read_lists`.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"cannot read the partition {str(path)!r} ({reason}): correct {WHERE}.path") from None
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"partition {str(path)!r} is no {' or '.join(SUFFIXES)} file: give one of these")
    if path.suffix.lower() == ".csv":
        return _read_table(path, text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"partition {str(path)!r} is no JSON ({error}): write a list of lists of numbers") from None
    return found


def _read_table(path: Path, text: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    rows = csv.DictReader(text.splitlines())
    if not {"client", "sample"} <= set(rows.fieldnames or ()):
        raise DataError(f"partition {str(path)!r} has the columns {rows.fieldnames}: give 'client' and 'sample'")
    for row in rows:
        try:
            found.setdefault(int(row["client"]), []).append(int(row["sample"]))
        except (ValueError, TypeError):
            raise DataError(
                f"partition {str(path)!r} has the line {rows.line_num} {row}: give two whole numbers"
            ) from None
    return found
