"""NLVR and captioned videos as clips, and a federation that is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.workloads.multimodal.clip_sets import captioned_videos, nlvr
from gossamer.workloads.multimodal.clips import BEGIN, END, PAD, UNKNOWN
from gossamer.workloads.multimodal.tokens import SPECIAL
from media import write_captions, write_nlvr, write_video

SMALL = {"stream": 8, "num_heads": 2, "hidden": 8, "vision_blocks": 1, "num_latents": 2, "contrast": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    write_nlvr(root)
    return root


@pytest.fixture
def nlvr_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("GOSSAMER_DATA", str(folder))
    return {"height": 8, "width": 16, "length": 8, "pool": 4}


def test_a_sentence_is_asked_and_its_truth_the_answer(nlvr_options: dict[str, Any]) -> None:
    data = nlvr(nlvr_options)
    train = data.train
    assert train.video.shape == (18, 1, 3, 8, 16)
    assert data.vocabulary[: len(SPECIAL)] == SPECIAL
    assert data.words(train.caption[0]) == "there is a blue tower"
    assert torch.equal(train.question[:, 0], train.caption)
    assert [data.vocabulary[word] for word in train.answer[:, 0]] == ["false"] * 6 + ["true"] * 6 + ["false"] * 6
    assert train.labels["truth"].tolist() == [0] * 6 + [1] * 6 + [0] * 6
    assert data.num_labels == {"truth": 2}
    assert data.pool == 4
    assert data.test.caption[0].tolist().count(UNKNOWN) == 1  # "no", which no training sentence has


def test_captioned_videos_as_clips(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    for number in range(3):
        write_video(tmp_path / f"v{number}.mp4", [60 * number] * 2)
    captions = write_captions(tmp_path / "c.jsonl", ["v0.mp4", "v1.mp4", "v2.mp4"])
    data = captioned_videos({"videos": str(tmp_path), "captions": captions, "frames": 2, "size": [8, 8], "length": 6})
    assert data.train.video.shape == (2, 2, 3, 8, 8)
    for clips in (data.train, data.test):
        for video, caption in zip(clips.video, clips.caption, strict=True):
            number = round(float(video.double().mean()) / 60)
            expected = f"the v{number} moves" if f"v{number}" in data.vocabulary else "the moves"
            assert data.words(caption) == expected
            assert caption.tolist()[0] == BEGIN
            assert caption.tolist()[-2:] == [END, PAD]
    assert data.train.question.tolist() == [[[BEGIN, END]]] * 2


def test_a_federation_learns_from_nlvr(nlvr_options: dict[str, Any], tmp_path: Path) -> None:
    workload = {
        "name": "video-language",
        "dataset": {"name": "nlvr", **nlvr_options},
        "model": {"name": "mplug-2", **SMALL},
        "tasks": ["question-answering"],
    }
    run = gossamer.run(
        {
            "workload": workload,
            "rounds": 1,
            "clients": {"num": 2, "per_round": 2},
            "train": {"lr": 0.01, "batch_size": 6, "epochs": 1},
            "algorithm": "fedavg",
        },
        out=tmp_path / "run",
    )
    assert 0 <= run.metrics[-1]["question_accuracy"] <= 1
