"""Tables in parquet files: read whole, or by row groups while training."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads import samples as lazy
from gossamer.workloads.samples import LazySamples, Samples

PANDAS_INDEX = re.compile(r"__index_level_\d+__")
SUFFIX = ".parquet"
MAX_HELD = 4  # row groups that a process keeps in memory


class RowGroup(NamedTuple):
    """Where a row group is: its file, and its number in that."""

    path: str
    number: int


class Recent:
    """The row groups that were read last.

    Attributes:
        held: ``{number of the row group: its features}``, the one that was used last at the end.
    """

    def __init__(self, size: int = MAX_HELD) -> None:
        self.held: OrderedDict[int, Tensor] = OrderedDict()
        self._size = size

    def get(self, number: int, read: Callable[[int], Tensor]) -> Tensor:
        """Return a row group, read now if it is not held; the one that was not used for longest makes room first."""
        if number not in self.held:
            if len(self.held) >= self._size:
                self.held.popitem(last=False)
            self.held[number] = read(number)
        self.held.move_to_end(number)
        return self.held[number]


@dataclass(frozen=True, eq=False)
class RowGroupSource:
    """Reads the features of a table in parquet files, whole row groups at a time.

    Attributes:
        groups: the row groups in the order of their rows.
        starts: int64 [number of row groups + 1], number of the first row of each, and of all rows.
        columns: names of the features.
        recent: the row groups in memory.
    """

    groups: Sequence[RowGroup]
    starts: NDArray[np.int64]
    columns: tuple[str, ...]
    recent: Recent = field(default_factory=Recent)

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return rows, float32 [b, features], see `gossamer.workloads.samples.Source`; each row group is read once."""
        found = torch.empty(len(rows), len(self.columns))
        group = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(group):
            places = np.flatnonzero(group == number)
            inside = torch.from_numpy(rows[places] - self.starts[number])
            found[torch.from_numpy(places)] = self.recent.get(int(number), self.read_group)[inside]
        return found

    def forget(self) -> None:
        """Let go of the row groups that are kept."""
        self.recent.held.clear()

    def read_group(self, number: int) -> Tensor:
        """Read a row group from its file, float32 [rows, features].

        Raises:
            DataError: the file cannot be read by now, or has no value somewhere.
        """
        path, inside = self.groups[number]
        with _opened(path) as file:
            table = file.read_row_group(inside, columns=list(self.columns), use_threads=False)
        found = np.empty((table.num_rows, len(self.columns)), dtype=np.float32)
        for place, name in enumerate(self.columns):
            column = table[name]
            if column.null_count:
                raise DataError(f"the column {name!r} of {path!r} lacks values: fill these in, or drop their rows")
            found[:, place] = column.to_numpy()
        return torch.from_numpy(found)


def read_parquet(path: str, label: str) -> tuple[list[str], Samples, list[str], NDArray[np.int64]]:
    """Read a table; its features are read later where they exceed `lazy.SMALL_BYTES`.

    Args:
        path: a parquet file, or a folder of such, which are joined in the order of their names.
        label: column of the classes; all others are features, but for an index that pandas wrote.

    Returns:
        the names of the features; these, float32 [N, features]; the classes; the number of each row's, int64 [N].

    Raises:
        DataError: a file is missing or malformed.
    """
    files = [str(one) for one in sorted(Path(path).glob(f"*{SUFFIX}"))] if Path(path).is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path!r} holds no {SUFFIX} files: give the folder of a table")
    names: list[str] | None = None
    groups, sizes, given = list[RowGroup](), list[int](), list[Any]()
    for one in files:
        with _opened(one) as file:
            found = _features(file.schema_arrow, label, one)
            names = found if names is None else names
            if found != names:
                raise DataError(f"{one!r} has the features {found}, but {files[0]!r} {names}: give both the same")
            for number in range(file.metadata.num_row_groups):
                groups.append(RowGroup(one, number))
                sizes.append(file.metadata.row_group(number).num_rows)
                given.append(file.read_row_group(number, columns=[label], use_threads=False)[label])
    assert names is not None
    classes, of_row = _classes(given, label, path)
    source = RowGroupSource(groups, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), tuple(names))
    samples = LazySamples(source, torch.arange(sum(sizes)), (len(names),), torch.float32, "")
    if lazy.is_kept(lazy.num_bytes(samples)):
        return names, torch.cat([source.read_group(number) for number in range(len(groups))]), classes, of_row
    return names, lazy.with_digest(samples, partial(_digest, files, label)), classes, of_row


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file, mapped into memory, as a `pyarrow.parquet.ParquetFile` for the block.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds for a broken file
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"cannot read {path!r} as parquet ({reason}): correct its path, or fetch it again") from None


def _features(schema: Any, label: str, path: str) -> list[str]:
    """Return the names of the features.

    Raises:
        DataError: there are none, or some are no numbers, or there is no column of classes.
    """
    import pyarrow.types as kinds

    if label not in schema.names:
        raise DataError(f"the table {path!r} has the columns {schema.names}: give the name of its column of classes in"
                        f" workload.dataset.label, not {label!r}")  # fmt: skip
    features = [one for one in schema if one.name != label and not PANDAS_INDEX.fullmatch(one.name)]
    for one in features:
        if not (kinds.is_integer(one.type) or kinds.is_floating(one.type) or kinds.is_boolean(one.type)):
            raise DataError(f"the column {one.name!r} of {path!r} is of type {one.type}: give numbers, or drop it")
    if not features:
        raise DataError(f"the table {path!r} has no column besides {label!r}: add features")
    return [one.name for one in features]


def _classes(columns: Sequence[Any], label: str, path: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the classes of columns that are joined, as text, and the number of each row's.

    Raises:
        DataError: there are no rows, or some have no class.
    """
    import pyarrow

    try:
        column = pyarrow.chunked_array([chunk for one in columns for chunk in one.chunks] or [pyarrow.array([])])
    except (TypeError, pyarrow.ArrowException):
        raise DataError(f"the files of {path!r} have several types of classes in {label!r}: give one") from None
    if len(column) == 0 or column.null_count:
        what = "rows without a class" if len(column) else "no rows"
        raise DataError(f"the table {path!r} has {what} in its column {label!r}: correct it")
    encoded = column.combine_chunks().dictionary_encode()
    names = [str(value).strip() for value in encoded.dictionary.to_pylist()]
    classes = sorted(set(names))
    numbers = np.array([classes.index(name) for name in names], dtype=np.int64)
    return classes, numbers[encoded.indices.to_numpy()]


def _digest(files: Sequence[str], label: str) -> str:
    digest = hashlib.blake2b(label.encode(), digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
