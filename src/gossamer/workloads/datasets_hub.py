"""Labelled images from parquet files or the Hugging Face hub, decoded once and cached as arrays.

Decoding 60,000 PNG or JPEG images takes seconds, so the arrays are kept under ``$GOSSAMER_CACHE`` (default
``~/.cache/gossamer``), one .npz a data set, written aside and renamed; a damaged one is rebuilt.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer import rng
from gossamer.errors import DataError, warn

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]
SPLITS = ("train", "test")
ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")
FORMAT_VERSION = 2  # part of the cache's key: raise it when what is cached changes
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class HubSource:
    """Where a labelled image set is found and how it is laid out.

    Attributes:
        name: folder under ``$GOSSAMER_DATA``, and the name in messages.
        repository: its name on the Hugging Face hub.
        image_column, label_column: names of the two columns.
        mode: ``"L"`` (grey) or ``"RGB"``.
        num_labels: number of classes.
    """

    name: str
    repository: str
    image_column: str
    label_column: str
    mode: str
    num_labels: int

    def files(self) -> dict[str, Path] | None:
        """Return the parquet file of each split, or None where ``$GOSSAMER_DATA`` holds no folder of this name.

        Raises:
            DataError: the folder is there but a file is not, or there is no such ``$GOSSAMER_DATA``.
        """
        root = os.environ.get("GOSSAMER_DATA")
        if not root:
            return None
        if not Path(root).is_dir():
            raise DataError(f"GOSSAMER_DATA = {root!r} is not a folder: correct it, or unset it to use the hub")
        if not (Path(root) / self.name).is_dir():
            warn([f"GOSSAMER_DATA = {root!r} has no folder {self.name!r}, so the data set is taken from the hub"])
            return None
        found = {split: Path(root) / self.name / f"{split}.parquet" for split in SPLITS}
        for path in found.values():
            if not path.is_file():
                raise DataError(f"data file {str(path)!r} is missing: add it, or unset GOSSAMER_DATA to use the hub")
        return found


def load(source: HubSource) -> Arrays:
    """Return the decoded data set, from the cache where it is there.

    The files ``$GOSSAMER_DATA/<name>/{train,test}.parquet`` are preferred where that folder exists; without it the set
    is fetched from the hub. The cache of files is renewed when their size or time changes; that of the hub when its
    file is deleted.

    Returns:
        training images uint8 [N, C, H, W] and labels int64 [N], test images and labels.

    Raises:
        DataError: a file, a column or the network is missing, an image cannot be decoded, or a label is out of range.
    """
    files = source.files()
    cache = _cache_path(source, files)
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = _decode_all(source, files)
        _write_cache(cache, arrays)
    return arrays


def _cache_path(source: HubSource, files: dict[str, Path] | None) -> Path:
    folder = os.environ.get("GOSSAMER_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "gossamer"
    stats = [path.stat() for path in files.values()] if files else []
    origin = [str(files["train"].parent.resolve())] if files else [source.repository]
    key = rng.stable_hash(FORMAT_VERSION, source, *origin, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
    return root / f"{source.name}-{key:016x}.npz"


def _read_cache(path: Path) -> Arrays | None:
    """Return the arrays of a cache file, or None where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            train_images, train_labels, test_images, test_labels = (stored[name] for name in ARRAY_NAMES)
            return train_images, train_labels, test_images, test_labels
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warn([f"the cache {str(path)!r} is damaged ({error}) and is rebuilt"])
        return None


def _write_cache(path: Path, arrays: Arrays) -> None:
    """Write a cache file aside and rename it; a disk that refuses costs a warning only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **dict(zip(ARRAY_NAMES, arrays, strict=True)))  # type: ignore[arg-type]
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        warn([f"cannot cache decoded images ({error}): set GOSSAMER_CACHE to a writable folder"])


def _decode_all(source: HubSource, files: dict[str, Path] | None) -> Arrays:
    places = {split: str(files[split]) if files else f"{source.repository} ({split})" for split in SPLITS}
    tables = _from_hub(source) if files is None else {split: _from_file(path) for split, path in files.items()}
    train, test = (_decode(source, tables[split], places[split]) for split in SPLITS)
    return *train, *test


def _from_file(path: Path) -> Any:
    """Read a parquet file as a `pyarrow.Table`.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except Exception as error:  # the library raises many kinds for a broken file
        raise DataError(f"cannot read {str(path)!r} as parquet ({_first_line(error)}): fetch the file again") from error


