"""NLVR and captioned videos as clips, and a federation that is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.errors import ConfigError, DataError
from gossamer.workloads.multimodal.clip_sets import captioned_videos, nlvr
from gossamer.workloads.multimodal.clips import BEGIN, END, PAD, UNKNOWN
from gossamer.workloads.multimodal.nlvr import count_objects
from gossamer.workloads.multimodal.tokens import SPECIAL
from media import write_captions, write_nlvr, write_video

SMALL = {"stream": 8, "num_heads": 2, "hidden": 8, "vision_blocks": 1, "num_latents": 2, "contrast": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small NLVR."""
    root = tmp_path_factory.mktemp("clips")
    write_nlvr(root)
    return root


@pytest.fixture
def nlvr_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return options of it, with the folder where data are looked for."""
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


def test_boxes_are_frames(nlvr_options: dict[str, Any]) -> None:
    whole, boxes = nlvr(nlvr_options).test.video, nlvr(nlvr_options | {"boxes": True}).test.video
    assert boxes.shape == (len(whole), 3, 3, 8, 4)
    for box, columns in enumerate((slice(0, 4), slice(6, 10), slice(12, 16))):
        assert torch.equal(boxes[:, box], whole[:, 0, ..., columns])


def test_boxes_need_a_width_of_eighths(nlvr_options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"workload\.dataset\.width = 20 cannot be divided into boxes"):
        nlvr(nlvr_options | {"boxes": True, "width": 20})


def test_objects_are_counted_by_colour_and_shape(nlvr_options: dict[str, Any]) -> None:
    data = nlvr(nlvr_options | {"objects": True})
    kinds = ("yellow", "black", "blue", "circle", "square", "triangle")
    assert tuple(data.num_labels) == ("truth", *kinds)
    counts = [[data.train.labels[kind][row].item() for kind in kinds] for row in (0, 6)]
    assert counts == [[0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{}", r"line 1 of .*a\.jsonl' lists no objects \(KeyError"),
        ('{"structured_rep": [[{"color": "Black", "type": "circle"}]]}', None),
        ('{"structured_rep": [[' + ",".join(['{"color": "Black", "type": "circle"}'] * 25) + "]]}", "lists 25 objects"),
    ],
)
def test_what_cannot_be_counted_is_refused(tmp_path: Path, line: str, told: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n")
    if told is None:
        assert count_objects(path).tolist() == [[0, 1, 0, 1, 0, 0]]
        return
    with pytest.raises(DataError, match=told):
        count_objects(path)


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
