"""Partitions: every sample once, each kind as it is defined, deterministic, and refused where impossible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossamer.errors import ConfigError, DataError
from gossamer.workloads.partitions import Partition, dirichlet, iid, in_order, n_classes, natural_id, shards

Ints = NDArray[np.int64]
quick = settings(max_examples=20)


def random_labels(count: int, num_labels: int, seed: int = 0) -> Ints:
    """Return uniformly drawn labels, [count]."""
    return np.random.default_rng(seed).integers(0, num_labels, count)


def check(partition: Partition, total: int, num_clients: int) -> None:
    """Every sample is used exactly once, and no client is empty."""
    assert sorted(partition.indices.tolist()) == list(range(total))
    assert partition.num_samples.shape == (num_clients,)
    assert partition.num_samples.min() >= 1
    assert np.array_equal(np.concatenate([partition.of_client(i) for i in range(num_clients)]), partition.indices)


@quick
@given(st.integers(1, 200), st.data())
def test_iid_is_even(total: int, data: st.DataObject) -> None:
    num_clients = data.draw(st.integers(1, total))
    partition = iid(random_labels(total, 3), num_clients, 3, data.draw(st.integers(0, 5)), None)
    check(partition, total, num_clients)
    assert partition.num_samples.max() - partition.num_samples.min() <= 1


@quick
@given(st.integers(1, 200), st.data())
def test_in_order(total: int, data: st.DataObject) -> None:
    num_clients = data.draw(st.integers(1, total))
    partition = in_order(random_labels(total, 3), num_clients, 3, 0, None)
    assert partition.indices.tolist() == list(range(total))
    sizes = [total // num_clients + (client < total % num_clients) for client in range(num_clients)]
    assert partition.num_samples.tolist() == sizes


@pytest.mark.parametrize(
    ("make", "params"), [(iid, {}), (dirichlet, {"alpha": 1e6}), (shards, {}), (n_classes, {"n": 10})]
)
def test_the_order_of_the_data_set_does_not_matter(make: Callable[..., Partition], params: dict[str, Any]) -> None:
    """Ten classes, each stored speaker after speaker: no client may hear more of one speaker than chance has it."""
    labels, speaker = np.repeat(np.arange(10), 270), np.tile(np.repeat(np.arange(6), 45), 10)
    made = make(labels, 6, 10, 0, None, **params)
    for client in range(6):
        assert np.bincount(speaker[made.of_client(client)], minlength=6).max() < 0.25 * made.num_samples[client]


@pytest.mark.parametrize(
    ("make", "params", "num_seeds", "tolerance"),
    [
        (iid, {}, 100, 0.3),
        (dirichlet, {"alpha": 10.0}, 300, 0.6),
        (dirichlet, {"alpha": 1e6}, 300, 0.6),
        (n_classes, {"n": 5}, 100, 0.3),
        (shards, {}, 50, 0.4),
    ],
)
def test_rounding_favours_no_client(
    make: Callable[..., Partition], params: dict[str, Any], num_seeds: int, tolerance: float
) -> None:
    labels = np.arange(1437) % 10
    sizes = np.mean([make(labels, 100, 10, seed, None, **params).num_samples for seed in range(num_seeds)], axis=0)
    assert np.abs(sizes - 14.37).max() < tolerance
    assert np.polyfit(np.linspace(-0.5, 0.5, 100), sizes, 1)[0] == pytest.approx(0, abs=tolerance / 4)


@pytest.mark.parametrize("alpha", [1e-30, 1e-4, 1e30])
def test_dirichlet_of_extreme_concentrations(alpha: float) -> None:
    with contextlib.suppress(DataError):  # where one client gets everything
        check(dirichlet(random_labels(500, 5), 4, 5, 0, None, alpha=alpha), 500, 4)


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 60), st.integers(0, 3))
def test_shards_hold_few_labels(num_clients: int, per_client: int, extra: int, seed: int) -> None:
    total = num_clients * per_client + extra
    labels = random_labels(total, 5, seed)
    partition = shards(labels, num_clients, 5, seed, None, per_client=per_client)
    check(partition, total, num_clients)
    held = sum(len(np.unique(labels[partition.of_client(client)])) for client in range(num_clients))
    assert held <= num_clients * per_client + 5 - 1  # five labels have four borders, each of which divides a shard
    assert partition.num_samples.max() - partition.num_samples.min() <= per_client


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 10), st.floats(0.5, 100), st.integers(0, 1000))
def test_dirichlet_uses_every_sample(num_clients: int, alpha: float, seed: int) -> None:
    labels = random_labels(500, 5, seed)
    partition = dirichlet(labels, num_clients, 5, seed, None, alpha=alpha, min_samples=2)
    check(partition, 500, num_clients)
    assert partition.num_samples.min() >= 2


def test_dirichlet_skew_follows_alpha() -> None:
    labels = random_labels(4000, 10)

    def largest_share(alpha: float) -> float:
        """Return the mean share of a client's commonest label."""
        made = dirichlet(labels, 10, 10, 0, None, alpha=alpha)
        shares = [np.bincount(labels[made.of_client(i)], minlength=10).max() / made.num_samples[i] for i in range(10)]
        return float(np.mean(shares))

    assert largest_share(0.1) > 0.4 > 0.2 > largest_share(1000.0) > 0.1


