"""Digests of data: the same for the same data, whoever holds them, and others where one bit differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.workloads.convex import LeastSquares
from gossamer.workloads.datasets import ImageData, synthetic
from gossamer.workloads.digests import digest_of
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.text import NextCharacter


@dataclass(frozen=True)
class Data:
    """Something of everything."""

    pixels: Any = None
    name: str = "a"
    shares: tuple[float, ...] = (0.5, 1.0)


def test_equal_data_have_equal_digests() -> None:
    steps = torch.arange(12.0).reshape(3, 4)
    assert digest_of(steps) == digest_of(steps.clone()) == digest_of(steps.T.contiguous().T) == digest_of(steps.numpy())
    assert digest_of(Data(steps)) == digest_of(Data(steps.clone()))
    assert digest_of(Data(object())) == digest_of(Data(object()))  # whose text would tell where it lies


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(4, np.int32), np.zeros(4, np.float32)),
        (np.zeros((0, 3)), np.zeros((0, 4))),
        (np.array([1, 2]), np.array([1, 3])),
        (Data(torch.tensor([0.0])), Data(torch.tensor([-0.0]))),
        (Data(name="ab"), Data(name="ac")),
        (Data(shares=(0.5,)), Data(shares=(0.25,))),
        (Data(), Data(0)),
        (("ab", "c"), ("a", "bc")),
        ({"a": 1}, {"b": 1}),
        (1, "1"),
    ],
)
def test_other_data_have_other_digests(first: Any, second: Any) -> None:
    assert digest_of(first) != digest_of(second)


def test_a_digest_does_not_depend_on_the_process() -> None:
    assert digest_of({"a": (1, 2.5, None)}, np.arange(3, dtype="<i8")) == "e386c82f2f702172347cd87d6dd60edd"


def test_one_pixel_of_a_data_set_counts_and_so_does_the_partition() -> None:
    def made(data: ImageData, seed: int = 0) -> str:
        return ImageClassification({"model": "softmax"}, num_clients=3, partition="iid", seed=seed, data=data).digest()

    data = synthetic({"num_train": 12, "num_test": 6})
    assert made(data) == made(synthetic({"num_train": 12, "num_test": 6}))
    for part in ("train_images", "test_images", "train_labels", "test_labels"):
        changed = vars(data)[part].clone()
        changed.view(-1)[-1] -= 1
        assert made(replace(data, **{part: changed})) != made(data)
    assert made(replace(data, mean=(0.5,), std=(1.0,))) != made(data)
    assert made(data, seed=1) != made(data)


def test_texts_and_generated_data_have_digests() -> None:
    texts = [
        NextCharacter({"dataset": {"name": "synthetic", "seed": seed}}, num_clients=8, partition="natural-id", seed=0)
        for seed in (0, 0, 1)
    ]
    assert texts[0].digest() == texts[1].digest() != texts[2].digest()
    sizes = [LeastSquares({"num_samples": size}, num_clients=2, partition="iid", seed=0).digest() for size in (3, 4)]
    assert sizes[0] != sizes[1]
