"""Data sets: what they hold, how they are cached, and what they say when something is wrong."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.errors import ConfigError, DataError, GossamerWarning
from gossamer.workloads import datasets, datasets_hub
from gossamer.workloads.datasets import ImageData, channel_moments, cifar10, digits, mnist, synthetic
from gossamer.workloads.datasets_hub import HubSource, load
from gossamer.workloads.partitions import dirichlet, natural_id, shards

TINY = HubSource("tiny", "nobody/tiny", "image", "label", "L", 3)
needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA does not name a folder with mnist and cifar10"
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty cache; the real sets, which take seconds to decode, use the ordinary one."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


def encoded(pixels: np.ndarray, kind: str = "PNG") -> dict[str, Any]:
    """Encode uint8 pixels [H, W] or [H, W, 3] as a cell of an image column."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path: Path, **columns: list[Any]) -> None:
    """Write columns to a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def tiny(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write a data set of 5 training and 2 test images, and return what it holds."""
    source = np.random.default_rng(0)
    held: dict[str, Any] = {"folder": tmp_path / "data" / "tiny"}
    for split, count in (("train", 5), ("test", 2)):
        pixels = source.integers(0, 256, (count, 4, 6), dtype=np.uint8)
        labels = [i % 3 for i in range(count)]
        write_parquet(held["folder"] / f"{split}.parquet", image=[encoded(one) for one in pixels], label=labels)
        held[split] = (pixels, labels)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "data"))
    return held


def test_digits_are_split_evenly_and_always_alike() -> None:
    first, second = digits({}), digits({})
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    assert first.test_labels.bincount().tolist() == [36] * 10
    assert first.train_images.dtype == torch.uint8
    assert first.shape == (1, 8, 8)
    assert int(first.train_images.max()) == 16
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.train_labels, second.train_labels)
    from sklearn.datasets import load_digits

    everything = torch.cat([first.train_images, first.test_images]).flatten(1)
    assert sorted(everything.tolist()) == sorted(load_digits().data.astype(int).tolist())


def test_moments_are_those_of_the_training_images() -> None:
    data = digits({})
    pixels = data.train_images.numpy().astype(np.float64)
    assert data.mean == pytest.approx([pixels.mean()])
    assert data.std == pytest.approx([pixels.std()])
    three = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = channel_moments(three)
    assert mean == pytest.approx(three.numpy().mean((0, 2, 3)))
    assert std == pytest.approx(three.numpy().std((0, 2, 3)))
    assert channel_moments(three.float())[0] == pytest.approx(mean)
    assert channel_moments(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)) == ((7.0,), (1.0,))


def test_limit_keeps_a_seeded_subset() -> None:
    whole, some = digits({}), digits({"limit": 50})
    assert len(some.train_labels) == 50
    assert torch.equal(some.test_images, whole.test_images)
    assert torch.equal(some.train_images, digits({"limit": 50}).train_images)
    assert not torch.equal(some.train_images, digits({"limit": 50, "seed": 1}).train_images)
    assert some.mean == pytest.approx([some.train_images.double().mean().item()])
    longer = digits({"limit": 80})
    assert torch.equal(longer.train_labels[:50], some.train_labels)
    with pytest.raises(DataError, match="1500 exceeds the 1437"):
        digits({"limit": 1500})
    with pytest.raises(ConfigError, match="seed = 1 shuffles what limit cuts: give limit"):
        digits({"seed": 1})


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        digits({"limt": 5})
    with pytest.raises(ConfigError, match=r"workload\.dataset\.num_labels = 0"):
        synthetic({"num_labels": 0})


def test_synthetic_is_learnable_and_deterministic() -> None:
    options = {"num_train": 300, "num_test": 90, "shape": [2, 5, 4], "num_labels": 3, "seed": 4}
    data = synthetic(options)
    assert data.shape == (2, 5, 4)
    assert data.num_labels == 3
    assert data.train_images.dtype == torch.float32
    assert torch.equal(data.train_images, synthetic(options).train_images)
    assert not torch.equal(data.train_images, synthetic(options | {"seed": 5}).train_images)
    centres = torch.stack([data.train_images[data.train_labels == label].mean(0) for label in range(3)]).flatten(1)
    nearest = torch.cdist(data.test_images.flatten(1), centres).argmin(1)
    assert (nearest == data.test_labels).double().mean() > 0.95


