"""How training samples are divided among clients.

A partition of your own is a function ``(labels, num_clients, num_labels, seed, owner, **params) -> Partition``, named
as ``my_package.my_module:my_partition``. Those that are drawn are functions of their arguments alone, use every sample
exactly once, leave no client without one, and favour none: the samples of a class are shuffled before they are dealt,
whatever their order in the data set, and where shares are no whole numbers chance decides who gets one more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gossamer import rng
from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.plugins import call_plug_in, plug_in

WHERE = "partition"
NUM_DRAWS = 10
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples each client holds, in compressed rows.

    Attributes:
        indices: int64 [N], sample numbers; those of client i are ``indices[offsets[i]:offsets[i + 1]]``.
        offsets: int64 [num_clients + 1], ascending from 0 to N.
    """

    indices: Ints
    offsets: Ints
    is_partial: ClassVar[bool] = False

    @classmethod
    def of_clients(cls, client: Ints, num_clients: int) -> Partition:
        """Build a partition from the client of every sample, int64 [N]; a client's samples are in ascending order."""
        sizes = np.bincount(client, minlength=num_clients)
        return cls(
            np.argsort(client, kind="stable").astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        )

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[int] | Ints]) -> Partition:
        """Build a partition from the sample numbers of each client."""
        sizes = np.array([len(entry) for entry in lists], dtype=np.int64)
        indices = np.concatenate([np.asarray(entry, dtype=np.int64) for entry in lists]) if len(lists) else sizes
        return cls(indices, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    @property
    def num_samples(self) -> Ints:
        """Samples of each client, int64 [num_clients]."""
        return np.diff(self.offsets)

    def of_client(self, client: int) -> Ints:
        """Return the sample numbers of one client, int64 [num_samples[client]]."""
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def checked(self, name: str, num_clients: int, total: int, min_samples: int = 1) -> Partition:
        """Return this partition if it uses each of `total` samples once and gives all clients at least `min_samples`.

        A `PartialPartition` may leave samples out.

        Raises:
            DataError: it does not.
        """
        if len(self.offsets) != num_clients + 1:
            raise DataError(
                f"partition {name!r} made {len(self.offsets) - 1} clients instead of {num_clients}: correct it"
            )
        outside = self.indices[(self.indices < 0) | (self.indices >= total)]
        if len(outside):
            raise DataError(
                f"partition {name!r} uses sample {outside[0]}, which is outside 0 .. {total - 1}: correct it"
            )
        smallest = int(np.argmin(self.num_samples))
        if self.num_samples[smallest] < min_samples:
            raise DataError(
                f"partition {name!r} gives client {smallest} {self.num_samples[smallest]} samples, fewer than"
                f" {min_samples}: lower the number of clients or min_samples, or choose a less skewed partition"
            )
        used = np.bincount(self.indices, minlength=total)
        wrong = np.flatnonzero((used > 1) if self.is_partial else (used != 1))
        if len(wrong):
            left_out = 'say that some are left out, by partial: true of "file", or {"indices": ..., "partial": True}'
            raise DataError(
                f"partition {name!r} uses sample {wrong[0]} {used[wrong[0]]} times: use each of {total} samples once"
                + ("" if used[wrong[0]] else f", or {left_out}")
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.indices):
            raise DataError(
                f"partition {name!r} has offsets from {self.offsets[0]} to {self.offsets[-1]}:"
                f" let them run from 0 to {len(self.indices)}"
            )
        return self


class PartialPartition(Partition):
    """A partition that may leave samples out, which are then not trained on."""

    is_partial = True


def divide(
    spec: Mapping[str, Any] | str,
    num_clients: int,
    seed: int,
    classes: Ints,
    num_classes: int,
    owner: Ints | None = None,
) -> Partition:
    """Divide samples by a partition of a name.

    Args:
        spec: name, or a mapping of ``name`` and its parameters.
        num_clients: number of clients.
        seed: of the run.
        classes: int64 [N], class of each sample.
        num_classes: number of classes.
        owner: int64 [N], owner of each sample; None: they have none.

    Raises:
        ConfigError: the partition is unknown, or does not take these parameters.
        DataError: it does not do what a partition must.
    """
    name, function, params = plug_in("partition", spec, "clients.partition")
    made = call_plug_in(function, "clients.partition", classes, num_clients, num_classes, seed, owner, **params)
    if not isinstance(made, Partition):
        raise DataError(
            f"partition {name!r} returned {type(made).__name__}: return gossamer.workloads.partitions.Partition"
        )
    return made.checked(name, num_clients, len(classes))


class IidOptions(Options):
    """Options of every partition. Attributes: min_samples: the fewest samples a client may hold."""

    min_samples: int = Field(1, ge=1)


class DirichletOptions(IidOptions):
    """Options of `dirichlet`. Attributes: alpha: concentration; the smaller, the more the clients differ."""

    alpha: float = Field(0.5, gt=0)


class NClassesOptions(IidOptions):
    """Options of `n_classes`. Attributes: n: number of distinct classes that every client holds."""

    n: int = Field(2, ge=1)


class ShardsOptions(IidOptions):
    """Options of `shards`. Attributes: per_client: number of shards that every client gets."""

    per_client: int = Field(2, ge=1)


def _check_counts(num_clients: int, total: int, options: IidOptions) -> None:
    """Refuse more clients than samples.

    Raises:
        DataError: the samples do not suffice.
    """
    if num_clients < 1 or num_clients * options.min_samples > total:
        raise DataError(
            f"{total} training samples cannot give {num_clients} clients {options.min_samples} or more each:"
            " lower the number of clients or use more data"
        )


def rounded(shares: NDArray[np.float64], source: np.random.Generator) -> Ints:
    """Round shares [n] whose sum is whole, each up or down, to int64 [n] of the same sum; their means are the shares.

    This is systematic sampling: cumulated shares are cut at whole numbers, all shifted by one random offset.
    """
    bounds = np.concatenate([[0.0], np.cumsum(shares)])
    total = round(bounds[-1])
    cuts = np.floor(bounds + source.random()).clip(0, total).astype(np.int64)
    cuts[-1] = total  # which rounding errors may have missed
    return np.diff(cuts)


@takes(IidOptions)
def iid(labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any) -> Partition:
    """Shuffle the samples and cut them into equal parts, some larger by one where there is a remainder.

    Computed here because flwr-datasets' `IidPartitioner` shuffles nothing, gives the remainder to the first clients and
    makes one data set object a client, which takes minutes for 100,000 of them.

    Raises:
        ConfigError: an unknown or wrong parameter, see `IidOptions`.
        DataError: fewer samples than clients.
    """
    options = parse_options(IidOptions, params, WHERE)
    _check_counts(num_clients, len(labels), options)
    source = rng.generator(seed, "partition-iid")
    order = source.permutation(len(labels)).astype(np.int64)
    sizes = rounded(np.full(num_clients, len(labels) / num_clients), source)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(order, offsets).checked("iid", num_clients, len(labels), options.min_samples)


@takes(IidOptions)
def in_order(
    labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any
) -> Partition:
    """Cut the samples, in their order, into equal parts, the first ones larger by one where there is a remainder.

    What a participant with data of its own holds is the one part of one.

    Raises:
        ConfigError: an unknown or wrong parameter, see `IidOptions`.
        DataError: fewer samples than clients.
    """
    options = parse_options(IidOptions, params, WHERE)
    _check_counts(num_clients, len(labels), options)
    parts = np.array_split(np.arange(len(labels), dtype=np.int64), num_clients)
    return Partition.of_lists(parts).checked("in-order", num_clients, len(labels), options.min_samples)


@takes(DirichletOptions)
def dirichlet(
    labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any
) -> Partition:
    """Divide every class among the clients in proportions drawn from a symmetric Dirichlet distribution.

    Source: Yurochkin et al., arXiv 1905.12022 (one draw a class over the clients, as most federated benchmarks do). Up
    to ten draws are tried until every client holds `min_samples`. Unlike here, flwr-datasets' `DirichletPartitioner`
    deals a class in the order of the data set, and rounds in favour of the last client at the cost of the first.

    Raises:
        ConfigError: an unknown or wrong parameter, see `DirichletOptions`.
        DataError: no draw gives every client `min_samples`.
    """
    options = parse_options(DirichletOptions, params, WHERE)
    _check_counts(num_clients, len(labels), options)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    client = np.empty(len(labels), dtype=np.int64)
    for attempt in range(NUM_DRAWS):
        source = rng.generator(seed, "partition-dirichlet", extra=attempt)
        for samples in members:
            shares = source.dirichlet(np.full(num_clients, options.alpha)) * len(samples)
            client[source.permutation(samples)] = np.repeat(np.arange(num_clients), rounded(shares, source))
        partition = Partition.of_clients(client, num_clients)
        if partition.num_samples.min() >= options.min_samples:
            return partition.checked("dirichlet", num_clients, len(labels), options.min_samples)
    raise DataError(
        f"none of {NUM_DRAWS} Dirichlet draws with alpha = {options.alpha} gives each of {num_clients} clients"
        f" {options.min_samples} of {len(labels)} samples: raise alpha, or lower the number of clients or min_samples"
    )


@takes(ShardsOptions)
def shards(labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any) -> Partition:
    """Sort the samples by label, in random order within one, cut them into num_clients x per_client shards, deal these.

    Source: McMahan et al., arXiv 1602.05629. Sizes of shards differ by one at most, so that none of the data are left
    out where the division is uneven.

    Raises:
        ConfigError: an unknown or wrong parameter, see `ShardsOptions`.
        DataError: fewer samples than shards.
    """
    options = parse_options(ShardsOptions, params, WHERE)
    num_shards = num_clients * options.per_client
    _check_counts(num_clients, len(labels), options)
    if num_shards > len(labels):
        raise DataError(
            f"{len(labels)} training samples cannot be cut into {num_shards} shards ({num_clients} clients with"
            f" {options.per_client} each): lower {WHERE}.per_client or the number of clients"
        )
    source = rng.generator(seed, "partition-shards")
    owner_of_shard = source.permutation(np.repeat(np.arange(num_clients), options.per_client))
    order = source.permutation(len(labels))
    client = np.empty(len(labels), dtype=np.int64)
    cuts = np.arange(len(labels), dtype=np.int64) * num_shards // len(labels)
    client[order[np.argsort(labels[order], kind="stable")]] = owner_of_shard[cuts]
    return Partition.of_clients(client, num_clients).checked("shards", num_clients, len(labels), options.min_samples)


@takes(IidOptions)
def natural_id(
    labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any
) -> Partition:
    """Give every natural owner (writer, speaker, phone) a client of its own, in ascending order of their ids.

    Raises:
        ConfigError: an unknown or wrong parameter, see `IidOptions`.
        DataError: the data set has no owners, or their number is not that of the clients.
    """
    options = parse_options(IidOptions, params, WHERE)
    if owner is None:
        raise DataError(
            "the data set has no natural owners, so partition 'natural-id' cannot divide it: choose another partition"
        )
    owners, client = np.unique(owner, return_inverse=True)
    num_owners = len(owners)
    if num_owners != num_clients:
        raise DataError(
            f"the data set has {num_owners} natural owners but {num_clients} clients: set the clients to {num_owners}"
        )
    partition = Partition.of_clients(client, num_clients)
    return partition.checked("natural-id", num_clients, len(labels), options.min_samples)


@takes(NClassesOptions)
def n_classes(
    labels: Ints, num_clients: int, num_labels: int, seed: int, owner: Ints | None, **params: Any
) -> Partition:
    """Give every client exactly n distinct classes; a class is divided evenly (to one sample) among its owners.

    The number of owners of a class follows its size, so that clients end up about equally large. This is the split of
    HeteroFL and FedRolex (arXiv 2010.01264, 2212.01548), whose code loses samples and classes; here none is lost.

    Raises:
        ConfigError: an unknown or wrong parameter, see `NClassesOptions`.
        DataError: n exceeds the classes, some class would go unowned, or the classes have too few samples.
    """
    options = parse_options(NClassesOptions, params, WHERE)
    _check_counts(num_clients, len(labels), options)
    counts = np.bincount(labels, minlength=num_labels)
    present = np.flatnonzero(counts)
    source, ties = (rng.generator(seed, f"partition-n-classes{part}") for part in ("", "-ties"))
    num_owners = _num_owners(counts[present], num_clients, options.n)
    owned = _deal_classes(num_owners, num_clients, options.n, source)
    client = np.empty(len(labels), dtype=np.int64)
    sizes = np.zeros(num_clients, dtype=np.int64)
    for column, label in enumerate(present):
        owners = np.flatnonzero(owned[:, column])
        share, remainder = divmod(int(counts[label]), len(owners))
        shares = np.full(len(owners), share)
        smallest = np.lexsort((ties.random(len(owners)), sizes[owners]))
        shares[smallest[:remainder]] += 1
        client[source.permutation(np.flatnonzero(labels == label))] = np.repeat(owners, shares)
        sizes[owners] += shares
    return Partition.of_clients(client, num_clients).checked("n-classes", num_clients, len(labels), options.min_samples)


def _num_owners(counts: Ints, num_clients: int, n: int) -> Ints:
    """Choose how many clients own each class, int64 [classes]: at least one, in proportion to the sizes (D'Hondt).

    Raises:
        DataError: there is no such choice.
    """
    slots = num_clients * n
    most = np.minimum(counts, num_clients)
    if n > len(counts) or slots < len(counts):
        raise DataError(
            f"{num_clients} clients with exactly {n} classes each cannot hold the {len(counts)} classes of the data:"
            f" choose {WHERE}.n between {-(-len(counts) // num_clients)} and {len(counts)}"
        )
    if slots > most.sum():
        raise DataError(
            f"the classes have too few samples (the smallest {counts.min()}) to give {num_clients} clients {n} classes"
            f" each: lower {WHERE}.n or the number of clients"
        )
    classes = np.repeat(np.arange(len(counts)), most - 1)
    divisors = np.concatenate([np.arange(2, limit + 1) for limit in most])
    ranking = np.argsort(-counts[classes] / divisors, kind="stable")
    return 1 + np.bincount(classes[ranking[: slots - len(counts)]], minlength=len(counts))


def _deal_classes(num_owners: Ints, num_clients: int, n: int, source: np.random.Generator) -> NDArray[np.bool_]:
    """Choose n distinct classes for every client at random, so that class c gets exactly ``num_owners[c]`` clients.

    Client after client draws classes in proportion to the owners that they still lack (Gumbel's trick), and must take
    those that lack as many as there are clients left; as no class ever lacks more, the deal comes out even.

    Returns:
        bool [num_clients, classes].
    """
    owned = np.zeros((num_clients, len(num_owners)), dtype=np.bool_)
    lacking = num_owners.copy()
    noise = source.gumbel(size=owned.shape)
    for client in range(num_clients):
        with np.errstate(divide="ignore"):
            keys = np.log(lacking) + noise[client]
        keys[lacking == num_clients - client] = np.inf
        chosen = np.argpartition(-keys, n - 1)[:n]
        owned[client, chosen] = True
        lacking[chosen] -= 1
    return owned
