"""Folders of videos with captions: one's own, MSR-VTT's and Something-Something v2's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gossamer import rng
from gossamer.errors import DataError, warn
from gossamer.options import Options, parse_options, takes
from gossamer.workloads import samples as lazy
from gossamer.workloads.datasets import WHERE
from gossamer.workloads.given_data import TEST_SHARE
from gossamer.workloads.multimodal.captions import (
    TEST,
    TRAIN,
    UNSAID,
    Caption,
    read_captions,
    read_msr_vtt,
    read_something,
)
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.multimodal.tokens import CaptionTokenizer, TokenizerOptions, tokenizer_of
from gossamer.workloads.multimodal.video import VideoFiles, read_video, video_size
from gossamer.workloads.samples import ArraySource, LazySamples, Samples


class VideoOptions(Options):
    """Options of `captioned_videos`.

    Attributes:
        videos: folder of the videos.
        captions: file of the captions: ``.jsonl`` or ``.csv`` with ``video`` and ``caption`` and, where there are any,
            ``split`` and ``label``; or the JSON file of MSR-VTT or of Something-Something v2.
        format: what the file is, ``"own"`` (the former), ``"msr-vtt"`` or ``"something-something-v2"``.
        test_captions: such a file of the test data; without it and splits, `test_share` of the videos is taken out.
        classes: JSON file of Something-Something v2's classes.
        test_share: that share.
        frames: frames of a video, in the middle of that many equal parts of it.
        size: height and width to which frames are resized; None: those of all videos are the same.
        captions_per_video: the first ones are used; None: all of them.
        length: tokens of a caption, its begin and end included; longer ones are cut.
        tokenizer: it is trained on the training captions.
        broken_rate: share of videos that may be missing or unreadable: these are left out with one warning; beyond it,
            and at 0, the first of them is an error.
    """

    videos: str
    captions: str
    format: Literal["own", "msr-vtt", "something-something-v2"] = "own"
    test_captions: str | None = None
    classes: str | None = None
    test_share: float = Field(TEST_SHARE, gt=0, lt=1)
    frames: int = Field(8, ge=1)
    size: tuple[int, int] | None = None
    captions_per_video: int | None = Field(None, ge=1)
    length: int = Field(32, ge=3)
    tokenizer: TokenizerOptions = TokenizerOptions()
    broken_rate: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _used(self) -> VideoOptions:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size = {self.size}: give a height and a width of 1 or more")
        if self.classes is not None and self.format != "something-something-v2":
            raise ValueError(f"classes = {self.classes!r} is read with format = 'something-something-v2' alone")
        return self


@takes(VideoOptions)
def captioned_videos(options: Mapping[str, Any]) -> MultimodalData:
    """Videos with captions; a sample is a video and one of its captions, its owner is the number of the video.

    Modalities are ``video``, uint8 [frames, 3, height, width], which is read while training where all of them take
    more than 1 GiB, and ``text``, int64 [length], tokens. Of MSR-VTT, the splits ``train`` and ``test`` are used.

    Args:
        options: see `VideoOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: a file is missing or malformed, more videos are broken than `VideoOptions.broken_rate` allows, or
            the sizes of videos differ.
    """
    chosen = parse_options(VideoOptions, options, WHERE)
    captions = _limited(_with_splits(_read(chosen), chosen.test_share), chosen.captions_per_video)
    found = _videos(captions, chosen)
    captions = [one for one in captions if one.video in found.numbers]
    parts = {split: [one for one in captions if one.split == split] for split in (TRAIN, TEST)}
    for split, members in parts.items():
        if not members:
            raise DataError(f"{chosen.captions!r} has no captions of readable videos for the {split} split: add some")
    tokenizer = tokenizer_of(chosen.tokenizer, [one.text for one in parts[TRAIN]])
    train, test = (_split(members, found, tokenizer, chosen.length) for members in parts.values())
    num_labels = 1 + max(one.label for one in captions)
    return MultimodalData(Path(chosen.videos).name, train, test, num_labels, tokenizer.vocabulary)


def _read(options: VideoOptions) -> list[Caption]:
    files = [(options.captions, TRAIN)] + [(one, TEST) for one in [options.test_captions] if one is not None]
    found = list[Caption]()
    for path, split in files:
        if options.format == "something-something-v2":
            found += read_something(path, options.classes, split if len(files) == 2 else UNSAID)
        else:
            captions = read_msr_vtt(path) if options.format == "msr-vtt" else read_captions(path)
            found += [one._replace(split=split) for one in captions] if len(files) == 2 else captions
    return found


def _with_splits(captions: list[Caption], test_share: float) -> list[Caption]:
    """Give videos without a split one, by a draw that is always the same; captions of a video stay together."""
    open_ones = list(dict.fromkeys(one.video for one in captions if one.split == UNSAID))
    order = rng.generator(0, "videos-split").permutation(len(open_ones))
    held_out = {open_ones[place] for place in order[: math.ceil(test_share * len(open_ones))]}
    drawn = {video: TEST if video in held_out else TRAIN for video in open_ones}
    given = [one._replace(split=drawn[one.video]) if one.split == UNSAID else one for one in captions]
    return [one for one in given if one.split in (TRAIN, TEST)]


def _limited(captions: list[Caption], most: int | None) -> list[Caption]:
    """Keep the first captions of each video."""
    seen = dict[str, int]()
    kept = list[Caption]()
    for one in captions:
        seen[one.video] = seen.get(one.video, 0) + 1
        if most is None or seen[one.video] <= most:
            kept.append(one)
    return kept


class _Videos(NamedTuple):
    """The videos that can be read, and the number of each by its name."""

    samples: LazySamples
    numbers: dict[str, int]


def _videos(captions: Sequence[Caption], options: VideoOptions) -> _Videos:
    """Return the videos of captions, in memory if they are few.

    Raises:
        DataError: too many are broken, or their sizes differ.
    """
    wheres = {one.video: f"the video {one.video!r} of {one.where}" for one in reversed(captions)}
    names = list(dict.fromkeys(one.video for one in captions))
    paths = [str(Path(options.videos) / name) for name in names]
    labels = [wheres[name] for name in names]
    size = options.size or _common_size(paths, labels)
    source = VideoFiles(paths, labels, options.frames, size)
    every = LazySamples(source, torch.arange(len(names)), (options.frames, 3, *size), torch.uint8, "")
    content: dict[int, NDArray[np.uint8]] | None = {} if lazy.is_kept(lazy.num_bytes(every)) else None
    reasons = lazy.passed(every, lambda: _check(source, options.size, content))
    _report(reasons, options.broken_rate)
    kept = [row for row, reason in enumerate(reasons) if not reason]
    digest = lazy.passed(every, lambda: _digest(options, [paths[row] for row in kept]))
    rows = torch.tensor(kept, dtype=torch.int64)
    if content is None:
        samples = replace(every, rows=rows, digest=digest)
    else:
        array = np.stack([content[row] for row in kept])
        samples = replace(every, source=ArraySource(array), rows=torch.arange(len(kept)), digest=digest)
    return _Videos(samples, {names[row]: place for place, row in enumerate(kept)})


def _common_size(paths: Sequence[str], wheres: Sequence[str]) -> tuple[int, int]:
    """Return the size of the first video that can be read.

    Raises:
        DataError: there is none.
    """
    first: DataError | None = None
    for path, where in zip(paths, wheres, strict=True):
        try:
            return video_size(path, where)
        except DataError as error:
            first = first or error
    assert first is not None
    raise first


def _check(source: VideoFiles, size: tuple[int, int] | None, content: dict[int, NDArray[np.uint8]] | None) -> list[str]:
    """Return what is wrong with each video, or "".

    Args:
        source: the videos.
        size: to which they are resized, or None.
        content: where videos are put that are read whole; None: their first frames are read alone.

    Raises:
        DataError: a video has another size than the first one, and none is given.
    """
    reasons = list[str]()
    for row, (path, where) in enumerate(zip(source.paths, source.wheres, strict=True)):
        try:
            if not Path(path).is_file():
                raise DataError(f"{where} is missing: put it at {path!r}, or drop its captions")
            found = size or video_size(path, where)
            if content is not None:
                content[row] = read_video(path, source.num_frames, size, where)
            elif size:
                video_size(path, where)
        except DataError as error:
            reasons.append(str(error))
            continue
        if found != source.size:
            raise DataError(
                f"{where} has frames of {found[0]} x {found[1]} pixels, but others of {source.size[0]} x"
                f" {source.size[1]}: give {WHERE}.size, to which all are resized"
            )
        reasons.append("")
    return reasons


def _report(reasons: Sequence[str], broken_rate: float) -> None:
    """Tell how many videos are broken.

    Raises:
        DataError: too many are.
    """
    broken = [reason for reason in reasons if reason]
    if not broken:
        return
    if len(broken) > broken_rate * len(reasons):
        raise DataError(
            f"{broken[0]}; {len(broken)} of {len(reasons)} videos are broken, more than {WHERE}.broken_rate ="
            f" {broken_rate:g} allows"
        )
    warn([f"{len(broken)} of {len(reasons)} videos are broken and left out; the first: {broken[0]}"])


def _split(captions: Sequence[Caption], videos: _Videos, tokenizer: CaptionTokenizer, length: int) -> MultimodalSplit:
    numbers = torch.tensor([videos.numbers[one.video] for one in captions])
    ids = torch.from_numpy(tokenizer.encode([one.text for one in captions], length).ids)
    samples: dict[str, Samples] = {"video": videos.samples.subset(numbers), "text": ids}
    labels = torch.tensor([one.label for one in captions])
    return MultimodalSplit(samples, torch.ones(len(captions), 2).bool(), labels, numbers)


def _digest(options: VideoOptions, paths: Sequence[str]) -> str:
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