def image_data(**changes: Any) -> ImageData:
    """Return a few images of three labels, with some fields replaced."""
    fields: dict[str, Any] = {
        "name": "mine",
        "train_images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 2, 0]),
        "test_images": torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
        "test_labels": torch.tensor([1]),
        "num_labels": 3,
    }
    return ImageData(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 2}, "training split of data set 'mine' has the label 2, outside 0 .. 1"),
        ({"test_labels": torch.tensor([-1])}, "test split of data set 'mine' has the label -1"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, "4 images but labels"),
        ({"train_labels": torch.zeros(4)}, "labels of type torch.float32"),
        ({"train_images": np.zeros((4, 1, 2, 2))}, "images of type ndarray and labels of type Tensor: give tensors"),
        ({"test_labels": [1]}, "test split of data set 'mine' has images of type Tensor and labels of type list"),
        ({"train_images": torch.zeros(4, 2, 2)}, r"shape \(4, 2, 2\)"),
        ({"test_images": torch.zeros(1, 1, 3, 2, dtype=torch.uint8)}, r"shape \(1, 3, 2\): give both splits the same"),
        ({"test_images": torch.full((1, 1, 2, 2), torch.nan)}, "test split .* not finite"),
        ({"test_images": torch.zeros(1, 1, 2, 2)}, r"type torch.uint8 and shape \(1, 2, 2\) but test images of type t"),
        ({"mean": (0.0,)}, r"has mean = \(0.0,\) and std = \(\): give one finite number of each"),
        ({"std": (1.0,)}, r"has mean = \(\) and std = \(1.0,\)"),
        ({"mean": (0.0, 0.0), "std": (1.0, 1.0)}, "each of its 1 channels"),
        ({"mean": (0.0,), "std": (0.0,)}, "std above 0"),
        ({"mean": (math.nan,), "std": (1.0,)}, "mean = .nan,."),
        ({"owner": torch.zeros(3, dtype=torch.int64)}, "one int64 for each of its 4"),
    ],
)
def test_malformed_image_data_is_refused(changes: dict[str, Any], message: str) -> None:
    image_data()
    with pytest.raises(DataError, match=message):
        image_data(**changes)


def noise(*shape: int, largest: float = 255.0, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Return uniform noise of a shape."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * largest).to(kind)


def of_images(train: torch.Tensor, test: torch.Tensor, **changes: Any) -> ImageData:
    """Return data of images that all have label 0."""
    labels = [torch.zeros(len(images), dtype=torch.int64) for images in (train, test)]
    return ImageData("mine", train, labels[0], test, labels[1], 1, **changes)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_moments_and_test_images_of_another_unit_are_refused(kind: torch.dtype) -> None:
    """Such as the moments of pixels of 0 .. 1, which everybody knows by heart, beside pixels of 0 .. 255."""
    train, test = noise(9, 1, 4, 4, kind=kind), noise(5, 1, 4, 4, kind=kind)
    assert of_images(train, test, mean=[127.5], std=torch.tensor([74.0])).std == (74.0,)
    assert of_images(train, test, mean=(0.0,), std=(1.0,)).mean == (0.0,)
    with pytest.raises(DataError, match=r"mean and std of data set 'mine' have the standard deviation 0\.308, but"):
        of_images(train, test, mean=(0.1307,), std=(0.3081,))
    with pytest.raises(DataError, match=r"mean and std of .* 74, but the training images, as stored, 0\."):
        of_images(noise(9, 1, 4, 4, largest=1.0), noise(5, 1, 4, 4, largest=1.0), mean=(127.5,), std=(74.0,))
    with pytest.raises(DataError, match="the test images of data set 'mine' have the standard deviation 0"):
        of_images(noise(9, 1, 4, 4), noise(5, 1, 4, 4, largest=1.0))


def test_channels_that_come_last_are_refused() -> None:
    for shape in ((32, 32, 3), (28, 28, 1), (48, 64, 3), (8, 8, 4)):
        with pytest.raises(DataError, match=r"channels seem to come last: .*permute\(0, 3, 1, 2\)"):
            of_images(noise(2, *shape), noise(2, *shape))
    for shape in ((3, 32, 32), (1, 28, 28), (9, 128, 1), (3, 3, 3), (64, 2, 2)):  # the third is a series of 9 sensors
        assert of_images(noise(2, *shape), noise(2, *shape)).shape == shape


@pytest.mark.parametrize(
    ("pixels", "kind", "mode", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], dtype=np.uint16), "PNG", "L", [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], dtype=np.uint16), "TIFF", "L", [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], dtype=np.uint16), "PNG", "RGB", [0, 1, 128, 255]),
        (np.array([[False, True]]), "PNG", "L", [0, 255]),
        (np.array([[0, 200]], dtype=np.uint8), "PNG", "L", [0, 200]),
    ],
)
def test_every_depth_becomes_eight_bits(pixels: np.ndarray, kind: str, mode: str, expected: list[int]) -> None:
    decoded = datasets_hub.decode_image(encoded(pixels, kind), mode, "row 0")
    assert decoded.dtype == np.uint8
    assert decoded[:, 0].tolist() == [expected] * {"L": 1, "RGB": 3}[mode]


