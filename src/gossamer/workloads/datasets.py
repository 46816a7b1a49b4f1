"""Image data sets as plain tensors: scikit-learn's digits, the usual benchmarks, and a synthetic one.

A data set of your own is a function ``(options: Mapping) -> ImageData``, named as ``my_package.my_module:my_set``.
Images stay as they are stored (uint8 where they are) and are normalised when a batch is assembled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import distribution
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from gossamer import rng
from gossamer.errors import DataError
from gossamer.memory import require_memory
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets_hub import HubSource, load
from gossamer.workloads.partitions import rounded
from gossamer.workloads.samples import LazySamples, Samples, are_finite, channel_moments, passed, take

WHERE = "workload.dataset"
MAX_RATIO = 50.0  # of standard deviations in one unit; 0 .. 255 and 0 .. 1 differ by a factor of 255
FEW = 1000  # images that show their unit
PER_DIGIT_TEST = 36  # 10 x 36 = 360 test images, 1,437 for training


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images with their labels.

    Attributes:
        name: name in messages.
        train_images, test_images: uint8 or float32 [N, channels, height, width], tensors or `LazySamples`; N may
            differ, the rest may not. Both are normalised by `mean` and `std`, so their pixels have one unit.
        train_labels, test_labels: int64 [N], in 0 .. num_labels - 1.
        num_labels: number of classes.
        mean, std: mean and standard deviation of each channel of the training images as stored, such as 0 .. 255, or 0
            and 1 to leave pixels as they are; computed if both are left out.
        owner: int64 [N], natural owner of each training image (a writer, a phone), or None.

    Raises:
        DataError: a shape, a type or a value does not fit the above.
    """

    name: str
    train_images: Samples
    train_labels: Tensor
    test_images: Samples
    test_labels: Tensor
    num_labels: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    owner: Tensor | None = None

    def __post_init__(self) -> None:
        for split, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            where = f"the {split} split of data set {self.name!r}"
            self._check_samples(where, images, labels)
            _check_labels(where, images, labels, self.num_labels)
        kinds = [f"{one.dtype} and shape {tuple(one.shape[1:])}" for one in (self.train_images, self.test_images)]
        if kinds[0] != kinds[1]:
            raise DataError(
                f"data set {self.name!r} has training images of type {kinds[0]} but test images of type {kinds[1]}:"
                " give both splits the same type and shape"
            )
        if self.owner is not None and (self.owner.dtype != torch.int64 or self.owner.shape != self.train_labels.shape):
            raise DataError(
                f"data set {self.name!r} has owners of type {self.owner.dtype} and shape {tuple(self.owner.shape)}:"
                f" give one int64 for each of its {len(self.train_labels)} training images"
            )
        self._check_moments()

    def _check_samples(self, where: str, images: Any, labels: Any) -> None:
        """Check types and shapes."""
        _check_images(where, images, labels)

    def _check_moments(self) -> None:
        """Fill in `mean` and `std`, or check them.

        Raises:
            DataError: one of them is missing or wrong, or they or the test images have another unit than the training
                images.
        """
        given = tuple(map(float, self.mean)), tuple(map(float, self.std))
        mean, std = given if any(given) else channel_moments(self.train_images)
        if {len(mean), len(std)} != {self.shape[0]} or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise DataError(
                f"data set {self.name!r} has mean = {given[0]} and std = {given[1]}: give one finite number of each for"
                f" each of its {self.shape[0]} channels, std above 0, or leave both out"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        self._check_units(given_std=std if any(given) and set(std) != {1.0} else None)

    def _check_units(self, given_std: tuple[float, ...] | None) -> None:
        """Check that test images, and `std` if it was given, have the unit of the training images.

        Raises:
            DataError: they have not.
        """
        few = [channel_moments(one[:: -(-len(one) // FEW)])[1] for one in (self.train_images, self.test_images)]
        _check_unit(f"the test images of data set {self.name!r}", few[1], few[0])
        if given_std is not None:
            _check_unit(f"mean and std of data set {self.name!r}", given_std, few[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: channels, height, width."""
        return tuple(self.train_images.shape[1:])

    @property
    def is_lazy(self) -> bool:
        """Whether images are read when they are needed."""
        return isinstance(self.train_images, LazySamples) or isinstance(self.test_images, LazySamples)

    def holding(self, train: Tensor, test: Tensor) -> ImageData:
        """Return the same data, with images of these numbers, int64 [k], in memory, see `LazySamples.holding`."""
        found = copy.copy(self)
        for name, index in (("train_images", train), ("test_images", test)):
            if isinstance(images := vars(self)[name], LazySamples):
                object.__setattr__(found, name, images.holding(index))
        return found

    def hold_out(self, share: float, seed: int) -> ImageData:
        """Return this data set with a share of its training images in the place of the test images.

        Every owner gives up its share, or every class where there are no owners, but keeps one image at least. `mean`
        and `std` remain those of all training images.

        Raises:
            DataError: the share is less than one image.
        """
        source = rng.generator(seed, "hold-out")
        owner = self.train_labels if self.owner is None else self.owner
        _, group, sizes = np.unique(owner.numpy(), return_inverse=True, return_counts=True)
        total = len(group)
        counts = np.minimum(rounded(sizes.astype(np.float64) * (round(share * total) / total), source), sizes - 1)
        order = source.permutation(total)
        order = order[np.argsort(group[order], kind="stable")]
        rank = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        held_out = np.sort(order[rank < np.repeat(counts, sizes)])
        if not len(held_out):
            raise DataError(
                f"workload.validation = {share} of the {total} training images of {self.name!r}, which are of"
                f" {len(sizes)} classes or owners, is less than one image: raise it"
            )
        kept, out = torch.from_numpy(np.setdiff1d(np.arange(total), held_out)), torch.from_numpy(held_out)
        return replace(self, **self.split(kept, out))

    def split(self, kept: Tensor, out: Tensor) -> dict[str, Any]:
        """Return what changes where training images take the place of the test images.

        Args:
            kept, out: numbers of the training images that stay, and of the others, int64 [k].
        """
        return {
            "train_images": take(self.train_images, kept),
            "train_labels": self.train_labels[kept],
            "test_images": take(self.train_images, out),
            "test_labels": self.train_labels[out],
            "owner": None if self.owner is None else self.owner[kept],
        }


def _check_unit(what: str, deviations: Sequence[float], of_training: Sequence[float]) -> None:
    """Compare standard deviations of channels with those of the training images; 1 is that of a constant channel, too.

    Raises:
        DataError: they differ by so much that their units must differ.
    """
    for one, expected in zip(deviations, of_training, strict=True):
        if not 1 / MAX_RATIO < one / expected < MAX_RATIO and 1.0 not in (one, expected):
            raise DataError(
                f"{what} have the standard deviation {one:.3g}, but the training images, as stored, {expected:.3g}:"
                " give all of them one unit, such as pixels of 0 .. 255"
            )


def require_tensors(where: str, samples: Any, labels: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        DataError: one of both is none.
    """
    if not (isinstance(samples, Tensor | LazySamples) and isinstance(labels, Tensor)):
        raise DataError(
            f"{where} has images of type {type(samples).__name__} and labels of type {type(labels).__name__}: give"
            " tensors, as torch.from_numpy does"
        )


def _check_images(where: str, images: Any, labels: Any) -> None:
    """Check type and shape of images.

    Raises:
        DataError: one of them is wrong.
    """
    require_tensors(where, images, labels)
    if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float32):
        raise DataError(
            f"{where} has images of type {images.dtype} and shape {tuple(images.shape)}:"
            " give uint8 or float32 [N, channels, height, width]"
        )
    channels, height, width = images.shape[1:]
    if width <= 4 < min(channels, height) and (channels == height or width == 3):
        raise DataError(
            f"{where} has images of shape {tuple(images.shape)}, whose channels seem to come last: give"
            " [N, channels, height, width], as images.permute(0, 3, 1, 2) does"
        )


def _check_labels(where: str, samples: Samples, labels: Tensor, num_labels: int) -> None:
    """Check the labels, and that what is measured is finite.

    Raises:
        DataError: a split is empty, or has a wrong label or a number that is not finite.
    """
    if labels.dtype != torch.int64 or tuple(labels.shape) != (len(samples),) or len(samples) == 0:
        raise DataError(
            f"{where} has {len(samples)} images but labels of type {labels.dtype} and shape {tuple(labels.shape)}:"
            " give one int64 label for each image, and at least one image"
        )
    wrong = labels[(labels < 0) | (labels >= num_labels)]
    if len(wrong):
        raise DataError(
            f"{where} has the label {int(wrong[0])}, outside 0 .. {num_labels - 1}: correct it or num_labels"
        )
    if samples.dtype == torch.float32 and not passed(samples, lambda: are_finite(samples)):
        raise DataError(f"{where} has a pixel that is not finite: remove or repair that image")


class SubsetOptions(Options):
    """Options of a data set that can be cut down for a small experiment.

    Attributes:
        limit: keep only this many training images, the first after a shuffle; None keeps all.
        seed: seed of that shuffle.
    """

    limit: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _used(self) -> SubsetOptions:
        if self.seed and self.limit is None:
            raise ValueError(f"seed = {self.seed} shuffles what limit cuts: give limit, or leave seed out")
        return self


def _limited(data: ImageData, options: SubsetOptions) -> ImageData:
    """Keep the first `options.limit` training images after a seeded shuffle.

    Raises:
        DataError: there are fewer.
    """
    if options.limit is None:
        return data
    total = len(data.train_labels)
    if options.limit > total:
        raise DataError(
            f"{WHERE}.limit = {options.limit} exceeds the {total} training images of {data.name!r}: lower it"
        )
    order = rng.generator(options.seed, "dataset-limit").permutation(total)[: options.limit]
    kept = torch.from_numpy(order)
    owner = None if data.owner is None else data.owner[kept]
    images, labels = take(data.train_images, kept), data.train_labels[kept]
    return replace(data, train_images=images, train_labels=labels, owner=owner, mean=(), std=())


@takes(SubsetOptions)
def digits(options: Mapping[str, Any]) -> ImageData:
    """Scikit-learn's embedded handwritten digits: 1,797 images of 1 x 8 x 8, values 0 .. 16; needs no download.

    The split is fixed: 36 images of each digit are for testing (360), the other 1,437 for training.
    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.

    Args:
        options: see `SubsetOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the limit exceeds the training images.
    """
    chosen = parse_options(SubsetOptions, options, WHERE)
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")  # its import takes 1 s
    table = np.loadtxt(str(file), delimiter=",")
    pixels, target = table[:, :-1], table[:, -1]
    images = torch.from_numpy(pixels.astype(np.uint8).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(target.astype(np.int64))
    is_test = np.zeros(len(target), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(target == digit)
        is_test[rng.generator(0, "digits-split", participant=digit).permutation(members)[:PER_DIGIT_TEST]] = True
    test = torch.from_numpy(is_test)
    return _limited(ImageData("digits", images[~test], labels[~test], images[test], labels[test], 10), chosen)


def _hub(source: HubSource, options: Mapping[str, Any]) -> ImageData:
    chosen = parse_options(SubsetOptions, options, WHERE)
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, load(source))
    data = ImageData(source.name, train_images, train_labels, test_images, test_labels, source.num_labels)
    return _limited(data, chosen)


@takes(SubsetOptions)
def mnist(options: Mapping[str, Any]) -> ImageData:
    """MNIST, 1 x 28 x 28, 10 digits (LeCun et al., 1998); see `datasets_hub.load` for where it comes from.

    Args:
        options: see `SubsetOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the data is missing or malformed.
    """
    return _hub(HubSource("mnist", "ylecun/mnist", "image", "label", "L", 10), options)


@takes(SubsetOptions)
def fashion_mnist(options: Mapping[str, Any]) -> ImageData:
    """Fashion-MNIST, 1 x 28 x 28, 10 kinds of clothing (arXiv 1708.07747); else as `mnist`."""
    return _hub(HubSource("fashion-mnist", "zalando-datasets/fashion_mnist", "image", "label", "L", 10), options)


@takes(SubsetOptions)
def cifar10(options: Mapping[str, Any]) -> ImageData:
    """CIFAR-10, 3 x 32 x 32, 10 classes (Krizhevsky, 2009); else as `mnist`."""
    return _hub(HubSource("cifar10", "uoft-cs/cifar10", "img", "label", "RGB", 10), options)


@takes(SubsetOptions)
def cifar100(options: Mapping[str, Any]) -> ImageData:
    """CIFAR-100, 3 x 32 x 32, its 100 fine classes (Krizhevsky, 2009); else as `mnist`."""
    return _hub(HubSource("cifar100", "uoft-cs/cifar100", "img", "fine_label", "RGB", 100), options)


class SyntheticOptions(Options):
    """Options of `synthetic`.

    Attributes:
        num_train, num_test: number of images.
        shape: channels, height, width.
        num_labels: number of classes; label i is given to every num_labels-th image.
        noise: standard deviation of a pixel around its class's prototype, whose pixels have standard deviation 1.
        seed: seed of prototypes and noise.
    """

    num_train: int = Field(1000, ge=1)
    num_test: int = Field(200, ge=1)
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 8, 8)
    num_labels: int = Field(10, ge=1)
    noise: float = Field(1.0, ge=0)
    seed: int = 0


@takes(SyntheticOptions)
def synthetic(options: Mapping[str, Any]) -> ImageData:
    """Gaussian images around one random prototype per class: learnable, and made in code.

    Args:
        options: see `SyntheticOptions`.

    Raises:
        ConfigError: an unknown or wrong option, or more images than this machine could hold.
    """
    chosen = parse_options(SyntheticOptions, options, WHERE)
    num_images = chosen.num_train + chosen.num_test + chosen.num_labels
    what = f"{WHERE} 'synthetic' of {num_images:,} images and prototypes of {chosen.shape}"
    require_memory(4 * num_images * math.prod(chosen.shape), what, "take fewer or smaller images")
    source = rng.generator(chosen.seed, "synthetic-prototypes")
    prototypes = source.standard_normal((chosen.num_labels, *chosen.shape), np.float32)

    def split(count: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Return images and labels of one part."""
        labels = np.arange(count, dtype=np.int64) % chosen.num_labels
        images = rng.generator(chosen.seed, purpose).standard_normal((count, *chosen.shape), np.float32)
        images *= np.float32(chosen.noise)
        images += prototypes[labels]
        return torch.from_numpy(images), torch.from_numpy(labels)

    train_images, train_labels = split(chosen.num_train, "synthetic-train")
    test_images, test_labels = split(chosen.num_test, "synthetic-test")
    return ImageData("synthetic", train_images, train_labels, test_images, test_labels, chosen.num_labels)