def test_natural_owners_are_those_of_the_library() -> None:
    import datasets
    from flwr_datasets.partitioner import NaturalIdPartitioner

    owner = random_labels(60, 7)
    partitioner = NaturalIdPartitioner("owner")
    partitioner.dataset = datasets.Dataset.from_dict({"owner": owner, "sample": np.arange(60)})
    made = natural_id(np.zeros(60, dtype=np.int64), 7, 1, 0, owner)
    for client in range(7):
        assert partitioner.load_partition(client)["sample"][:] == made.of_client(client).tolist()


def test_natural_owners_become_clients_in_order() -> None:
    owner = np.array([70, 5, 70, 9, 5, 5])
    partition = natural_id(np.zeros(6, dtype=np.int64), 3, 1, 0, owner)
    assert [partition.of_client(i).tolist() for i in range(3)] == [[1, 4, 5], [3], [0, 2]]
    with pytest.raises(DataError, match="3 natural owners but 4 clients"):
        natural_id(np.zeros(6, dtype=np.int64), 4, 1, 0, owner)
    with pytest.raises(DataError, match="no natural owners"):
        natural_id(np.zeros(6, dtype=np.int64), 3, 1, 0, None)


@given(st.data())
def test_n_classes_gives_exactly_n(data: st.DataObject) -> None:
    num_clients, num_labels = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 8))
    n = data.draw(st.integers(1, num_labels))
    counts = data.draw(st.lists(st.integers(1, 30), min_size=num_labels, max_size=num_labels))
    labels = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(np.repeat(np.arange(num_labels), counts))
    possible = num_clients * n >= num_labels and sum(min(c, num_clients) for c in counts) >= num_clients * n
    if not possible or num_clients > len(labels):
        with pytest.raises(DataError):
            n_classes(labels, num_clients, num_labels, 0, None, n=n)
        return
    partition = n_classes(labels, num_clients, num_labels, 0, None, n=n)
    check(partition, len(labels), num_clients)
    held = np.zeros((num_clients, num_labels), dtype=np.int64)
    for client in range(num_clients):
        held[client] = np.bincount(labels[partition.of_client(client)], minlength=num_labels)
    assert ((held > 0).sum(axis=1) == n).all()
    assert (held > 0).any(axis=0).all()
    for label in range(num_labels):
        shares = held[held[:, label] > 0, label]
        assert shares.max() - shares.min() <= 1


