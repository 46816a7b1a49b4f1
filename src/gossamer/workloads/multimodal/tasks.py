"""What models of videos and texts are measured by: for each task, sums over test clips, and metrics of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng
from gossamer.workloads.base import Sums
from gossamer.workloads.multimodal.caption_metrics import Bigrams, DocumentFrequencies, bleu, bleu_sums, cider_d
from gossamer.workloads.multimodal.clips import BEGIN, PAD, ClipData, Clips

RECALLS = (1, 5, 10)


class Measure(Protocol):
    """How a task is measured."""

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return additive sums over a pool of test clips, of what `VideoLanguageModel.predict` returned."""
        ...

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics."""
        ...


def ranks(similarity: Tensor) -> Tensor:
    """Return how many others are at least as similar to each row as its own entry, int64 [n], 0 the best.

    Args:
        similarity: float32 [n, n]; row i belongs to column i.
    """
    own = similarity.diagonal()[:, None]
    return (similarity >= own).sum(-1) - 1


class Retrieval:
    """Share of the pairs of a pool that are found among the first 1, 5 and 10, by text and by video."""

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return hits of both directions, of embeddings ``"video"`` and ``"text"`` [n, width]."""
        similarity, found = predicted["video"] @ predicted["text"].T, {"retrieval_count": float(len(clips))}
        for way, scores in (("video_to_text", similarity), ("text_to_video", similarity.T)):
            rank = ranks(scores)
            found |= {f"recall_at_{k}_{way}": float((rank < k).sum()) for k in RECALLS}
        return flat(found)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return recalls of both ways, and their means."""
        count = float(sums["retrieval_count"].sum())
        found = {
            f"recall_at_{k}_{way}": float(sums[f"recall_at_{k}_{way}"].sum()) / count
            for k in RECALLS
            for way in ("video_to_text", "text_to_video")
        }
        ways = {k: [found[f"recall_at_{k}_{way}"] for way in ("video_to_text", "text_to_video")] for k in RECALLS}
        return {f"recall_at_{k}": sum(both) / 2 for k, both in ways.items()} | found


class Answering:
    """Share of the questions whose answer is the likeliest word."""

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return correct answers to each question, of ``"logits"`` [n, questions, num_tokens]."""
        correct = (predicted["logits"].argmax(-1) == clips.answer).double().sum(0).tolist()
        return flat({"answer_count": float(len(clips))} | {f"answer_{i}": n for i, n in enumerate(correct)})

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return the accuracy of all questions, and of each by its number."""
        count = float(sums["answer_count"].sum())
        names = [name for name in sums if name.startswith("answer_") and name != "answer_count"]
        each = {f"question_accuracy_{name[7:]}": float(sums[name].sum()) / count for name in names}
        return {"question_accuracy": float(np.mean(list(each.values())))} | each


class Recognition:
    """Share of the videos whose class is the likeliest one, of each label."""

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return correct classes of each label, of its logits [n, classes]."""
        correct = {name: (logits.argmax(-1) == clips.labels[name]).sum() for name, logits in predicted.items()}
        return flat({"recognition_count": float(len(clips))} | {f"label_{n}": float(v) for n, v in correct.items()})

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return the accuracy of each label."""
        count = float(sums["recognition_count"].sum())
        return {f"{name[6:]}_accuracy": float(sums[name].sum()) / count for name in sums if name.startswith("label_")}


class Captioning:
    """BLEU-4, CIDEr-D, the share of captions that are right word for word, and how often they name the right object.

    Objects are the words that name classes, `ClipData.label_words`; where there are none, there is no such recall.
    """

    def __init__(self, data: ClipData) -> None:
        """Take the captions of the test clips as references."""
        self._data = data
        self._objects = frozenset(word for words in data.label_words.values() for word in words)
        self._frequencies = DocumentFrequencies.of([[data.words(caption).split()] for caption in data.test.caption])

    @cached_property
    def _baseline(self) -> NDArray[np.float64]:
        """CIDEr-D of as many captions as there are test clips, drawn from a bigram model, float64 [1]."""
        data, captions = self._data, self._data.train.caption
        model = Bigrams.of(captions.masked_fill(captions == PAD, -1).numpy(), len(data.vocabulary))
        source = rng.generator(0, "bigram-captions")
        texts = torch.from_numpy(model.drawn(BEGIN, len(data.test), captions.shape[1], source)).clamp_min(PAD)
        pairs = zip(texts, data.test.caption, strict=True)
        scores = [cider_d(data.words(a).split(), [data.words(b).split()], self._frequencies) for a, b in pairs]
        return np.array([np.mean(scores)])

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return what the scores are made of, of ``"tokens"`` [n, length]."""
        pairs = [
            (self._data.words(found).split(), self._data.words(wanted).split())
            for found, wanted in zip(predicted["tokens"], clips.caption, strict=True)
        ]
        exact, cider, objects = (np.zeros(size) for size in (1, 1, 2))
        for found, wanted in pairs:
            exact += found == wanted
            named = self._objects & frozenset(wanted)
            objects += (len(named & frozenset(found)), len(named))
            cider += cider_d(found, [wanted], self._frequencies)
        counts = np.sum([bleu_sums(found, [wanted]) for found, wanted in pairs], axis=0)
        return flat({"caption_count": len(pairs)}) | {
            "caption_exact": exact,
            "cider": cider,
            "bleu": counts,
            "objects": objects,
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return ``caption_accuracy``, ``bleu_4`` (0 .. 100; 0 where no four words match) and ``cider_d`` (0 .. 10).

        ``cider_d_bigram`` is the CIDEr-D of captions that are drawn from a bigram model of the training captions, and
        ``object_recall`` the share of the objects of the references that the captions name, too.
        """
        count = float(sums["caption_count"].sum())
        matched = bleu(sums["bleu"]) if sums["bleu"][2:6].all() else 0.0  # without smoothing, which is of small corpora
        means = {"caption_accuracy": sums["caption_exact"], "cider_d": sums["cider"]}
        means |= {"cider_d_bigram": self._baseline * count}
        found, wanted = sums["objects"]
        recall = {"object_recall": float(found / wanted)} if wanted else {}
        return {name: float(value.sum()) / count for name, value in means.items()} | {"bleu_4": matched} | recall


class Unmeasured:
    """A task that is measured by its loss alone."""

    def sums(self, predicted: Mapping[str, Tensor], clips: Clips) -> Sums:
        """Return nothing."""
        return {}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return nothing."""
        return {}


def measure_of(task: str, data: ClipData) -> Any:
    """Return how a task is measured on a data set."""
    found: dict[str, Any] = {
        "retrieval": Retrieval,
        "question-answering": Answering,
        "recognition": Recognition,
        "captioning": lambda: Captioning(data),
    }
    return found.get(task, Unmeasured)()


def flat(values: Mapping[str, float]) -> Sums:
    """Return numbers as sums, float64 [1] each."""
    return {name: np.array([value], dtype=np.float64) for name, value in values.items()}