@pytest.mark.parametrize("pixels", [np.ones((2, 2), dtype=np.float32), np.ones((2, 2), dtype=np.int32)])
def test_depths_without_a_scale_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"row 0 is not an image \(its pixels are of mode '.', not of 8 or 16 bits\)"):
        datasets_hub.decode_image(encoded(pixels, "TIFF"), TINY.mode, "row 0")


def test_a_file_named_datasets_beside_the_experiment(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of the library of that name, which local files and partitions do without."""
    mine = ModuleType("datasets")
    mine.__file__ = "/here/datasets.py"
    monkeypatch.setitem(sys.modules, "datasets", mine)
    labels = load(TINY)[1]
    for make, num_clients in ((dirichlet, 2), (shards, 2), (natural_id, 3)):
        assert len(make(labels, num_clients, 3, 0, labels).num_samples) == num_clients
    monkeypatch.delenv("GOSSAMER_DATA")
    with pytest.raises(DataError, match=r"'/here/datasets.py' hides .* fetches 'nobody/tiny': rename it"):
        load(TINY)


def test_parquet_is_decoded_to_what_was_encoded(tiny: dict[str, Any]) -> None:
    train_images, train_labels, test_images, test_labels = load(TINY)
    assert np.array_equal(train_images[:, 0], tiny["train"][0])
    assert train_labels.tolist() == tiny["train"][1]
    assert np.array_equal(test_images[:, 0], tiny["test"][0])
    assert test_labels.tolist() == tiny["test"][1]
    assert train_images.dtype == np.uint8
    assert train_images.shape == (5, 1, 4, 6)


@pytest.mark.usefixtures("own_cache")
def test_colours_become_leading_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    for split in ("train", "test"):
        write_parquet(tmp_path / "tiny" / f"{split}.parquet", img=[encoded(one) for one in pixels], fine_label=[0, 1])
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    images = load(HubSource("tiny", "nobody/tiny", "img", "fine_label", "RGB", 2))[0]
    assert np.array_equal(images, pixels.transpose(0, 3, 1, 2))


def cached_file(tmp_path: Path) -> Path:
    """Return the one file of the cache."""
    (found,) = (tmp_path / "cache").iterdir()
    return found


def test_cache_is_used_until_the_file_changes(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(TINY)
    decode = datasets_hub._decode_all
    monkeypatch.setattr(datasets_hub, "_decode_all", lambda *_: pytest.fail("decoded although it is cached"))
    assert all(np.array_equal(a, b) for a, b in zip(load(TINY), first, strict=True))
    monkeypatch.setattr(datasets_hub, "_decode_all", decode)
    changed = np.full((5, 4, 6), 9, dtype=np.uint8)
    path = tiny["folder"] / "train.parquet"
    write_parquet(path, image=[encoded(one) for one in changed], label=[0] * 5)
    os.utime(path, (1, 1))
    assert np.array_equal(load(TINY)[0][:, 0], changed)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: flipped(raw)])
def test_damaged_cache_is_built_afresh(damage: Callable[[bytes], bytes], tiny: dict[str, Any], tmp_path: Path) -> None:
    first = load(TINY)
    path = cached_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        again = load(TINY)
    assert all(np.array_equal(a, b) for a, b in zip(again, first, strict=True))
    load(TINY)  # the new cache is sound: no further warning


def flipped(raw: bytes) -> bytes:
    """Change one byte of the pixels, which only the checksum notices."""
    at = len(raw) // 6
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def test_cache_leaves_nothing_else_and_may_fail(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(TINY)
    assert cached_file(tmp_path).suffix == ".npz"
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(blocked / "below"))
    with pytest.warns(UserWarning, match="set GOSSAMER_CACHE"):
        assert len(load(TINY)[0]) == 5


def rewrite(tiny: dict[str, Any], **columns: list[Any]) -> None:
    """Write the training file again, with other columns."""
    cells = [encoded(one) for one in tiny["train"][0]]
    kept = {"image": cells, "label": tiny["train"][1]} | columns
    write_parquet(tiny["folder"] / "train.parquet", **{name: cells for name, cells in kept.items() if cells})


def test_each_fault_of_a_file_is_named(tiny: dict[str, Any]) -> None:
    cells = [encoded(one) for one in tiny["train"][0]]
    wrong_size = encoded(np.zeros((3, 3), dtype=np.uint8))
    faults: list[tuple[dict[str, list[Any]], str]] = [
        ({"label": []}, r"train\.parquet has no column 'label', only \['image'\]"),
        ({"label": [0, 1, 2, 3, 0]}, r"'label' of .*train\.parquet holds the label 3, outside 0 .. 2"),
        ({"label": ["a"] * 5}, "not integers"),
        (
            {"image": [*cells[:2], {"bytes": b"junk", "path": None}, *cells[3:]]},
            r"row 2 of column 'image' of .* is not an",
        ),
        ({"image": [{"bytes": None, "path": "x"}, *cells[1:]]}, "row 0 of column 'image'"),
        ({"image": [*cells[:4], wrong_size]}, "row 4 of .* earlier images"),
        ({"image": [1, 2, 3, 4, 5]}, "row 0 of column 'image' of .* is not an image"),
    ]
    for columns, message in faults:
        rewrite(tiny, **columns)
        with pytest.raises(DataError, match=message):
            load(TINY)
    (tiny["folder"] / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"cannot read '.*train\.parquet' as parquet"):
        load(TINY)
    (tiny["folder"] / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"train\.parquet' is missing"):
        load(TINY)


@pytest.mark.usefixtures("own_cache")
def test_no_network_is_one_quick_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def unreachable(*_: Any, **__: Any) -> None:
        """Note that the hub was asked, and fail."""
        asked.append(1)
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"'nobody/tiny'.*\(Name or service not known\).*\$GOSSAMER_DATA/tiny"):
        load(TINY)
    assert len(asked) == 1, "it is not tried again"


def test_a_wrong_folder_of_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"^GOSSAMER_DATA = '.*none' is not a folder: correct it, or unset it"):
        load(TINY)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    with pytest.warns(GossamerWarning, match="has no folder 'tiny', so the data set is taken from the hub"):
        assert TINY.files() is None


def test_hub_answer_is_decoded_and_cached(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets as library
    import huggingface_hub

    files = {split: str(tiny["folder"] / f"{split}.parquet") for split in ("train", "test")}
    splits = {split: library.Dataset.from_parquet(file, keep_in_memory=True) for split, file in files.items()}
    monkeypatch.setattr(library, "load_dataset", lambda repository: splits)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.delenv("GOSSAMER_DATA")
    assert np.array_equal(load(TINY)[0][:, 0], tiny["train"][0])
    monkeypatch.setattr(library, "load_dataset", lambda repository: pytest.fail("fetched although it is cached"))
    assert np.array_equal(load(TINY)[2][:, 0], tiny["test"][0])


def test_names_of_the_hub_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubSource] = []

    def answer(source: HubSource) -> datasets_hub.Arrays:
        """Note what is asked for, and return one image."""
        asked.append(source)
        channels = 1 if source.mode == "L" else 3
        images, labels = np.zeros((1, channels, 2, 2), dtype=np.uint8), np.array([source.num_labels - 1])
        return images, labels, images, labels

    monkeypatch.setattr(datasets, "load", answer)
    made = [make({}) for make in (mnist, datasets.fashion_mnist, cifar10, datasets.cifar100)]
    assert [source.repository for source in asked] == [
        "ylecun/mnist", "zalando-datasets/fashion_mnist", "uoft-cs/cifar10", "uoft-cs/cifar100",
    ]  # fmt: skip
    assert [data.name for data in made] == ["mnist", "fashion-mnist", "cifar10", "cifar100"]
    assert [data.num_labels for data in made] == [10, 10, 10, 100]


@pytest.mark.sweep(keep=0.5, at_least=1)
@needs_data
@pytest.mark.usefixtures("decoded_once")
@pytest.mark.parametrize(
    ("make", "shape", "counts"), [(mnist, (1, 28, 28), (60000, 3000)), (cifar10, (3, 32, 32), (50000, 10000))]
)
def test_real_sets(
    make: Callable[[dict[str, Any]], ImageData], shape: tuple[int, int, int], counts: tuple[int, int]
) -> None:
    data = make({"limit": 500})
    assert data.shape == shape
    assert len(data.train_labels) == 500
    assert len(data.test_labels) == counts[1]
    whole = make({})
    assert len(whole.train_labels) == counts[0]
    assert whole.train_images.dtype == torch.uint8
    assert set(whole.train_labels.tolist()) == set(range(10))
    known = {1: [0.1307], 3: [0.4914, 0.4822, 0.4465]}[shape[0]]
    assert [value / 255 for value in whole.mean] == pytest.approx(known, abs=5e-4)


class TestHoldingOut:
    """Some of the training images take the place of the test images."""

    @pytest.mark.parametrize("has_owners", [False, True])
    def test_every_class_or_owner_gives_its_share(self, has_owners: bool) -> None:
        whole = digits({})
        owner = torch.arange(1437) % 20 if has_owners else None
        found = replace(whole, owner=owner).hold_out(0.1, seed=3)
        assert (len(found.train_labels), len(found.test_labels)) == (1293, 144)
        both = torch.cat([found.train_images, found.test_images]).flatten(1).tolist()
        assert sorted(both) == sorted(whole.train_images.flatten(1).tolist())
        assert (found.mean, found.std) == (whole.mean, whole.std)
        if found.owner is None:
            expected = whole.train_labels.bincount() / 10
            assert ((found.test_labels.bincount() - expected).abs() < 1).all()
        else:
            assert found.owner.bincount().min() >= 64
        assert torch.equal(found.test_labels, replace(whole, owner=owner).hold_out(0.1, seed=3).test_labels)
        assert not torch.equal(found.test_images, replace(whole, owner=owner).hold_out(0.1, seed=4).test_images)

    def test_everybody_keeps_an_image(self) -> None:
        found = of_images(noise(4, 1, 2, 2), noise(4, 1, 2, 2), owner=torch.tensor([0, 1, 2, 2])).hold_out(0.9, seed=0)
        assert found.owner is not None
        assert found.owner.tolist() == [0, 1, 2]

    def test_less_than_an_image_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"workload.validation = 0.1 of the 4 training images of 'mine'"):
            of_images(noise(4, 1, 2, 2), noise(4, 1, 2, 2)).hold_out(0.1, seed=0)
