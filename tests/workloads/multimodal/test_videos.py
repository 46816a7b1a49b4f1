"""Videos that the tests encode: frames, captions of all formats, and broken files."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigError, DataError, GossamerWarning
from gossamer.workloads.multimodal.captions import read_captions, read_msr_vtt, read_something
from gossamer.workloads.multimodal.video import read_video, uniform_frames, video_size
from gossamer.workloads.multimodal.video_sets import captioned_videos
from gossamer.workloads.samples import LazySamples, reading_later, telling
from media import LEVELS, SIDE, jpeg, write_captions, write_video

pytest.importorskip("av", reason="PyAV is not installed")


def greys(video: Any) -> list[float]:
    """Return the mean of each frame, rounded."""
    return np.asarray(video, dtype=np.float64).mean(axis=(-3, -2, -1)).round().tolist()


@given(st.integers(1, 40), st.integers(1, 60))
def test_frames_are_the_middles_of_equal_parts(num_frames: int, total: int) -> None:
    found = uniform_frames(num_frames, total)
    for part, frame in enumerate(found):
        assert frame <= Fraction(2 * part + 1, 2 * num_frames) * total < frame + 1
    assert found.max() < total


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])  # the latter does not state the number of its frames
def test_frames_are_read(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"a{suffix}")
    write_video(Path(path))
    assert video_size(path, "a") == (SIDE, SIDE)
    found = read_video(path, 4, None, "a")
    assert found.shape == (4, 3, SIDE, SIDE)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(greys(found), [40, 100, 160, 220], atol=3)
    np.testing.assert_allclose(greys(read_video(path, 16, (8, 12), "a")), np.repeat(LEVELS, 2), atol=3)
    assert read_video(path, 1, (8, 12), "a").shape == (1, 3, 8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of one grey each, 10, 30 ..., and three that are broken."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(10):
        write_video(root / f"v{number}.mp4", [10 + 20 * number] * 4)
    write_video(root / "wide.mp4", [5] * 4, width=2 * SIDE)
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no video")
    write_video(root / "cut.mkv", LEVELS * 8)
    content = (root / "cut.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(content[:60])
    return root


SOUND = [f"v{number}.mp4" for number in range(10)]


def test_captions_stay_with_their_videos(folder: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions.jsonl", SOUND + SOUND)
    data = captioned_videos({"videos": str(folder), "captions": captions, "frames": 2, "size": [8, 8]})
    assert (len(data.train.labels), len(data.test.labels), data.num_labels) == (16, 4, 1)
    for split in (data.train, data.test):
        assert split.samples["video"].shape[1:] == (2, 3, 8, 8)
        assert split.owner is not None
        expected = [10 + 20 * number for number in split.owner.tolist()]
        np.testing.assert_allclose(greys(split.samples["video"][:]), np.repeat(expected, 2).reshape(-1, 2), atol=3)
    assert data.train.owner is not None
    assert data.test.owner is not None
    assert not set(data.train.owner.tolist()) & set(data.test.owner.tolist())
    once = captioned_videos({"videos": str(folder), "captions": captions, "captions_per_video": 1, "frames": 1})
    assert len(once.train.labels) + len(once.test.labels) == 10
    assert once.train.samples["video"].shape[1:] == (1, 3, SIDE, SIDE)


def test_read_later_is_what_is_kept_in_memory(folder: Path, tmp_path: Path) -> None:
    options = {"videos": str(folder), "captions": write_captions(tmp_path / "c.jsonl", SOUND), "frames": 2}
    kept = captioned_videos(options).train.samples["video"]
    with reading_later() as found:
        later = captioned_videos(options).train.samples["video"]
    with reading_later(), telling(json.loads(json.dumps(found))):
        told = captioned_videos(options).train.samples["video"]
    assert isinstance(kept, LazySamples)
    for one in (later, told):
        assert isinstance(one, LazySamples)
        assert type(one.source).__name__ == "VideoFiles"
        assert torch.equal(one[:], kept[:])
        assert one.digest == kept.digest


def test_splits_and_labels_of_ones_own(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text('video,caption,split,label\nv0.mp4,"a, b",train,2\nv1.mp4,c,test,0\n')
    data = captioned_videos({"videos": str(folder), "captions": str(path), "frames": 1})
    assert (data.train.labels.tolist(), data.test.labels.tolist(), data.num_labels) == ([2], [0], 3)
    one, other = read_captions(str(path))
    assert (one.text, one.where, other.where) == ("a, b", f"line 2 of {str(path)!r}", f"line 3 of {str(path)!r}")


def test_msr_vtt(folder: Path, tmp_path: Path) -> None:
    splits = ["train", "train", "validate", "test"]
    videos = [{"video_id": f"v{n}", "split": split, "category": n, "url": ""} for n, split in enumerate(splits)]
    sentences = [{"video_id": f"v{n % 4}", "caption": f"a man is {n}", "sen_id": n} for n in range(8)]
    path = tmp_path / "train_val_videodatainfo.json"
    path.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    data = captioned_videos({"videos": str(folder), "captions": str(path), "format": "msr-vtt", "frames": 1})
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.test.labels.tolist() == [3, 3]
    assert greys(data.test.samples["video"][:])[0] == pytest.approx([70], abs=3)
    path.write_text(json.dumps({"videos": videos, "sentences": [*sentences, {"video_id": "v9", "caption": "a"}]}))
    with pytest.raises(DataError, match=r"sentence 9 of .*its videos lack 'v9'"):
        read_msr_vtt(str(path))
    path.write_text("[]")
    with pytest.raises(DataError, match=r"datainfo.json' is not MSR-VTT"):
        read_msr_vtt(str(path))


def test_something_something(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.webm").write_bytes((folder / f"v{number}.mp4").read_bytes())  # told by their content
    entries = [
        {"id": str(n), "label": "holding a potato", "template": "Holding [something]", "placeholders": ["a potato"]}
        for n in range(3)
    ]
    train, test, classes = (tmp_path / f"{name}.json" for name in ("train", "validation", "labels"))
    train.write_text(json.dumps(entries[:2]))
    test.write_text(json.dumps(entries[2:]))
    classes.write_text(json.dumps({"Dropping something": "0", "Holding something": "1"}))
    options = {"captions": str(train), "test_captions": str(test), "classes": str(classes), "frames": 1}
    data = captioned_videos({"videos": str(tmp_path), "format": "something-something-v2", **options})
    assert (data.train.labels.tolist(), data.test.labels.tolist(), data.num_labels) == ([1, 1], [1], 2)
    classes.write_text(json.dumps({"Dropping something": "0"}))
    with pytest.raises(DataError, match=r"entry 1 of .*labels.json' lacks the template 'Holding something'"):
        read_something(str(train), str(classes), "train")


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("none.mp4", r"the video 'none.mp4' of line 11 of '.*c.jsonl' is missing: put it at '.*none.mp4'"),
        ("empty.mp4", r"the video 'empty.mp4' of line 11 of '.*' is not a video that can be read"),
        ("text.mp4", r"the video 'text.mp4' of line 11 of '.*' is not a video that can be read \(Invalid data"),
        ("cut.mkv", r"the video 'cut.mkv' of line 11 of '.*' (is not a video that can be read|has no)"),
    ],
)
def test_a_broken_video_is_refused_or_left_out(folder: Path, tmp_path: Path, video: str, message: str) -> None:
    captions = write_captions(tmp_path / "c.jsonl", [*SOUND, video])
    options = {"videos": str(folder), "captions": captions, "frames": 1}
    with pytest.raises(DataError, match=message + r".*; 1 of 11 videos are broken, more than .*broken_rate = 0 allows"):
        captioned_videos(options)
    with pytest.raises(DataError, match=r"broken_rate = 0.05 allows"):
        captioned_videos({**options, "broken_rate": 0.05})
    with pytest.warns(GossamerWarning, match=r"1 of 11 videos are broken and left out; the first: the video"):
        data = captioned_videos({**options, "broken_rate": 0.1})
    assert len(data.train.labels) + len(data.test.labels) == 10


def test_sizes_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "c.jsonl", ["v0.mp4", "wide.mp4", "v1.mp4"])
    options = {"videos": str(folder), "captions": captions, "frames": 1}
    message = r"'wide.mp4' of line 2 of .* frames of 32 x 64 pixels, but others of 32 x 32: give workload.dataset.size"
    with pytest.raises(DataError, match=message):
        captioned_videos(options)
    assert captioned_videos({**options, "size": [4, 4]}).train.samples["video"].shape[1:] == (1, 3, 4, 4)


def test_frames_of_differing_size_are_refused(folder: Path, tmp_path: Path) -> None:
    """A video whose size changes amid is read where all frames are resized, and refused where they are not."""
    (tmp_path / "v.mjpeg").write_bytes(b"".join(jpeg(SIDE, width) for width in (SIDE, SIDE, 2 * SIDE, SIDE)))
    for number in range(2):
        (tmp_path / f"v{number}.mp4").write_bytes((folder / f"v{number}.mp4").read_bytes())
    captions = write_captions(tmp_path / "c.jsonl", ["v0.mp4", "v1.mp4", "v.mjpeg"])
    options = {"videos": str(tmp_path), "captions": captions, "frames": 4}
    message = (
        r"the video 'v.mjpeg' of line 3 of .* has frames of 32 x 32 and 32 x 64 pixels: give workload.dataset.size, to"
        r" which all are resized; 1 of 3 videos are broken"
    )
    with pytest.raises(DataError, match=message):
        captioned_videos(options)
    data = captioned_videos({**options, "size": [8, 8]})
    assert len(data.train.labels) + len(data.test.labels) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "v0.mp4"}', r"line 2 of .* is not a caption and its video \(it lacks 'caption'\)"),
        ('{"video": "v0.mp4", "caption": " "}', r"line 2 of .* has no caption"),
        ('{"video": "", "caption": "a"}', r"line 2 of .* has no video: add it, or drop the entry"),
        ('{"video": null, "caption": "a"}', r"line 2 of .*it lacks 'video'"),
        ('{"video": "v0.mp4", "caption": null}', r"line 2 of .*it lacks 'caption'"),
        ('{"video": "v0.mp4", "caption": "a", "label": -1}', r"line 2 of .* has the label -1"),
        ('{"video": "v0.mp4", "caption": "a", "split": "val"}', r"line 2 of .*the split 'val' is neither"),
        ("{", r"line 2 of .* is no JSON object"),
    ],
)
def test_wrong_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"video": "v0.mp4", "caption": "a"}\n' + line)
    with pytest.raises(DataError, match=message):
        read_captions(str(path))


def test_wrong_files_and_options_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read captions from .*none.csv' \(No such file"):
        read_captions(str(tmp_path / "none.csv"))
    (tmp_path / "c.csv").write_text("video,caption\n")
    with pytest.raises(DataError, match=r"c.csv' holds no captions"):
        read_captions(str(tmp_path / "c.csv"))
    (tmp_path / "c.csv").write_text("video,caption\nv0.mp4,a\n,a\n")
    with pytest.raises(DataError, match=r"line 3 of .*c.csv' has no video: add it, or drop the entry"):
        read_captions(str(tmp_path / "c.csv"))
    (tmp_path / "s.json").write_text('[{"id": "", "label": "a"}]')
    with pytest.raises(DataError, match=r"entry 1 of .*s.json' has no video"):
        read_something(str(tmp_path / "s.json"), None, "")
    (tmp_path / "c.csv").write_text("video,caption\nv0.mp4\n")
    with pytest.raises(DataError, match=r"line 2 of .*it lacks 'caption'"):
        read_captions(str(tmp_path / "c.csv"))
    captions = write_captions(tmp_path / "c.jsonl", SOUND, split="train")
    with pytest.raises(DataError, match=r"no captions of readable videos for the test split"):
        captioned_videos({"videos": str(folder), "captions": captions, "frames": 1})
    with pytest.raises(ConfigError, match=r"classes = 'a' is read with format"):
        captioned_videos({"videos": str(folder), "captions": captions, "classes": "a"})
    with pytest.raises(ConfigError, match=r"size = \(0, 4\)"):
        captioned_videos({"videos": str(folder), "captions": captions, "size": [0, 4]})
