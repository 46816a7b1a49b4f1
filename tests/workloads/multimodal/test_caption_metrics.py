"""BLEU against sacrebleu, CIDEr-D against cases by hand, and what both must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.workloads.multimodal.caption_metrics import Bigrams, DocumentFrequencies, bleu, bleu_sums, cider_d

CAPTIONS = st.lists(
    st.sampled_from(["the", "five", "seven", "moves", "left", "right", "then", "up", "down"]), min_size=1, max_size=9
)
CORPORA = st.lists(st.tuples(CAPTIONS, CAPTIONS, CAPTIONS), min_size=1, max_size=6)


def corpus_bleu(corpus: list[tuple[list[str], ...]]) -> float:
    """Return the BLEU of captions, each with its references."""
    return bleu(np.sum([bleu_sums(caption, references) for caption, *references in corpus], axis=0))


@settings(max_examples=60, deadline=None)
@given(CORPORA)
def test_bleu_equals_sacrebleu(corpus: list[tuple[list[str], ...]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    captions = [" ".join(caption) for caption, _, _ in corpus]
    streams = [[" ".join(one[place]) for one in corpus] for place in (1, 2)]
    expected = sacrebleu.corpus_bleu(captions, streams, tokenize="none", force=True).score
    assert corpus_bleu(corpus) == pytest.approx(expected, abs=1e-3)


def test_bleu_by_hand() -> None:
    """4 of 5 words, 2 of 4 pairs, 1 of 3 triples, none of 2 runs of four; the reference is one word longer."""
    caption, reference = ["the", "five", "moves", "to", "left"], ["the", "five", "moves", "quickly", "left", "up"]
    hits, totals = [4, 2, 1, 0], [5, 4, 3, 2]
    np.testing.assert_array_equal(bleu_sums(caption, [reference]), [5, 6, *hits, *totals])
    precisions = 4 / 5 * 2 / 4 * 1 / 3 * 1 / (2 * 2)
    assert corpus_bleu([(caption, reference)]) == pytest.approx(100 * math.exp(1 - 6 / 5) * precisions**0.25)


def test_bleu_of_right_and_of_wrong_captions() -> None:
    words = ["the", "five", "moves", "left"]
    assert corpus_bleu([(words, words)]) == pytest.approx(100)
    assert corpus_bleu([(["a"] * 4, words)]) == 0
    assert corpus_bleu([([], words)]) == 0


def test_of_two_references_equally_near_the_shorter_one_counts() -> None:
    assert bleu_sums(["a"] * 4, [["a"] * 6, ["a"] * 2])[1] == 2


def test_a_word_counts_as_often_as_in_one_reference() -> None:
    assert bleu_sums(["the"] * 5, [["the", "the", "x"], ["y", "the"]])[2] == 2


@settings(max_examples=30, deadline=None)
@given(CORPORA, st.integers(0, 6))
def test_bleu_sums_add_over_chunks(corpus: list[tuple[list[str], ...]], cut: int) -> None:
    sums = [bleu_sums(caption, references) for caption, *references in corpus]
    first, second = (np.sum(part, axis=0) if part else np.zeros(10) for part in (sums[:cut], sums[cut:]))
    assert bleu(first + second) == corpus_bleu(corpus)


def test_cider_d_of_one_word_by_hand() -> None:
    """ "five left" against "five up": of the words, only "five" is shared, which two of four documents have."""
    documents = [[["five", "up"]], [["five", "left"]], [["six", "left"]], [["six", "down"]]]
    frequencies = DocumentFrequencies.of(documents)
    five, left, up = math.log(4 / 2), math.log(4 / 2), math.log(4 / 1)
    cosine = five * five / (math.hypot(five, left) * math.hypot(five, up))
    assert cider_d(["five", "left"], documents[0], frequencies) == pytest.approx(10 * cosine / 4)


def test_cider_d_clips_what_is_repeated() -> None:
    """ "five five five" against "five up": the word counts once in the product, and thrice in the norm."""
    frequencies = DocumentFrequencies.of([[["five", "up"]], [["six", "up"]], [["six", "down"]]])
    five, up = math.log(3), math.log(3 / 2)
    cosine = five * five / (3 * five * math.hypot(five, up))
    penalty = math.exp(-1 / 72)
    assert cider_d(["five"] * 3, [["five", "up"]], frequencies) == pytest.approx(10 * penalty * cosine / 4)


def test_cider_d_of_a_right_caption_is_ten() -> None:
    words = ["the", "five", "moves", "left"]
    frequencies = DocumentFrequencies.of([[words], [["a", "six", "stays", "here"]]])
    assert cider_d(words, [words], frequencies) == pytest.approx(10)
    assert cider_d(words, [words, ["one", "two", "three", "four"]], frequencies) == pytest.approx(5)


def test_a_word_of_all_documents_is_worth_nothing() -> None:
    frequencies = DocumentFrequencies.of([[["the"]], [["the"]]])
    assert cider_d(["the"], [["the"]], frequencies) == 0


@settings(max_examples=40, deadline=None)
@given(CORPORA)
def test_cider_d_lies_between_0_and_10(corpus: list[tuple[list[str], ...]]) -> None:
    frequencies = DocumentFrequencies.of([references for _, *references in corpus])
    for caption, *references in corpus:
        assert -1e-9 <= cider_d(caption, references, frequencies) <= 10 + 1e-9


class TestBigrams:
    def test_probabilities_by_hand(self) -> None:
        """1 2 3, 1 2 2 3 and 1 3: after 1 comes 2 twice and 3 once, after 2 comes 3 twice and 2 once."""
        model = Bigrams.of(np.array([[1, 2, 3, -1], [1, 2, 2, 3], [1, 3, -1, -1]]), 4)
        wanted = np.array([[0, 0, 0, 0], [0, 0, 2 / 3, 1 / 3], [0, 0, 1 / 3, 2 / 3], [0, 0, 0, 0]])
        np.testing.assert_allclose(model.following, wanted)

    def test_texts_follow_the_probabilities(self) -> None:
        model = Bigrams.of(np.array([[1, 2, 3, -1], [1, 2, 2, 3], [1, 3, -1, -1]]), 4)
        texts = model.drawn(1, 4000, 6, np.random.default_rng(0))
        assert (texts[:, 0] == 1).all()
        assert np.mean(texts[:, 1] == 2) == pytest.approx(2 / 3, abs=0.03)
        after = texts[:, 1:][texts[:, :-1] == 2]
        assert np.mean(after == 3) == pytest.approx(2 / 3, abs=0.03)
        assert set(texts[:, 1:][(texts[:, :-1] == 3) | (texts[:, :-1] == -1)].tolist()) == {-1}
