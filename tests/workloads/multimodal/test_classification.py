"""Audio-visual digits as a workload: who holds what, what is missing or wrong, and what a client's loss reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from federation import assert_same
from gossamer.errors import ConfigError, DataError
from gossamer.testing import check_workload
from gossamer.workloads.digests import digest_of
from gossamer.workloads.multimodal.audio_visual import audio_visual_digits
from gossamer.workloads.multimodal.classification import AudioVisualDigits
from gossamer.workloads.supervised import cross_entropies

DATA = {"bands": 8, "frames": 8}
SMALL = {"dataset": DATA, "encoders": {name: {"name": "mlp", "hidden": [6]} for name in ("image", "audio")}, "width": 4}
THREE = {"image+audio": 0.34, "image": 0.33, "audio": 0.33}
pytestmark = pytest.mark.usefixtures("recorded")


def workload(num_clients: int = 6, partition: Any = "iid", **options: Any) -> AudioVisualDigits:
    """Return the small workload, with options."""
    return AudioVisualDigits(SMALL | options, num_clients=num_clients, partition=partition, seed=0)


def merged(made: AudioVisualDigits, client: int, count: int = 8) -> dict[str, Any]:
    """Return a batch of one client, as `loss` receives it."""
    batch = made.batch(np.array([client]), np.arange(count, dtype=np.int64)[None])
    return {name: value[0] for part in batch for name, value in part.items()}


def of_kind(made: AudioVisualDigits, name: str) -> int:
    """Return a client that holds what has this name."""
    kinds = made.client_holdings(np.arange(made.num_clients))
    return next(client for client, kind in enumerate(kinds) if made.holdings[kind].name == name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modalities": THREE, "missing": {"train": 0.3, "test": {"audio": 0.5}}},
        {"modalities": THREE, "exchange": "representations", "dataset": DATA | {"num_public": 20}},
        {"labels": {"missing": 0.3, "wrong": {"digit": 0.2}, "sparsity": 0.5}},
    ],
    ids=["plain", "missing", "representations", "labels"],
)
def test_the_contract(options: dict[str, Any]) -> None:
    check_workload(workload(**options))


def test_a_client_holds_the_modules_of_its_modalities() -> None:
    made = workload(modalities=THREE)
    held = {one.name: one.modules for one in made.holdings}
    assert held == {
        "image+audio": frozenset({"image", "audio", "fusion"}),
        "image": frozenset({"image"}),
        "audio": frozenset({"audio"}),
    }
    for name in THREE:
        batch = merged(made, of_kind(made, name), 4)
        assert {one for one in ("image", "audio") if one in batch} == set(name.split("+"))


def test_the_loss_is_the_sum_of_the_heads_means() -> None:
    """Head by head and sample by sample, where some samples lack a modality, a label, or are padding."""
    made = workload(missing={"train": 0.4}, labels={"missing": 0.3})
    params = made.layout.views(made.init(0))
    batch = merged(made, 0, 9) | {"mask": torch.tensor([1.0] * 7 + [0.0] * 2)}
    logits = made.model.logits(params, batch)
    expected = 0.0
    for head, one in logits.items():
        losses = []
        for i in range(9):
            needed = ("image", "audio") if head == "all" else (head,)
            if batch["mask"][i] and batch["y"][i] >= 0 and all(batch[f"has_{name}"][i] for name in needed):
                losses.append(float(cross_entropies(one[i], batch["y"][i])))
        expected += sum(losses) / max(len(losses), 1)
    assert float(made.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lost", ["image", "audio"])
def test_a_batch_without_a_modality(lost: str) -> None:
    """The loss is finite, and the encoder of what is missing gets no gradient."""
    made = workload(missing={"train": {lost: 1.0}})
    params = {name: value.clone().requires_grad_() for name, value in made.layout.views(made.init(0)).items()}
    loss = made.loss(params, merged(made, 0))
    assert torch.isfinite(loss)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True))
    touched = {name.partition(".")[0] for name, grad in grads.items() if grad is not None and grad.any()}
    assert touched == {"image", "audio"} - {lost}


def test_a_unimodal_client_changes_no_other_modality(tmp_path: Path) -> None:
    given = {
        "rounds": 2,
        "workload": {"name": "audio-visual-digits", **SMALL, "modalities": {"audio": 1.0}},
        "clients": {"num": 4, "per_round": 4},
        "train": {"lr": 0.1, "batch_size": 4, "optimizer": {"name": "adamw", "weight_decay": 0.1}},
        "engine": {"workers": 0},
    }
    before = workload(4, modalities={"audio": 1.0})
    start = before.layout.views(before.init(0))
    after = gossamer.run(given, out=tmp_path / "a")
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], after.params[name])}
    assert changed == {"audio"}
    assert_same(gossamer.run(given | {"engine": {"workers": 2}}, out=tmp_path / "b"), after)


def test_metrics_are_of_what_a_sample_has() -> None:
    made = workload(missing={"test": {"audio": 0.5, "image": 0.3}})
    params = made.layout.views(made.init(0))
    sums = made.evaluate(params, {}, 0)
    has = made._present["test"]
    assert float(sums["count.image"][0]) == has[:, 0].sum()
    assert float(sums["count.all"][0]) == has.all(1).sum()
    assert float(sums["count."][0]) == has.any(1).sum()
    batch = made._fetch("test", torch.arange(len(has)), ("image", "audio"))
    logits = made.model.logits(params, batch)
    right = 0
    for i, (image, audio) in enumerate(has.tolist()):
        head = "all" if image and audio else "image" if image else "audio" if audio else None
        right += head is not None and int(logits[head][i].argmax()) == int(made.data.test.labels[i])
    assert made.metrics(sums)["accuracy"] == pytest.approx(right / has.any(1).sum())


def test_labels_as_they_are_given() -> None:
    made, true = workload(labels={"missing": 0.5, "wrong": 0.3}), workload().data.train.labels
    given = made._labels
    kept = given >= 0
    assert 0.2 < float((~kept).float().mean()) < 0.8
    assert 0.05 < float((given != true)[kept].float().mean()) < 0.6
    assert not workload()._labels.ne(true).any()


def test_the_natural_split_tells_who_has_what() -> None:
    made = workload(6, "natural-id", dataset=DATA | {"split": "natural"})
    kinds = [made.holdings[kind].name for kind in made.client_holdings(np.arange(6))]
    assert kinds == ["audio"] * 3 + ["image"] * 3


def test_the_data_are_left_as_they_are() -> None:
    data = audio_visual_digits(DATA | {"num_public": 20})
    before = digest_of(data)
    made = AudioVisualDigits(SMALL | {"exchange": "representations"}, num_clients=3, partition="iid", seed=0, data=data)
    made.batch(np.array([0]), np.arange(4)[None])
    made.evaluate(made.layout.views(made.init(0)), {}, 0)
    assert digest_of(data) == before


def test_public_pairs_are_nobodys() -> None:
    whole, parted = audio_visual_digits(DATA), audio_visual_digits(DATA | {"num_public": 25})
    assert parted.public is not None
    assert whole.public is None
    sizes = len(parted.public.labels), len(parted.train.labels), len(whole.train.labels)
    assert sizes == (25, 35, 60)
    clips = [{row.numpy().tobytes() for row in one.samples["audio"][:]} for one in (parted.public, parted.train)]
    assert not clips[0] & clips[1]
    assert torch.equal(parted.test.samples["audio"][:], whole.test.samples["audio"][:])


@pytest.mark.parametrize(
    ("options", "partition", "message"),
    [
        ({"modalities": {"video": 1.0}}, "iid", "the modality 'video' in 'video', which the model does not know: name"),
        ({"encoders": {"image": "mlp"}}, "iid", r"workload\.encoders names image, but the data have image, audio"),
        ({"encoders": {"image": "mlp", "audio": "preact-resnet18"}}, "iid", r"audio = 'preact-resnet18' has BatchNorm"),
        ({"server_encoders": {"image": "mlp", "audio": "mlp"}}, "iid", "are those of a server with a model of its own"),
        ({"labels": {"wrong": {"speaker": 0.1}}}, "iid", r"wrong names the label 'speaker', which is none of digit"),
        ({"missing": {"train": {"text": 0.1}}}, "iid", "the modality 'text'"),
        (
            {"modalities": {"image": 1.0}, "dataset": DATA | {"split": "natural"}},
            "natural-id",
            r"client 0 has no modality, because workload\.modalities gives it image, and its 20 samples are of audio",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_is_refused(options: dict[str, Any], partition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workload(6, partition, **options)


def test_without_recordings_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_DATA")
    with pytest.raises(DataError, match=r"'spoken-digits' is read from .*: set GOSSAMER_DATA to its folder"):
        workload()