def _from_hub(source: HubSource) -> dict[str, Any]:
    """Fetch a data set from the hub as ``{split: pyarrow.Table}``; not tested here, because it needs the network.

    The library would retry for half a minute where there is no network, so one short question is asked first. With
    ``HF_HUB_OFFLINE=1`` nothing is asked, and the library's own cache must hold the set.

    Raises:
        DataError: the hub cannot be reached, or does not have the set.
    """
    import datasets
    import huggingface_hub
    import huggingface_hub.constants  # loaded lazily: no attribute of the package until it is imported

    if not hasattr(datasets, "load_dataset"):
        raise DataError(
            f"{datasets.__file__!r} hides the library of that name, which fetches {source.repository!r}: rename it"
        )
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(source.repository, timeout=PROBE_SECONDS)
        found = datasets.load_dataset(source.repository)
        return {split: found[split].with_format("arrow")[:] for split in SPLITS}
    except Exception as error:  # the libraries raise many kinds for a broken network
        raise DataError(
            f"cannot fetch {source.repository!r} from the Hugging Face hub ({_first_line(error)}): allow network"
            f" access, or put train.parquet and test.parquet into $GOSSAMER_DATA/{source.name}"
        ) from error


def _first_line(error: Exception) -> str:
    """Return what an error says, without the address of an object in memory."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(" <_io.")[0]


def _decode(source: HubSource, table: Any, place: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode the `pyarrow.Table` of one split into uint8 [N, C, H, W] and int64 [N].

    Raises:
        DataError: a column is missing, an image cannot be decoded or has another size, or a label is out of range.
    """
    for column in (source.image_column, source.label_column):
        if column not in table.column_names:
            raise DataError(
                f"{place} has no column {column!r}, only {table.column_names}: rename its column or fetch it again"
            )
    if table.num_rows == 0:
        raise DataError(f"{place} has no rows: fetch it again")
    labels = _checked_labels(table[source.label_column].to_numpy(), source, place)
    images: NDArray[np.uint8] | None = None
    for row, cell in enumerate(table[source.image_column].to_pylist()):
        pixels = decode_image(cell, source.mode, f"row {row} of column {source.image_column!r} of {place}")
        if images is None:
            images = np.empty((table.num_rows, *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"row {row} of {place} is {pixels.shape} but earlier images are {images.shape[1:]}: resize or drop it"
            )
        images[row] = pixels
    assert images is not None
    return images, labels


def _checked_labels(values: Any, source: HubSource, place: str) -> NDArray[np.int64]:
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"column {source.label_column!r} of {place} holds {labels.dtype}, not integers: store labels as int64"
        )
    wrong = labels[(labels < 0) | (labels >= source.num_labels)]
    if len(wrong):
        raise DataError(
            f"column {source.label_column!r} of {place} holds the label {wrong[0]}, outside"
            f" 0 .. {source.num_labels - 1}: correct or drop that row"
        )
    return labels.astype(np.int64)


def decode_image(cell: Any, mode: str, place: str, size: int | tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode PNG, JPEG ... bytes, or a mapping that has them as ``"bytes"``, into uint8 [C, H, W].

    Pixels of 16 bits are scaled to 8.

    Args:
        mode: ``"L"`` (grey) or ``"RGB"``.
        place: where it is found, for errors.
        size: height and width to which it is resized, one number for both; None: those that it has.

    Raises:
        DataError: they are missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)) as opened:
            picture: Image.Image = opened
            if opened.mode[0] in "IF":  # which `convert` would cut off at 255
                if opened.mode == "F" or (opened.mode == "I" and opened.format != "PNG"):
                    raise ValueError(f"its pixels are of mode {opened.mode!r}, not of 8 or 16 bits")
                picture = Image.fromarray(np.rint(np.asarray(opened) / 257).astype(np.uint8))
            picture = picture if picture.mode == mode else picture.convert(mode)
            if size is not None:
                height, width = (size, size) if isinstance(size, int) else size
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
    except Exception as error:  # PIL raises many kinds for broken bytes
        raise DataError(f"{place} is not an image ({_first_line(error)}): drop it or fetch the file again") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
