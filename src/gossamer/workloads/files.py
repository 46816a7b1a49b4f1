"""Data sets from files of one's own: a folder of images, a table, arrays, a Hugging Face data set on disk.

Where no test data are given, `test_share` of each class is taken out for testing, by a draw that is always the same.
Paths are relative to the working folder.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer.errors import DataError, plugin_errors
from gossamer.options import Options, parse_options, takes
from gossamer.workloads import parquet
from gossamer.workloads import samples as lazy
from gossamer.workloads.datasets import WHERE, ImageData
from gossamer.workloads.datasets_hub import decode_image
from gossamer.workloads.given_data import TEST_SHARE, read_data
from gossamer.workloads.sample_data import SampleData
from gossamer.workloads.samples import LazySamples, Samples, moments_in_pieces

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NAMES = ("x_train", "y_train", "x_test", "y_test")


class FolderOptions(Options):
    """Options of `image_folder`.

    Attributes:
        path: folder with the folders ``train`` and ``test``, each with a folder of images for every class; or with a
            folder for every class.
        size: height and width to which all images are resized; None: all of them have one size.
        mode: ``"RGB"`` or ``"L"`` (grey).
        test_share: share of each class that is for testing, where there are no folders ``train`` and ``test``.
    """

    path: str
    size: int | None = Field(None, ge=1)
    mode: Literal["RGB", "L"] = "RGB"
    test_share: float = Field(TEST_SHARE, gt=0, lt=1)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Reads images from files.

    Attributes:
        paths: paths of the files.
        mode: ``"RGB"`` or ``"L"``.
        size: height and width to which they are resized, or None.
    """

    paths: Sequence[str]
    mode: str
    size: int | None

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return images, uint8 [b, channels, height, width], see `gossamer.workloads.samples.Source`.

        Raises:
            DataError: a file is no image, or of another size than the first one.
        """
        found: NDArray[np.uint8] | None = None
        for place, row in enumerate(rows):
            path = self.paths[int(row)]
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"cannot read the image {path!r} ({error.strerror}): restore it") from None
            pixels = decode_image(content, self.mode, f"image {path!r}", self.size)
            if found is None:
                found = np.empty((len(rows), *pixels.shape), dtype=np.uint8)
            if pixels.shape != found.shape[1:]:
                raise DataError(
                    f"image {path!r} has {pixels.shape[1]} x {pixels.shape[2]} pixels, but others {found.shape[2]} x"
                    f" {found.shape[3]}: give {WHERE}.size, to which all are resized"
                )
            found[place] = pixels
        assert found is not None
        return torch.from_numpy(found)

    def forget(self) -> None:
        """Do nothing: nothing is kept."""


@takes(FolderOptions)
def image_folder(options: Mapping[str, Any]) -> ImageData:
    """Images in a folder for each class, in the order of the classes' names; read while training if they are many.

    Args:
        options: see `FolderOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the folder is missing or holds no images, or one of them is none.
    """
    chosen = parse_options(FolderOptions, options, WHERE)
    root = Path(chosen.path)
    is_split = (root / "train").is_dir() and (root / "test").is_dir()
    splits = [root / "train", root / "test"] if is_split else [root]
    classes = _classes(splits[0])
    found = [_images_of(one, classes, chosen) for one in splits]
    (images, labels), (test_images, test_labels) = found[0], found[-1]
    data = ImageData(root.name or "images", images, labels, test_images, test_labels, len(classes))
    return data if is_split else replace(data.hold_out(chosen.test_share, 0), mean=(), std=())


def _classes(folder: Path) -> list[str]:
    """Return the names of the folders of classes.

    Raises:
        DataError: there are none.
    """
    if not folder.is_dir():
        raise DataError(f"{WHERE}.path = {str(folder)!r} is no folder: give one with a folder of images for each class")
    classes = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not classes:
        raise DataError(f"{str(folder)!r} holds no folders: put the images of each class into a folder of its name")
    return classes


def _images_of(folder: Path, classes: list[str], options: FolderOptions) -> tuple[Samples, Tensor]:
    """Return images and labels of a folder of classes.

    Raises:
        DataError: there are none, or one of them is none.
    """
    if strangers := sorted(set(_classes(folder)) - set(classes)):
        raise DataError(f"{str(folder)!r} has a class {strangers[0]!r}, which the training data lack: take it out")
    paths, labels = list[str](), list[int]()
    for label, name in enumerate(classes):
        inside = (folder / name).iterdir() if (folder / name).is_dir() else ()
        files = sorted(str(path) for path in inside if path.suffix.lower() in SUFFIXES)
        paths, labels = paths + files, labels + [label] * len(files)
    if not paths:
        raise DataError(f"{str(folder)!r} holds no images ({', '.join(SUFFIXES)}) in its folders: add some")
    source, rows = ImageFiles(paths, options.mode, options.size), torch.arange(len(paths))
    first = source.read(np.zeros(1, dtype=np.int64))
    if lazy.is_kept(len(paths) * first.numel()):
        return source.read(rows.numpy()), torch.tensor(labels)
    samples = LazySamples(source, rows, tuple(first.shape[1:]), torch.uint8, "")
    return lazy.with_digest(samples, partial(_digest, options, paths)), torch.tensor(labels)


def _digest(options: FolderOptions, paths: Sequence[str]) -> str:
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


class TableOptions(Options):
    """Options of `table`.

    Attributes:
        path: CSV file with the names of the columns in its first line; or a parquet file or a folder of them, whose row
            groups are read while training if they are large.
        label: column of the classes, numbers or names; all others are features, numbers.
        test_path: such a file of the test data; None: `test_share` of each class is taken out of `path`.
        test_share: that share.
    """

    path: str
    label: str = "label"
    test_path: str | None = None
    test_share: float = Field(TEST_SHARE, gt=0, lt=1)


@takes(TableOptions)
def table(options: Mapping[str, Any]) -> ImageData:
    """Rows of a table, CSV or parquet, whose features are standardised by their moments in the training data.

    Of a large parquet table, a process keeps the last four row groups in memory: a batch is read the more quickly, the
    fewer row groups its rows lie in, so let those of a client lie together, as with a partition by ranges of rows.

    Args:
        options: see `TableOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: a file is missing, or a value is no number.
    """
    chosen = parse_options(TableOptions, options, WHERE)
    names, features, given, rows = _read_table(chosen.path, chosen.label)
    test, test_given, test_rows = features, given, rows
    if chosen.test_path is not None:
        test_names, test, test_given, test_rows = _read_table(chosen.test_path, chosen.label)
        if test_names != names:
            raise DataError(f"{chosen.test_path!r} has the columns {test_names}, but {chosen.path!r} {names}")
    classes = sorted(given, key=lambda name: (not name.lstrip("-").isdecimal(), len(name), name))
    if strangers := sorted(set(test_given) - set(classes)):
        raise DataError(f"{chosen.test_path!r} has a class {strangers[0]!r}, which the training data lack: take it out")
    labels, test_labels = (
        torch.tensor([classes.index(name) for name in one])[torch.from_numpy(of_row)]
        for one, of_row in ((given, rows), (test_given, test_rows))
    )
    mean, std = (0.0,) * len(names), (1.0,) * len(names)  # until it is known which rows are for training
    data: ImageData = SampleData(Path(chosen.path).stem, features, labels, test, test_labels, len(classes), mean, std)
    data = data if chosen.test_path is not None else data.hold_out(chosen.test_share, 0)
    moments = moments_in_pieces(data.train_images) if _is_parquet(chosen.path) else ((), ())
    return replace(data, mean=moments[0], std=moments[1])


def _is_parquet(path: str) -> bool:
    return path.endswith(parquet.SUFFIX) or Path(path).is_dir()


def _read_table(path: str, label: str) -> tuple[list[str], Samples, list[str], NDArray[np.int64]]:
    """Return the names of the features, these, float32 [N, features], the classes, and the number of each row's.

    Raises:
        DataError: the file is malformed.
    """
    if _is_parquet(path):
        return parquet.read_parquet(path, label)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read the table {path!r} ({reason}): correct {WHERE}.path") from None
    if len(rows) < 2 or label not in rows[0]:
        columns, given = (rows[0], rows[0][0]) if rows and rows[0] else ([], "")
        if len(columns) == 1 and any(mark in given for mark in ";\t"):
            raise DataError(f"the table {path!r} has one column, {given!r}: separate columns by commas")
        raise DataError(f"the table {path!r} has the columns {columns} and {max(0, len(rows) - 1)} rows: give the name"
                        f" of its column of classes in {WHERE}.label, not {label!r}")  # fmt: skip
    column, names = rows[0].index(label), [name for name in rows[0] if name != label]
    features = np.empty((len(rows) - 1, len(names)), dtype=np.float32)
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise DataError(f"line {line} of {path!r} has {len(row)} values for {len(rows[0])} columns: correct it")
        for place, value in enumerate(row[:column] + row[column + 1 :]):
            try:
                features[line - 2, place] = float(value)
            except ValueError:
                raise DataError(
                    f"line {line} of {path!r} has {value!r} in the column {names[place]!r}: give numbers alone, or drop"
                    " that row or column"
                ) from None
    if not names:
        raise DataError(f"the table {path!r} has no column besides {label!r}: add features")
    classes, of_row = np.unique([row[column].strip() for row in rows[1:]], return_inverse=True)
    return names, torch.from_numpy(features), classes.tolist(), of_row


class ArraysOptions(Options):
    """Options of `arrays`.

    Attributes:
        path: a .npz file, or a folder of .npy files, with the arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``;
            without the latter two, a share of each class is taken out. Large files of a folder are read while training.
    """

    path: str


@takes(ArraysOptions)
def arrays(options: Mapping[str, Any]) -> ImageData:
    """Arrays of a .npz file or of a folder of .npy files; see `gossamer.workloads.given_data.read_data`.

    Args:
        options: see `ArraysOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: a file or an array is missing or malformed.
    """
    path = Path(parse_options(ArraysOptions, options, WHERE).path)
    try:
        if path.is_dir():
            files = {one: path / f"{one}.npy" for one in NAMES}
            found = {n: np.load(f, mmap_mode="r", allow_pickle=False) for n, f in files.items() if f.exists()}
        else:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in NAMES if name in stored.files}
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no file of NumPy's"
        raise DataError(f"cannot read arrays from {str(path)!r} ({reason}): correct {WHERE}.path") from None
    missing = [name for name in NAMES if name not in found]
    if missing not in ([], ["x_test", "y_test"]):
        raise DataError(f"{str(path)!r} has no array {missing[0]!r}: name its arrays {', '.join(NAMES)}")
    return read_data(tuple(found[name] for name in NAMES if name in found), path.stem)


class SavedOptions(Options):
    """Options of `hugging_face`.

    Attributes:
        path: folder that ``save_to_disk`` of the library ``datasets`` wrote.
        sample, label: columns of samples and labels; None: the only two columns.
    """

    path: str
    sample: str | None = None
    label: str | None = None


@takes(SavedOptions)
def hugging_face(options: Mapping[str, Any]) -> ImageData:
    """A data set of the library ``datasets`` on disk, with the splits ``train`` and ``test``, or one without splits.

    Args:
        options: see `SavedOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: it is missing or malformed, see `gossamer.workloads.given_data.read_data`.
    """
    import datasets

    chosen = parse_options(SavedOptions, options, WHERE)
    try:
        found = datasets.load_from_disk(chosen.path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the data set {chosen.path!r} ({error}): correct {WHERE}.path") from None
    columns = [name for name in (chosen.sample, chosen.label) if name is not None]
    if columns:
        with plugin_errors(f"{WHERE} {chosen.path!r}"):
            found = found.select_columns(columns)
    if isinstance(found, Mapping) and "test" not in found:
        found = found["train"]
    return read_data(found, Path(chosen.path).name)
