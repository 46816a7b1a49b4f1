"""How close captions are to what people wrote: BLEU and CIDEr-D, from words.

BLEU is computed from sums that can be added over chunks of data; CIDEr-D from the references' document frequencies,
which all chunks share, as a sum over captions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_N = 4
SIGMA = 6.0  # words, width of CIDEr-D's penalty on another length
SCALE = 10.0  # of CIDEr

Words = Sequence[str]
Ngram = tuple[str, ...]


def ngrams(words: Words, n: int) -> Counter[Ngram]:
    """Count the runs of n words."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def bleu_sums(candidate: Words, references: Sequence[Words]) -> NDArray[np.float64]:
    """Return what one caption adds to the sums of `bleu`.

    Args:
        candidate: words of the caption.
        references: words of each reference, at least one.

    Returns:
        float64 [2 + 2 x 4]: length of the caption; length of the reference that is nearest to it, the shorter one of
        two; runs of n words that are found in a reference, as often as in any single one of them, n = 1 .. 4; all of
        the caption's.
    """
    nearest = min((abs(len(one) - len(candidate)), len(one)) for one in references)[1]
    found, total = [], []
    for n in range(1, MAX_N + 1):
        most: Counter[Ngram] = Counter()
        for one in references:
            most |= ngrams(one, n)
        found.append((ngrams(candidate, n) & most).total())
        total.append(max(0, len(candidate) - n + 1))
    return np.array([len(candidate), nearest, *found, *total], dtype=np.float64)


def bleu(sums: NDArray[np.float64]) -> float:
    """Return BLEU-4 of a corpus, from 0 to 100, with sacrebleu's default smoothing.

    The geometric mean of the precisions of 1 to 4 words, times exp(1 - reference length / length) where captions are
    too short (Papineni et al., ACL 2002). The k-th precision of no hits counts as 1 / (2^k x total), as sacrebleu does
    (Post, arXiv 1804.08771), and lengths n of which no caption has a run give 0.

    Args:
        sums: float64 [10], sum of `bleu_sums` over the corpus.
    """
    length, reference = sums[:2]
    found, total = sums[2 : 2 + MAX_N], sums[2 + MAX_N :]
    if not found.any() or not total.all():
        return 0.0
    logarithm, smoothing = 0.0, 1.0
    for hits, runs in zip(found, total, strict=True):
        if not hits:
            smoothing *= 2
        logarithm += math.log(hits / runs if hits else 1 / (smoothing * runs))
    penalty = min(0.0, 1 - reference / length)
    return float(100 * math.exp(penalty + logarithm / MAX_N))


@dataclass(frozen=True)
class Bigrams:
    """A model of texts in which a word depends on the one before it alone: the baseline of captions.

    Attributes:
        following: float64 [tokens, tokens], the probability of each token after each; rows without any are 0.
    """

    following: NDArray[np.float64]

    @classmethod
    def of(cls, texts: NDArray[np.int64], num_tokens: int) -> Bigrams:
        """Count in texts int64 [N, n], from the first token of each; negative ones are none."""
        counts = np.zeros((num_tokens, num_tokens))
        first, second = texts[:, :-1].ravel(), texts[:, 1:].ravel()
        held = (first >= 0) & (second >= 0)
        np.add.at(counts, (first[held], second[held]), 1)
        return cls(counts / np.maximum(counts.sum(1, keepdims=True), 1))

    def drawn(self, begin: int, count: int, length: int, source: np.random.Generator) -> NDArray[np.int64]:
        """Return texts that are drawn word by word, int64 [count, length]; -1 follows what nothing follows.

        Args:
            begin: first token of each.
            count, length: number of texts, and of tokens of each.
            source: of the draws.
        """
        texts = np.full((count, length), -1, dtype=np.int64)
        texts[:, 0] = begin
        for place in range(1, length):
            sums = self.following[texts[:, place - 1]].cumsum(1)
            sums[texts[:, place - 1] < 0] = 0
            word = (source.random((count, 1)) * sums[:, -1:] >= sums).sum(1)
            texts[:, place] = np.where(sums[:, -1] > 0, word, -1)
        return texts


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many documents a run of words occurs; the references of one image or video are a document.

    Attributes:
        counts: of each run of 1 to 4 words.
        num_documents: number of documents.
    """

    counts: Counter[Ngram]
    num_documents: int

    @classmethod
    def of(cls, documents: Sequence[Sequence[Words]]) -> DocumentFrequencies:
        """Count in the references, ``documents[i]`` those of image i."""
        counts: Counter[Ngram] = Counter()
        for references in documents:
            counts.update({run for one in references for n in range(1, MAX_N + 1) for run in ngrams(one, n)})
        return cls(counts, len(documents))

    def weight(self, run: Ngram) -> float:
        """Return the inverse document frequency, log(documents / max(1, those that have the run))."""
        return math.log(self.num_documents) - math.log(max(1, self.counts[run])) if self.num_documents else 0.0


def cider_d(candidate: Words, references: Sequence[Words], frequencies: DocumentFrequencies) -> float:
    """Return CIDEr-D of a caption, from 0 to 10 (Vedantam et al., arXiv 1411.5726); a corpus has the mean.

    For n = 1 .. 4, the cosine of TF-IDF vectors of runs of n words, those of the caption clipped to the reference's in
    the product, times exp(-(difference of lengths)^2 / (2 x 6^2)); the mean over references and n, times 10.

    Args:
        candidate: words of the caption.
        references: words of each reference, at least one.
        frequencies: of the references of the whole corpus.
    """
    total = 0.0
    for one in references:
        penalty = math.exp(-((len(candidate) - len(one)) ** 2) / (2 * SIGMA**2))
        total += penalty * sum(_clipped_cosine(candidate, one, n, frequencies) for n in range(1, MAX_N + 1))
    return SCALE * total / (MAX_N * len(references))


def _clipped_cosine(candidate: Words, reference: Words, n: int, frequencies: DocumentFrequencies) -> float:
    mine, theirs = (
        {run: count * frequencies.weight(run) for run, count in ngrams(words, n).items()}
        for words in (candidate, reference)
    )
    norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
    product = sum(min(value, theirs[run]) * theirs[run] for run, value in mine.items() if run in theirs)
    return product / norms if norms else 0.0
