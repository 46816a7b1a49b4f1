"""Shares of modalities, missing ones at train and test time, missing and wrong labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.workloads.multimodal.modalities import (
    MISSING_LABEL,
    MissingOptions,
    drop_labels,
    missing_rates,
    parse_shares,
    presence,
    transition_matrix,
    wrong_labels,
)

KNOWN = ("video", "text", "audio")
NUM_SAMPLES = 4000
RATES = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)


def is_met(share: float, rate: float, count: int) -> bool:
    """Whether a share of `count` draws is within six standard errors, and five draws, of its probability."""
    return abs(share - rate) <= 6 * (rate * (1 - rate) / count) ** 0.5 + 5 / count


def test_shares_are_read() -> None:
    kinds = parse_shares({"text + video": 0.5, "text": 0.3, "video": 0.2}, KNOWN, "modalities")
    assert kinds.names == ("text + video", "text", "video")
    np.testing.assert_array_equal(kinds.holds, [[True, True, False], [False, True, False], [True, False, False]])
    np.testing.assert_allclose(kinds.shares, [0.5, 0.3, 0.2])


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
def test_shares_add_up(weights: list[float]) -> None:
    given = dict(zip(KNOWN, np.array(weights) / sum(weights), strict=False))
    assert parse_shares(given, KNOWN, "modalities").shares.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"vidoe": 1.0}, r"modalities has the modality 'vidoe' in 'vidoe', which the model does not know.*video"),
        ({"video+": 1.0}, r"modality '' in 'video\+'"),
        ({"video+video": 1.0}, r"names a modality of 'video\+video' twice"),
        ({"video+text": 0.5, "text+video": 0.5}, r"'video\+text' and 'text\+video', which mean the same"),
        ({"video": 0.5, "text": 0.4}, r"shares 0.5, 0.4, which sum to 0.9"),
        ({"video": 1.5, "text": -0.5}, r"shares of 0 or more"),
        ({}, r"shares of nothing, which sum to 0"),
    ],
)
def test_wrong_shares_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_shares(shares, KNOWN, "modalities")


def test_missing_rates_are_read() -> None:
    options = parse_options(MissingOptions, {"train": {"text": 0.6}, "test": 0.3}, "missing")
    assert (options.train, options.test) == ({"text": 0.6}, 0.3)
    np.testing.assert_array_equal(missing_rates(0.3, KNOWN, "missing.train"), [0.3, 0.3, 0.3])
    np.testing.assert_array_equal(missing_rates({"text": 0.6}, KNOWN, "missing.train"), [0, 0.6, 0])
    with pytest.raises(ConfigError, match=r"missing.test has the modality 'smell'"):
        missing_rates({"smell": 0.6}, KNOWN, "missing.test")
    with pytest.raises(ConfigError, match=r"missing.test has the missing rate 1.5 for 'video'"):
        missing_rates(1.5, KNOWN, "missing.test")


@settings(max_examples=25, deadline=None)
@given(rates=st.lists(RATES, min_size=3, max_size=3), seed=SEEDS)
def test_missing_rates_are_met(rates: list[float], seed: int) -> None:
    held = np.ones((NUM_SAMPLES, 3), dtype=bool)
    held[: NUM_SAMPLES // 2, 1] = False
    found = presence(held, np.array(rates), seed, "train")
    np.testing.assert_array_equal(found, presence(held, np.array(rates), seed, "train"))
    assert not (found & ~held).any()
    for modality, rate in enumerate(rates):
        present = found[held[:, modality], modality]
        assert is_met(1 - present.mean(), rate, len(present))


def test_modalities_are_missing_independently() -> None:
    found = presence(np.ones((NUM_SAMPLES, 2), dtype=bool), np.array([0.5, 0.5]), 0, "train")
    assert is_met((~found).all(axis=1).mean(), 0.25, NUM_SAMPLES)


def test_training_and_test_draw_apart_and_samples_by_their_numbers() -> None:
    held, rates = np.ones((50, 2), dtype=bool), np.array([0.5, 0.5])
    train, test = (presence(held, rates, 0, purpose) for purpose in ("train", "test"))
    assert (train != test).any()
    np.testing.assert_array_equal(presence(held[:20], rates, 0, "train"), train[:20])


@settings(max_examples=25, deadline=None)
@given(rate=RATES, seed=SEEDS)
def test_labels_are_missing_at_their_rate(rate: float, seed: int) -> None:
    labels = np.arange(NUM_SAMPLES) % 7
    found = drop_labels(labels, rate, seed)
    lost = found == MISSING_LABEL
    assert is_met(lost.mean(), rate, NUM_SAMPLES)
    np.testing.assert_array_equal(found[~lost], labels[~lost])


@settings(max_examples=40, deadline=None)
@given(num_labels=st.integers(2, 30), rate=st.floats(0.01, 1), sparsity=st.floats(0, 0.99), seed=SEEDS)
def test_transitions(num_labels: int, rate: float, sparsity: float, seed: int) -> None:
    matrix = transition_matrix(num_labels, rate, sparsity, seed)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    np.testing.assert_allclose(np.diag(matrix), 1 - rate)
    others = matrix[~np.eye(num_labels, dtype=bool)].reshape(num_labels, num_labels - 1)
    assert (others >= 0).all()
    left_out = (others == 0).sum(axis=1)
    assert (left_out <= num_labels - 2).all()  # never all of them
    expected = min(num_labels - 2, num_labels - 1 - round((1 - sparsity) * (num_labels - 1)))
    np.testing.assert_array_equal(left_out, expected)
    np.testing.assert_array_equal(matrix, transition_matrix(num_labels, rate, sparsity, seed))


@settings(max_examples=15, deadline=None)
@given(rate=RATES, seed=SEEDS)
def test_labels_are_wrong_at_their_rate(rate: float, seed: int) -> None:
    labels = np.arange(NUM_SAMPLES) % 4
    matrix = transition_matrix(4, rate, 0.4, seed)
    found = wrong_labels(labels, matrix, seed)
    for label in range(4):
        shares = np.bincount(found[labels == label], minlength=4) / (NUM_SAMPLES / 4)
        for share, expected in zip(shares, matrix[label], strict=True):
            assert is_met(share, expected, NUM_SAMPLES // 4)
    np.testing.assert_array_equal(found, wrong_labels(labels, matrix, seed))


def test_no_wrong_label_is_no_change() -> None:
    labels = np.arange(40) % 4
    np.testing.assert_array_equal(wrong_labels(labels, transition_matrix(4, 0.0, 0.4, 0), 0), labels)
    np.testing.assert_array_equal(transition_matrix(1, 0.0, 0.4, 0), [[1.0]])
    with pytest.raises(ConfigError, match=r"wrong_labels = 0.5 needs another class"):
        transition_matrix(1, 0.5, 0.4, 0)
