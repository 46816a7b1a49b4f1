"""Audio-visual digits: pairs of equal labels, official splits, and samples that are parted by modality."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import DataError
from gossamer.workloads.datasets import digits
from gossamer.workloads.multimodal.audio_visual import audio_visual_digits, paired, parted
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.spoken import spoken_digits

needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA does not name a folder with fsdd"
)
SMALL = {"bands": 8, "frames": 8}


@settings(max_examples=40, deadline=None)
@given(
    audio=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    extra=st.lists(st.integers(0, 2), max_size=12),
    num_pairs=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_pairs_have_equal_labels_and_use_all_before_any_again(
    audio: list[int], extra: list[int], num_pairs: int, seed: int
) -> None:
    image_labels, audio_labels = np.array([0, 1, 2, *extra]), np.array(audio)
    images, clips = paired(image_labels, audio_labels, num_pairs, seed, "train")
    np.testing.assert_array_equal(image_labels[images], audio_labels[clips])
    used = Counter(clips.tolist())
    assert set(used.values()) <= {num_pairs // len(audio), -(-num_pairs // len(audio))}
    for label in set(audio_labels[clips].tolist()):
        of_label = Counter(images[image_labels[images] == label].tolist())
        uses = [of_label[row] for row in np.flatnonzero(image_labels == label)]
        assert max(uses) - min(uses) <= 1
    again = paired(image_labels, audio_labels, num_pairs, seed, "train")
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(clips, again[1])


def test_a_label_without_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"recordings of the label 3 but no images"):
        paired(np.array([0, 1]), np.array([3]), 1, 0, "train")


def pairs() -> MultimodalSplit:
    samples = {"image": torch.arange(1, 7, dtype=torch.uint8)[:, None], "audio": torch.arange(1, 7.0)[:, None]}
    labels, owner = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    return MultimodalSplit(samples, torch.ones(6, 2).bool(), labels, owner)


def test_parted_samples_have_one_modality_each() -> None:
    found = parted(pairs(), 0)
    assert found.present.sum(dim=1).tolist() == [1] * 12
    assert found.samples["audio"][:6].flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert found.samples["image"][6:].flatten().tolist() == [1, 2, 3, 4, 5, 6]
    for place, name in enumerate(found.modalities):
        assert not found.samples[name][:][~found.present[:, place]].any()
    assert found.owner is not None
    assert found.owner[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(found.owner[6:].tolist()) == [2, 2, 2, 3, 3, 3]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] * 2


@pytest.mark.parametrize(
    ("present", "labels", "message"),
    [
        (torch.ones(2, 1).bool(), torch.zeros(3, dtype=torch.int64), r"3 labels, 2 of 'image' and presence"),
        (torch.ones(2, 2).bool(), torch.zeros(2, dtype=torch.int64), r"presence of shape \(2, 2\)"),
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), r"presence of type torch.float32"),
    ],
)
def test_uneven_splits_are_refused(present: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultimodalSplit({"image": torch.zeros(2, 1)}, present, labels)


@pytest.fixture(scope="module")
def real() -> MultimodalData:
    return audio_visual_digits({**SMALL, "num_train": 3000})


@needs_data
def test_official_splits(real: MultimodalData) -> None:
    seen, heard = digits({}), spoken_digits(SMALL)
    for split, images, audio, count in (
        (real.train, seen.train_images, heard.train_images, 3000),
        (real.test, seen.test_images, heard.test_images, 300),
    ):
        assert split.modalities == ("image", "audio")
        assert len(split.labels) == count
        assert split.samples["image"].dtype == torch.uint8
        assert split.samples["audio"].shape == (count, 1, 8, 8)
        for name, allowed in (("image", images), ("audio", audio)):
            known = {row.numpy().tobytes() for row in allowed[:]}
            assert {row.numpy().tobytes() for row in split.samples[name][:]} <= known
    assert real.train.owner is not None
    assert sorted(set(real.train.owner.tolist())) == list(range(6))


@needs_data
def test_the_natural_split_keeps_pairs_for_testing(real: MultimodalData) -> None:
    natural = audio_visual_digits({**SMALL, "num_train": 3000, "split": "natural"})
    assert natural.train.present.sum(dim=0).tolist() == [3000, 3000]
    assert natural.train.owner is not None
    assert torch.bincount(natural.train.owner)[6:].tolist() == [500] * 6
    assert natural.test.present.all()
    assert torch.equal(natural.test.samples["image"][:], real.test.samples["image"][:])


@needs_data
def test_mnist_and_a_seed(real: MultimodalData) -> None:
    other = audio_visual_digits({**SMALL, "images": "mnist", "num_test": 20, "num_train": 50, "seed": 1})
    assert other.train.samples["image"].shape == (50, 1, 28, 28)
    assert len(other.test.labels) == 20
    assert other.name == "audio-visual-mnist"
