"""Labels and answers of training clips that are missing or wrong, as switches of a workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options
from gossamer.workloads.multimodal.clips import PAD, ClipData, Clips
from gossamer.workloads.multimodal.modalities import MISSING_LABEL, drop_labels, transition_matrix, wrong_labels

ANSWER = "answer"
WHERE = "workload.labels"


class LabelOptions(Options):
    """Labels that training samples lack or have wrong, as in FedMultimodal (arXiv 2306.09486).

    Partitions go by true labels, and test samples have these.

    Attributes:
        missing: probability that a sample lacks a label, and so takes no part in its loss, of each label by itself: one
            number for all of them, or one for each, such as ``{digit: 0.3}``, 0 for the others. ``answer`` stands for
            the answer to each question.
        wrong: probability that it is another one, likewise.
        sparsity: share of the other classes that a class is never taken for.
    """

    missing: float | dict[str, float] = 0.0
    wrong: float | dict[str, float] = 0.0
    sparsity: float = Field(0.0, ge=0, lt=1)


def given_clips(data: ClipData, options: LabelOptions, seed: int) -> Clips:
    """Return the training clips with labels as they are given, -1 where one is missing, and `PAD` for an answer.

    Raises:
        ConfigError: an unknown label, a rate that is no probability, or a label of one class that shall be wrong.
    """
    clips = data.train
    has_answers = bool((clips.answer != PAD).any())
    known = (*data.num_labels, *((ANSWER,) if has_answers else ()))
    missing, wrong = label_rates(options, known)
    if not any((*missing.values(), *wrong.values())):
        return clips

    def given(name: str, labels: Tensor, num_labels: int, purpose: str) -> Tensor:
        """Return labels int64 [N] as they are given."""
        return given_labels(labels, num_labels, missing[name], wrong[name], options.sparsity, seed, purpose)

    labels = {name: given(name, clips.labels[name], num, f"label-{name}") for name, num in data.num_labels.items()}
    answer = clips.answer
    if has_answers:
        each = []
        for number in range(answer.shape[1]):
            words, places = torch.unique(answer[:, number], return_inverse=True)
            found = given(ANSWER, places, len(words), f"answer-{number}")
            each.append(torch.where(found == MISSING_LABEL, PAD, words[found.clamp_min(0)]))
        answer = torch.stack(each, dim=1)
    return replace(clips, labels=labels, answer=answer)


def given_labels(
    labels: Tensor, num_labels: int, missing: float, wrong: float, sparsity: float, seed: int, purpose: str
) -> Tensor:
    """Return labels int64 [N] as they are given, -1 where one is missing.

    Args:
        labels: int64 [N], true labels.
        num_labels: number of classes.
        missing, wrong, sparsity: see `LabelOptions`.
        seed, purpose: address of the draws.
    """
    found = labels.numpy()
    if wrong:
        found = wrong_labels(found, transition_matrix(num_labels, wrong, sparsity, seed), seed, f"wrong-{purpose}")
    return torch.from_numpy(drop_labels(found, missing, seed, f"missing-{purpose}"))


def held_labels(
    samples: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]],
    labels: Mapping[str, Tensor],
    starts: Mapping[str, int],
    num_labels: int,
) -> Tensor:
    """Return which classes of which labels clients have, bool [s, num_labels], see `Layout.labels`.

    Args:
        samples: int64 [n] of each client, numbers of its samples.
        labels: int64 [N] of each label, -1 where a sample has none.
        starts: first number of the classes of each label that is asked for.
        num_labels: classes of all of them.
    """
    found = torch.zeros(len(samples), num_labels, dtype=torch.bool)
    for row, own in zip(found, samples, strict=True):
        for name, start in starts.items():
            known = labels[name][torch.from_numpy(own)]
            row[start + known[known >= 0]] = True
    return found


def label_rates(options: LabelOptions, known: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the rates of missing and of wrong labels, by name.

    Raises:
        ConfigError: an unknown label, a rate that is no probability, or a sparsity of nothing.
    """
    missing, wrong = _rates(options.missing, known, f"{WHERE}.missing"), _rates(options.wrong, known, f"{WHERE}.wrong")
    if options.sparsity and not any((*missing.values(), *wrong.values())):
        raise ConfigError(f"{WHERE}.sparsity = {options.sparsity} is of wrong labels, of which there are none")
    return missing, wrong


def _rates(given: float | Mapping[str, float], known: tuple[str, ...], where: str) -> dict[str, float]:
    """Return the rate of each label.

    Raises:
        ConfigError: a label is unknown, or a rate is no probability.
    """
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(known, given)
    for name, rate in by_name.items():
        if name not in known:
            raise ConfigError(
                f"{where} names the label {name!r}, which is none of {', '.join(known)}{nearest(name, known)}"
            )
        if not 0 <= rate <= 1:
            raise ConfigError(f"{where} has the rate {rate} for {name!r}: give a probability from 0 to 1")
    return {name: float(by_name.get(name, 0.0)) for name in known}


def classes_of(data: ClipData, label: str | None) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]:
    """Return the classes by which partitions divide, int64 [N], and how many there are.

    Args:
        label: name of a label; None: the data set's own choice.

    Raises:
        ConfigError: there is no such label.
    """
    name, known = data.partition_label if label is None else label, tuple(data.num_labels)
    if name not in known:
        raise ConfigError(f"workload.partition_label = {name!r} is none of {', '.join(known)}{nearest(name, known)}")
    return data.train.labels[name].numpy(), data.num_labels[name]
