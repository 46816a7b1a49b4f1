"""Labels and answers that are missing or wrong, and the label by which clients divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federation import digest
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.clips import PAD
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import SMALL, gradients, merged, nudged, workload

HALF = (("missing", 0.5),)


def large(labels: dict[str, Any]) -> VideoLanguage:
    """Return a workload of enough clips to count."""
    data = {"name": "moving-digits", "num_train": 1200, "num_pools": 1}
    return VideoLanguage(SMALL | {"dataset": data, "labels": labels}, num_clients=4, partition="iid", seed=0)


def test_rates_are_met_by_label() -> None:
    made = large({"missing": {"digit": 0.3, "answer": 0.2}, "wrong": {"motion": 0.4}})
    given, true = made._train, made.data.train
    assert float((given.labels["digit"] == -1).float().mean()) == pytest.approx(0.3, abs=0.05)
    has = given.labels["digit"] >= 0
    assert torch.equal(given.labels["digit"][has], true.labels["digit"][has])
    assert float((given.labels["motion"] != true.labels["motion"]).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert int(given.labels["motion"].min()) >= 0
    lost = given.answer == PAD
    assert float(lost.float().mean()) == pytest.approx(0.2, abs=0.05)
    assert torch.equal(given.answer[~lost], true.answer[~lost])
    assert made.data.test.labels["digit"].min() == 0


def test_wrong_answers_are_answers_to_the_question() -> None:
    made = large({"wrong": {"answer": 0.5}})
    for number in range(3):
        given, true = made._train.answer[:, number], made.data.train.answer[:, number]
        assert set(given.unique().tolist()) == set(true.unique().tolist())
        assert float((given != true).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_they_follow_from_the_seed() -> None:
    first, again, other = (
        VideoLanguage(SMALL | {"labels": {"missing": 0.5}}, num_clients=4, partition="iid", seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.digest() == again.digest() != workload().digest()
    assert torch.equal(first._train.labels["digit"], again._train.labels["digit"])
    assert not torch.equal(first._train.labels["digit"], other._train.labels["digit"])


def test_the_contract() -> None:
    check_workload(workload(labels=HALF))


@pytest.mark.parametrize("model", [(), (("name", "mean_pool:MeanPool"),)], ids=["mplug-2", "third party"])
def test_the_loss_is_that_of_the_labels_there_are(model: Any) -> None:
    """A sample without any does not count; one with a single label has that one's loss."""
    options = {"tasks": ("recognition",)} | ({"model": model} if model else {})
    made = workload(**options)
    params, batch = nudged(made), merged(made, count=3)
    alone = [made.loss(params, {k: v[i : i + 1] if v.dim() else v for k, v in tensors(batch)}) for i in range(3)]
    lost = batch | {"digit": torch.tensor([-1, -1, int(batch["digit"][2])]), "motion": batch["motion"].clone()}
    lost["motion"][0] = -1
    logits = made.model.predict("recognition", params, {**batch, "caption": batch["caption"]})["motion"][1]
    single = -torch.log_softmax(logits, dim=-1)[batch["motion"][1]]
    torch.testing.assert_close(made.loss(params, lost), (single + alone[2]) / 2)


def tensors(batch: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a batch, but the weights of tasks, which are numbers, as they are."""
    return [(name, value) for name, value in batch.items() if isinstance(value, torch.Tensor)]


def test_samples_without_labels_move_nothing() -> None:
    made = workload(tasks=("recognition", "question-answering"), labels=(("missing", 1.0),))
    found = gradients(made, nudged(made), merged(made))
    assert max(float(one.abs().max()) for one in found.values() if one is not None) == 0


@pytest.mark.parametrize("label", ["digit", "motion"])
def test_clients_divide_by_either_label(label: str) -> None:
    """Three classes each, of the label that is asked for, though others be missing."""
    made = VideoLanguage(
        SMALL | {"partition_label": label, "labels": {"missing": 0.5}},
        num_clients=5,
        partition={"name": "n-classes", "n": 3},
        seed=0,
    )
    num = {name: [len(np.unique(one[made.partition.of_client(i)])) for i in range(5)] for name, one in labels(made)}
    other = "motion" if label == "digit" else "digit"
    assert max(num[label]) <= 3 < min(num[other])


def labels(made: VideoLanguage) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Return the true labels of the training clips."""
    return [(name, one.numpy()) for name, one in made.data.train.labels.items()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"labels": {"missing": {"digti": 0.1}}}, "labels.missing names the label 'digti'.*did you mean 'digit'"),
        ({"labels": {"wrong": 1.5}}, "labels.wrong has the rate 1.5 for 'digit': give a probability"),
        ({"labels": {"sparsity": 0.4}}, "sparsity = 0.4 is of wrong labels, of which there are none"),
        ({"labels": {"mising": 0.4}}, "unknown key 'workload.labels.mising'; did you mean 'missing'"),
        ({"partition_label": "moton"}, "partition_label = 'moton' is none of digit, motion; did you mean 'motion'"),
    ],
)
def test_wrong_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        VideoLanguage(SMALL | options, num_clients=4, partition="iid", seed=0)


@pytest.mark.parametrize("label_axes", [True, False])
def test_rows_of_classes_that_nobody_has_keep_their_bits(label_axes: bool, tmp_path: Path) -> None:
    """Digits are mostly missing, motions are all there; clients of text alone hold no such rows."""
    config = {
        "rounds": 2,
        "workload": {
            "name": "video-language",
            **SMALL,
            "modalities": {"video+text": 0.5, "text": 0.5},
            "labels": {"missing": {"digit": 0.95}},
            "label_axes": label_axes,
        },
        "clients": {"num": 4, "per_round": 4},
        "train": {"lr": 0.01, "batch_size": 8},
        "algorithm": "fedrolex",
        "submodel": {"capacities": [0.5, 1.0]},
    }
    made: Any = build(parse(config)).workload
    held = made.client_labels(np.arange(4))
    runs = [run({**config, "engine": {"workers": workers}}, out=tmp_path / str(workers)) for workers in (0, 2)]
    assert digest(runs[0].params) == digest(runs[1].params)
    before, after = made.layout.views(made.init(0)), runs[0].params
    moved = (before["recognition.digit.weight"] != after["recognition.digit.weight"]).any(1)
    if not label_axes:
        assert held.shape == (4, 0)
        assert moved.all()
        return
    assert dict(made.layout.labels) == {"label:digit": 0, "label:motion": 10}
    for client in range(4):  # against a loop over samples
        own = made.partition.of_client(client)
        for start, name, count in ((0, "digit", 10), (10, "motion", 12)):
            known = {int(made._train.labels[name][sample]) for sample in own}
            assert held[client, start : start + count].nonzero().flatten().tolist() == sorted(known - {-1})
    seen = held[made.client_holdings(np.arange(4)) == [one.name for one in made.holdings].index("video+text")].any(0)
    assert 0 < int(seen[:10].sum()) < 10
    assert torch.equal(moved, seen[:10])
    assert (before["recognition.motion.weight"] != after["recognition.motion.weight"]).any(1).all()
    check_workload(made)
