"""Data that are given in Python: torch data sets, read item by item, and arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gossamer.errors import DataError, plugin_errors
from gossamer.workloads import samples as lazy
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.sample_data import SampleData
from gossamer.workloads.samples import ArraySource, LazySamples, Samples, digest_of_samples, with_digest

TEST_SHARE = 0.2  # of each class, where no test data are given
KINDS = "give a torch Dataset, a pair (train, test) of them, or arrays or tensors (x_train, y_train, x_test, y_test)"
LABEL_KEYS = ("label", "labels", "target", "fine_label", "y")
NATIVE = (torch.uint8, torch.float32, torch.int64)


def read_data(data: Any, name: str = "given") -> ImageData:
    """Read labelled samples; torch data sets once from the first item to the last, to check them.

    Samples are tensors, arrays or images of PIL, all of one shape; labels are whole numbers from 0 on. Bytes are taken
    for pixels, [height, width] or [channels, height, width], and normalised; other numbers are given to models as they
    are, whole numbers (such as tokens) as int64, others as float32. Up to `lazy.SMALL_BYTES` of samples are kept in
    memory; beyond, a data set is read while training.

    Args:
        data: a torch data set of items (sample, label), or its arrays or tensors ``(x, y)``, of which `TEST_SHARE` of
            each class are taken for testing; a pair (train, test) or a mapping ``{"train": ..., "test": ...}`` of
            these; or ``(x_train, y_train, x_test, y_test)``.
        name: name in messages.

    Raises:
        DataError: it is something else, or malformed.
    """
    train, test = _splits(data)
    samples, labels = _read(train, "the training data")
    if test is None:
        made = _made(name, samples, labels, samples, labels, _num_labels(train, labels, labels))
        try:
            held_out = made.hold_out(TEST_SHARE, 0)
        except DataError:
            raise DataError(f"{len(labels)} samples are too few to take some for testing: give (train, test)") from None
        return replace(held_out, mean=(), std=()) if samples.dtype == torch.uint8 else held_out
    test_samples, test_labels = _read(test, "the test data")
    return _made(name, samples, labels, test_samples, test_labels, _num_labels(train, labels, test_labels))


def _splits(data: Any) -> tuple[Any, Any]:
    """Return what holds the training data, and the test data or None.

    Raises:
        DataError: `data` is nothing that could.
    """
    if isinstance(data, Mapping):
        if not {"train", "test"} <= set(data):
            raise DataError(f"data has the keys {sorted(map(str, data))}: give 'train' and 'test'")
        return data["train"], data["test"]
    if isinstance(data, tuple | list):
        arrays = [_is_array(part) for part in data]
        if len(data) == 4 and all(arrays):
            return data[:2], data[2:]
        if len(data) == 2 and any(arrays):
            return data, None
        if len(data) == 2:
            return data[0], data[1]
        types = ", ".join(type(part).__name__ for part in data)
        raise DataError(f"data is a {type(data).__name__} of {len(data)} ({types}): {KINDS}")
    return data, None


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _read(split: Any, where: str) -> tuple[Samples, Tensor]:
    """Return samples and labels, int64 [N], of a split.

    Raises:
        DataError: it is nothing that has any, or malformed.
    """
    if isinstance(split, TensorDataset) and len(split.tensors) == 2:
        split = split.tensors
    if isinstance(split, tuple | list) and len(split) == 2 and _is_array(split[0]):
        samples, labels = _of_array(split[0], where), _labels_of(split[1], where)
        if len(samples) != len(labels):
            raise DataError(f"{where} have {len(samples)} samples but {len(labels)} labels: give one for each")
    elif hasattr(split, "__getitem__") and hasattr(split, "__len__") and not isinstance(split, str | tuple | list):
        samples, labels = _of_dataset(split, where)
    else:
        known = "has no length, or no items by number" if hasattr(split, "__iter__") else "holds no samples"
        raise DataError(f"{where} are of type {type(split).__name__}, which {known}: {KINDS}")
    if len(labels) == 0:
        raise DataError(f"{where} are empty: give at least one sample")
    if int(labels.min()) < 0:
        raise DataError(f"{where} have the label {int(labels.min())}: number the classes from 0 on")
    return samples, labels


def _num_labels(train: Any, labels: Tensor, test_labels: Tensor) -> int:
    """Return the number of classes: of the names that a data set has for them, or one more than the largest label.

    Raises:
        DataError: labels are beyond.
    """
    largest, largest_tested = int(labels.max()), int(test_labels.max())
    num_labels = len(train.classes) if hasattr(train, "classes") else largest + 1
    if largest_tested >= num_labels or largest >= num_labels:
        beyond = "test" if largest_tested >= num_labels else "training"
        raise DataError(
            f"the {beyond} data have the label {max(largest, largest_tested)}, outside 0 .. {num_labels - 1}, which are"
            " the classes of the training data: correct it"
        )
    if num_labels > 2 * len(labels):
        raise DataError(f"{len(labels)} training samples have labels up to {largest}: number the classes from 0 on")
    return num_labels


def _made(
    name: str, samples: Samples, labels: Tensor, test_samples: Samples, test_labels: Tensor, num_labels: int
) -> ImageData:
    kind = ImageData if samples.dim() == 4 and samples.dtype != torch.int64 else SampleData
    moments: dict[str, Any] = {}
    if samples.dtype == torch.float32:
        moments = {"mean": (0.0,) * samples.shape[1], "std": (1.0,) * samples.shape[1]}
    return kind(name, samples, labels, test_samples, test_labels, num_labels, **moments)


# ---- arrays


def _of_array(array: Any, where: str) -> Samples:
    """Return samples [N, ...] of an array or a tensor; of a large array in a file, to be read later."""
    if isinstance(array, np.memmap) and not lazy.is_kept(array.nbytes) and array.ndim != 3:
        dtype = torch.from_numpy(array[:1].copy()).dtype
        if dtype in NATIVE:
            found = LazySamples(ArraySource(array), torch.arange(len(array)), array.shape[1:], dtype, "")
            return with_digest(found, partial(digest_of_samples, found))
    tensor = _normal(_as_tensor(array, where), where)
    if tensor.dim() == 1:
        return tensor[:, None]
    return tensor[:, None] if tensor.dtype == torch.uint8 and tensor.dim() == 3 else tensor.contiguous()


def _labels_of(given: Any, where: str) -> Tensor:
    labels = _as_tensor(given, f"the labels of {where}")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise DataError(
            f"the labels of {where} are of type {labels.dtype} and shape {tuple(labels.shape)}: give a whole number,"
            " the class, for each sample"
        )
    return labels.to(torch.int64)


def _as_tensor(value: Any, where: str) -> Tensor:
    """Return what numbers a value holds, on the CPU; images of PIL as [channels, height, width].

    Raises:
        DataError: it holds none.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    is_image = type(value).__module__.startswith("PIL.")
    try:
        array = np.asarray(value)
        array = array.astype(np.uint8) if is_image and array.dtype == np.bool_ else array
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} hold a {type(value).__name__}, which is no array of numbers ({error})") from None
    return tensor.movedim(-1, 0) if is_image and tensor.dim() == 3 else tensor


