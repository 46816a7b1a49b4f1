"""Spoken digits: features by hand, the official split, who trains on what, and broken files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.errors import ConfigError, DataError
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.spoken import FILE, FRAME, HOP, log_mel, mel_filters, spoken_digits
from made_recordings import NUM_CLIPS, NUM_DIGITS, NUM_SPEAKERS, recordings, write

needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA does not name a folder with fsdd"
)


# ---- features


def slow_spectrogram(clip: np.ndarray, bands: int, frames: int) -> np.ndarray:
    """One clip, one frame and one frequency at a time, as the definitions say."""
    samples = np.zeros(FRAME + (frames - 1) * HOP)
    samples[: min(len(clip), len(samples))] = clip[: len(samples)] / 32768
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = np.zeros((bands, frames))
    for frame in range(frames):
        spectrum = np.fft.rfft(samples[frame * HOP : frame * HOP + FRAME] * hann)
        for band in range(bands):
            power[band, frame] = sum(mel_filters(bands)[band] * np.abs(spectrum) ** 2)
    decibels = 10 * np.log10(np.maximum(power / power.max(), 1e-20))
    return (np.maximum(decibels, -60) + 40) / 20


def test_features_equal_a_slow_version() -> None:
    arrays = recordings()
    images = log_mel(arrays["pcm"], arrays["offset"], 12, 4)
    assert images.shape == (NUM_SPEAKERS * NUM_DIGITS * NUM_CLIPS, 1, 12, 4)
    assert images.dtype == torch.float32
    for clip in (0, 1, 17, len(images) - 1):  # the last one ends where the samples end
        samples = arrays["pcm"][arrays["offset"][clip] : arrays["offset"][clip + 1]]
        np.testing.assert_allclose(images[clip, 0], slow_spectrogram(samples, 12, 4), atol=2e-3)


def test_more_clips_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = recordings()
    whole = log_mel(arrays["pcm"], arrays["offset"], 8, 4)
    monkeypatch.setattr("gossamer.workloads.spoken.CHUNK", 50)
    assert torch.allclose(log_mel(arrays["pcm"], arrays["offset"], 8, 4), whole, atol=1e-5)


def test_a_tone_lies_in_its_band() -> None:
    """The loudest band of a sine is the one whose centre is nearest in mel, whatever its loudness; silence is -1."""
    bands = 16
    highest = 2595 * np.log10(1 + 4000 / 700)
    for hertz, amplitude in ((300, 20000), (1000, 100), (3000, 20000)):
        tone = (amplitude * np.sin(2 * np.pi * hertz * np.arange(1000) / 8000)).astype(np.int16)
        image = log_mel(tone, np.array([0, len(tone)]), bands, 10)[0, 0]
        band = 2595 * np.log10(1 + hertz / 700) / highest * (bands + 1) - 1
        assert abs(int(image[:, 0].argmax()) - band) <= 0.51
        assert image[:, 0].max() == pytest.approx(2.0, abs=0.05)
        assert torch.equal(image[:, 8:], torch.full((bands, 2), -1.0))


def test_silence_is_finite() -> None:
    image = log_mel(np.zeros(500, dtype=np.int16), np.array([0, 500]), 8, 4)
    assert bool((image == -1).all())


@pytest.mark.parametrize("bands", [1, 8, 32, 64])
def test_every_filter_hears_something(bands: int) -> None:
    filters = mel_filters(bands)
    assert filters.shape == (bands, FRAME // 2 + 1)
    assert (filters >= 0).all()
    assert (filters.max(axis=1) > 0.4).all()
    centre = filters.argmax(axis=1)
    assert (np.diff(centre) >= 0).all()


# ---- the split


def test_split_and_owners(recorded: dict[str, Any]) -> None:
    data = spoken_digits({"bands": 8, "frames": 5})
    assert data.shape == (1, 8, 5)
    assert (data.num_labels, data.mean, data.std) == (10, (0.0,), (1.0,))
    everything = log_mel(recorded["pcm"], recorded["offset"], 8, 5)
    is_test = recorded["index"] < 5
    assert torch.equal(data.test_images, everything[is_test])
    assert torch.equal(data.train_images, everything[~is_test])
    assert data.train_labels.tolist() == recorded["label"][~is_test].tolist()
    assert data.test_labels.tolist() == recorded["label"][is_test].tolist()
    number = {"ann": 0, "bob": 1, "zoe": 2}
    assert data.owner is not None
    assert data.owner.tolist() == [number[name] for name in recorded["speaker"][~is_test].tolist()]


def test_some_speakers_train_and_all_are_tested(recorded: dict[str, Any]) -> None:
    whole, some = spoken_digits({"frames": 4}), spoken_digits({"frames": 4, "speakers": [2, 0]})
    assert whole.owner is not None
    assert some.owner is not None
    kept = whole.owner != 1
    assert torch.equal(some.train_images, whole.train_images[kept])
    assert torch.equal(some.owner, whole.owner[kept])
    assert torch.equal(some.test_images, whole.test_images)
    assert torch.equal(some.test_labels, whole.test_labels)


@pytest.mark.parametrize("speakers", [None, [1]])
def test_each_speaker_is_a_client(recorded: dict[str, Any], speakers: list[int] | None) -> None:
    options = {"dataset": {"name": "spoken-digits", "speakers": speakers, "frames": 8}, "model": "softmax"}
    num_clients = NUM_SPEAKERS if speakers is None else 1
    workload = ImageClassification(options, num_clients=num_clients, partition="natural-id", seed=0)
    owner = workload.data.owner
    assert owner is not None
    for client in range(num_clients):
        assert set(owner[workload.partition.of_client(client)].tolist()) == {client if speakers is None else 1}
    assert workload.num_samples.tolist() == [20] * num_clients


@needs_data
def test_the_real_set() -> None:
    data = spoken_digits({})
    assert (data.train_images.shape, data.test_images.shape) == ((2700, 1, 32, 32), (300, 1, 32, 32))
    assert data.test_labels.bincount().tolist() == [30] * 10
    assert data.owner is not None
    counts = torch.bincount(data.owner * 10 + data.train_labels)
    assert counts.tolist() == [45] * 60
    images = torch.cat([data.train_images, data.test_images])
    assert float(images.min()) == -1
    assert float(images.amax(dim=(1, 2, 3)).min()) == 2
    assert abs(float(images.mean())) < 0.5


@needs_data
def test_the_real_set_leaks_nothing() -> None:
    """No test clip is among the training clips, neither as samples nor as an image."""
    with np.load(Path(os.environ["GOSSAMER_DATA"]) / FILE, allow_pickle=False) as file:
        pcm, offset, is_test = file["pcm"], file["offset"], file["index"] < 5
    clips = [pcm[start:stop].tobytes() for start, stop in itertools.pairwise(offset)]
    sets = [{clip for clip, test in zip(clips, is_test, strict=True) if test == wanted} for wanted in (True, False)]
    assert not sets[0] & sets[1]
    data = spoken_digits({})
    train, test = ({image.numpy().tobytes() for image in images} for images in (data.train_images, data.test_images))
    assert not train & test
    assert len(test) == 300


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"speaker": [1]}, "unknown key 'workload.dataset.speaker'; did you mean 'speakers'?"),
        ({"speakers": [-1]}, "workload.dataset.speakers.0 = -1"),
        ({"bands": 0}, "workload.dataset.bands = 0"),
    ],
)
def test_wrong_options(recorded: dict[str, Any], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spoken_digits(options)
    assert expected in str(caught.value)


@pytest.mark.parametrize("speakers", [[], [0, 3]])
def test_speakers_that_there_are_not(recorded: dict[str, Any], speakers: list[int]) -> None:
    with pytest.raises(DataError, match=r"speakers = \[.*name one or more of the speakers 0 ann, 1 bob, 2 zoe"):
        spoken_digits({"speakers": speakers})


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no file .*fsdd_8khz_int16.npz'"):
        spoken_digits({})
    monkeypatch.delenv("GOSSAMER_DATA")
    with pytest.raises(DataError, match="set GOSSAMER_DATA"):
        spoken_digits({})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"offset": np.array([0, 5])}, "do not divide its"),
        ({"offset": np.arange(NUM_SPEAKERS * NUM_DIGITS * NUM_CLIPS + 1)}, "do not divide its"),
        ({"speaker": np.array(["ann"])}, "lacks a speaker or an index"),
        ({"index": None}, "cannot read .*'index is not a file|cannot read .*index"),
        ({"pcm": np.array([object()])}, "cannot read .*Object arrays cannot be loaded"),
    ],
)
def test_broken_files(tmp_path: Path, recorded: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    arrays = {key: value for key, value in (recorded | changes).items() if value is not None}
    write(tmp_path / "data", arrays)
    with pytest.raises(DataError, match=expected):
        spoken_digits({})


def test_a_file_that_is_no_archive(tmp_path: Path, recorded: dict[str, Any]) -> None:
    (tmp_path / "data" / FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read .*as spoken digits .*fetch the file again"):
        spoken_digits({})