def test_n_classes_is_even_on_even_data() -> None:
    labels = np.repeat(np.arange(10), 100)
    for n in (2, 5):
        partition = n_classes(labels, 20, 10, 0, None, n=n)
        assert partition.num_samples.tolist() == [50] * 20
    pairs = {tuple(np.unique(labels[partition.of_client(i)])) for i in range(20)}
    assert len(pairs) > 10  # the combinations are drawn, not a cycle


def test_absent_classes_are_nobodys() -> None:
    labels = np.repeat([1, 4], 10)
    partition = n_classes(labels, 4, 6, 0, None, n=1)
    assert sorted(int(np.unique(labels[partition.of_client(i)])[0]) for i in range(4)) == [1, 1, 4, 4]


@pytest.mark.parametrize(
    ("make", "params"), [(iid, {}), (dirichlet, {"alpha": 1.0}), (shards, {}), (n_classes, {"n": 3})]
)
def test_deterministic_in_the_seed(make: Callable[..., Partition], params: dict[str, Any]) -> None:
    labels = random_labels(400, 6)
    first, same, other = (make(labels, 8, 6, seed, None, **params) for seed in (1, 1, 2))
    assert np.array_equal(first.indices, same.indices)
    assert np.array_equal(first.offsets, same.offsets)
    assert first.indices.dtype == first.offsets.dtype == np.int64
    assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize(
    ("make", "num_clients", "params", "message"),
    [
        (iid, 61, {}, "60 training samples cannot give 61 clients"),
        (iid, 31, {"min_samples": 2}, "31 clients 2 or more"),
        (dirichlet, 61, {}, "61 clients"),
        (dirichlet, 55, {"alpha": 0.01}, "alpha = 0.01 gives each of 55 clients"),
        (shards, 40, {}, "80 shards"),
        (n_classes, 2, {"n": 2}, r"2 clients with exactly 2 .* between 3 and 6"),
        (n_classes, 10, {"n": 7}, "exactly 7 classes"),
        (n_classes, 11, {"n": 6}, "too few samples"),
        (n_classes, 61, {"n": 1}, "61 clients"),
    ],
)
def test_impossible_partitions_are_refused(
    make: Callable[..., Partition], num_clients: int, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(np.repeat(np.arange(6), 10), num_clients, 6, 0, None, **params)


def test_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'alpha'"):
        dirichlet(random_labels(50, 2), 2, 2, 0, None, alhpa=0.3)
    with pytest.raises(ConfigError, match=r"partition\.alpha = 0"):
        dirichlet(random_labels(50, 2), 2, 2, 0, None, alpha=0)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 1], [1, 2]], "sample 1 2 times"),
        ([[0, 1], [3]], "sample 2 0 times"),
        ([[0, 1, 2], [3, 4]], "sample 4, which is outside 0 .. 3"),
        ([[0, 1], [2, 3], []], "3 clients instead of 2"),
        ([[0, 1, 2, 3], []], "client 1 0 samples"),
        ([[0, 1, 2, 3, -1], [0]], "sample -1, which is outside"),
    ],
)
def test_faulty_partitions_are_caught(lists: list[list[int]], message: str) -> None:
    Partition.of_lists([[3, 1], [2, 0]]).checked("mine", 2, 4)
    with pytest.raises(DataError, match=message):
        Partition.of_lists(lists).checked("mine", 2, 4)


def test_faulty_offsets_are_caught() -> None:
    with pytest.raises(DataError, match="offsets from 0 to 3"):
        Partition(np.arange(4), np.array([0, 2, 3])).checked("mine", 2, 4)
    with pytest.raises(DataError, match="client 1 -1 samples"):
        Partition(np.arange(4), np.array([0, 3, 2, 4])).checked("mine", 3, 4)


def test_a_hundred_thousand_clients_take_seconds() -> None:
    labels = random_labels(200_000, 10)
    for make, params in ((iid, {}), (n_classes, {"n": 2})):
        assert len(make(labels, 100_000, 10, 0, None, **params).num_samples) == 100_000