def _normal(tensor: Tensor, where: str) -> Tensor:
    """Return samples as uint8, float32 or int64.

    Raises:
        DataError: they are complex.
    """
    if tensor.dtype in NATIVE:
        return tensor
    if tensor.dtype.is_complex:
        raise DataError(f"{where} hold complex numbers: give real ones")
    is_real = tensor.dtype.is_floating_point or tensor.dtype == torch.bool
    return tensor.to(torch.float32 if is_real else torch.int64)


# ---- torch data sets


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Reads samples from a torch data set.

    Attributes:
        dataset: data set, of items (sample, label).
        where: what errors call it.
        like: its first sample, whose shape and type all others have.
    """

    dataset: Any
    where: str
    like: Tensor

    def item(self, row: int) -> tuple[Tensor, int]:
        """Return a sample and its label.

        Raises:
            DataError: they are malformed, or unlike the first sample.
        """
        sample, label = item_of(self.dataset, row, self.where)
        if sample.shape != self.like.shape or sample.dtype != self.like.dtype:
            raise DataError(
                f"item {row} of {self.where} has the shape {tuple(sample.shape)} and type {sample.dtype}, but item 0"
                f" {tuple(self.like.shape)} and {self.like.dtype}: give all of them one shape and type"
            )
        return sample, label

    def read(self, rows: Any) -> Tensor:
        """Return some samples, see `gossamer.workloads.samples.Source`."""
        found = torch.empty((len(rows), *self.like.shape), dtype=self.like.dtype)
        for place, row in enumerate(rows):
            found[place] = self.item(int(row))[0]
        return found

    def forget(self) -> None:
        """Do nothing: nothing is kept."""


def item_of(dataset: Any, row: int, where: str) -> tuple[Tensor, int]:
    """Return an item of a data set as a tensor and a label.

    Raises:
        DataError: it is no such pair.
        ConfigError: the data set raises an error.
    """
    what = f"item {row} of {where}"
    with plugin_errors(what):
        try:
            item = dataset[row]
        except IndexError:
            raise DataError(f"{what} is missing, though the length is {len(dataset)}: correct __len__") from None
    if isinstance(item, Mapping) and len(item) == 2 and (keys := [key for key in item if key in LABEL_KEYS]):
        (sample,) = (value for key, value in item.items() if key != keys[0])
        item = sample, item[keys[0]]
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        raise DataError(f"{what} is a {type(item).__name__}: give a pair (sample, label)")
    sample, label = _normal(_as_tensor(item[0], what), what), _as_tensor(item[1], f"the label of {what}")
    if label.numel() != 1 or label.dtype.is_floating_point or label.dtype.is_complex:
        raise DataError(f"{what} has the label {item[1]!r}: give a whole number, the class")
    if sample.dim() == 0 or (sample.dim() == 2 and sample.dtype == torch.uint8):
        sample = sample[None]
    return sample, int(label)


def _of_dataset(dataset: Any, where: str) -> tuple[Samples, Tensor]:
    """Read a torch data set once from the first item to the last.

    Raises:
        DataError: it is malformed, or not the same each time.
    """
    length = _length(dataset, where)
    if length == 0:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    source = DatasetSource(dataset, where, item_of(dataset, 0, where)[0])
    kept = None
    if lazy.is_kept(length * source.like.numel() * source.like.itemsize):
        kept = torch.empty((length, *source.like.shape), dtype=source.like.dtype)
    labels, digest = torch.empty(length, dtype=torch.int64), hashlib.blake2b(digest_size=16)
    for row in range(length):
        sample, labels[row] = source.item(row)
        if kept is None:
            digest.update(sample.contiguous().numpy().reshape(-1).view(np.uint8).data)
        else:
            kept[row] = sample
        if row == 0 and not torch.equal(sample, source.like):
            raise DataError(
                f"item 0 of {where} differs when it is read again: draw no random numbers in a data set or its"
                " transforms, which would not depend on the seed alone (for images there is workload.augment)"
            )
    if _length(dataset, where) != length:
        raise DataError(f"{where} had {length} items, and then {_length(dataset, where)}: let the length stay")
    if kept is not None:
        return kept, labels
    samples = LazySamples(source, torch.arange(length), tuple(source.like.shape), source.like.dtype, "")
    return with_digest(samples, digest.hexdigest), labels


def _length(dataset: Any, where: str) -> int:
    with plugin_errors(f"the length of {where}"):
        try:
            return len(dataset)
        except TypeError:
            raise DataError(f"{where} have no length: give a torch Dataset with __len__ and __getitem__") from None
