"""Which modalities clients and samples have, and which labels are missing or wrong.

Clients hold modalities in shares, such as ``{video+text: 0.5, text: 0.3, video: 0.2}``; of what its client holds, a
sample may lack some by chance. These are the switches of FedMultimodal (arXiv 2306.09486): missing modalities, missing
labels and erroneous labels. Everything is a function of a seed and of the samples' numbers, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer import rng
from gossamer.errors import ConfigError, nearest
from gossamer.options import Options

JOIN = "+"
TOLERANCE = 1e-6  # of the sum of shares
MISSING_LABEL = -1
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class ModalityKinds(NamedTuple):
    """Kinds of clients by what they hold.

    Attributes:
        names: as given, such as ``"video+text"``.
        holds: bool [kinds, modalities].
        shares: float64 [kinds], of the clients; they sum to 1.
    """

    names: tuple[str, ...]
    holds: Bools
    shares: Floats


def parse_modalities(name: str, known: Sequence[str], where: str) -> Bools:
    """Return which modalities a name such as ``"video+text"`` joins, bool [modalities].

    Args:
        name: names of modalities, joined by ``+`` in any order.
        known: the modalities of the model, in their order.
        where: dotted path of the setting, for errors.

    Raises:
        ConfigError: it names none, one twice, or one that the model does not know.
    """
    parts = [part.strip() for part in name.split(JOIN)]
    for part in parts:
        if part not in known:
            raise ConfigError(
                f"{where} has the modality {part!r} in {name!r}, which the model does not know: name some of"
                f" {', '.join(known)}{nearest(part, known)}"
            )
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{where} names a modality of {name!r} twice: name each once")
    return np.isin(np.array(known), parts)


def parse_shares(shares: Mapping[str, float], known: Sequence[str], where: str) -> ModalityKinds:
    """Read shares of clients by what they hold.

    Args:
        shares: ``{"video+text": 0.5, "text": 0.5}``: names joined by ``+``, and shares that sum to 1.
        known: the modalities of the model, in their order.
        where: dotted path of the setting, for errors.

    Raises:
        ConfigError: a modality is unknown, two names mean the same, a share is negative, or they do not sum to 1.
    """
    holds = [parse_modalities(name, known, where) for name in shares]
    seen: dict[bytes, str] = {}
    for name, one in zip(shares, holds, strict=True):
        first = seen.setdefault(one.tobytes(), name)
        if first != name:
            raise ConfigError(f"{where} has {first!r} and {name!r}, which mean the same: add up their shares")
    values = np.array(list(shares.values()), dtype=np.float64)
    total = values.sum()
    if not (values >= 0).all() or abs(total - 1) > TOLERANCE:
        raise ConfigError(
            f"{where} has shares {', '.join(f'{value:g}' for value in values) or 'of nothing'}, which sum to {total:g}:"
            " give shares of 0 or more that sum to 1"
        )
    return ModalityKinds(tuple(shares), np.array(holds), values / total)


class MissingOptions(Options):
    """Modalities that samples lack, as in FedMultimodal (arXiv 2306.09486).

    Attributes:
        train, test: probability that a sample lacks a modality that its client holds, of each modality by itself: one
            number for all of them, or one for each, such as ``{video: 0.3}``, 0 for the others.
    """

    train: float | dict[str, float] = 0.0
    test: float | dict[str, float] = 0.0


def missing_rates(given: float | Mapping[str, float], known: Sequence[str], where: str) -> Floats:
    """Return the missing rate of each modality, float64 [modalities].

    Args:
        given: one for all, or one for each, see `MissingOptions`.
        known: the modalities of the model, in their order.
        where: dotted path of the setting, for errors.

    Raises:
        ConfigError: a modality is unknown, or a rate is no probability.
    """
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(known, given)
    for name, rate in by_name.items():
        parse_modalities(name, known, where)
        if not 0 <= rate <= 1:
            raise ConfigError(f"{where} has the missing rate {rate} for {name!r}: give a probability from 0 to 1")
    return np.array([by_name.get(name, 0.0) for name in known], dtype=np.float64)


def presence(held: Bools, rates: Floats, seed: int, purpose: str) -> Bools:
    """Return which modalities each sample has, bool [N, modalities].

    Each modality that is held is missing with its rate, independently of all others. A sample may so lose all of them:
    it then adds nothing to any loss.

    Args:
        held: bool [N, modalities], what the client of each sample holds.
        rates: float64 [modalities], see `missing_rates`.
        seed, purpose: address of the draws; give training and test data different purposes.
    """
    drawn = rng.uniforms(seed, purpose, 0, 0, np.arange(len(held)), held.shape[1])
    return held & (drawn >= rates)


def drop_labels(labels: Ints, rate: float, seed: int, purpose: str = "missing-labels") -> Ints:
    """Return labels of which each is `MISSING_LABEL` with probability `rate`; int64 [N].

    Args:
        labels: int64 [N].
        seed, purpose: address of the draws.
    """
    drawn = rng.uniforms(seed, purpose, 0, 0, np.arange(len(labels)), 1)[:, 0]
    return np.where(drawn < rate, MISSING_LABEL, labels)


def transition_matrix(num_labels: int, rate: float, sparsity: float, seed: int) -> Floats:
    """Return with what probability a class is given as another, float64 [true, given]; its rows sum to 1.

    A class keeps its label with probability 1 - rate. Of the num_labels - 1 others, a share `sparsity`, rounded to
    whole classes but never all of them, gets nothing; which ones, and how `rate` is divided among the rest, is drawn
    for each class (uniformly over all such divisions).

    Args:
        num_labels: number of classes, 2 or more where the rate is above 0.
        rate: probability of a wrong label.
        sparsity: share of the other classes that are left out.
        seed: seed of the draws.

    Raises:
        ConfigError: there is no other class.
    """
    if num_labels < 2 and rate > 0:
        raise ConfigError(f"wrong_labels = {rate} needs another class than the only one: set it to 0")
    matrix = np.eye(num_labels) * (1 - rate)
    num_given = max(1, round((1 - sparsity) * (num_labels - 1)))
    for label in range(num_labels if rate > 0 else 0):
        source = rng.generator(seed, "label-transitions", participant=label)
        given = source.choice(np.delete(np.arange(num_labels), label), num_given, replace=False)
        matrix[label, given] = rate * source.dirichlet(np.ones(num_given))
    return matrix if rate > 0 else np.eye(num_labels)


def wrong_labels(labels: Ints, matrix: Floats, seed: int, purpose: str = "wrong-labels") -> Ints:
    """Return labels as they are given where true ones are confused; int64 [N].

    Args:
        labels: int64 [N], true labels.
        matrix: float64 [true, given], see `transition_matrix`.
        seed, purpose: address of the draws.
    """
    drawn = rng.uniforms(seed, purpose, 0, 0, np.arange(len(labels)), 1)
    cumulated = np.cumsum(matrix, axis=1)
    cumulated[:, -1] = 1.0  # which rounding errors may have missed
    given: Ints = (drawn >= cumulated[labels]).sum(axis=1).astype(np.int64)
    return given
