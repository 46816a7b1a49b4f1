"""NLVR and folders of captioned videos as clips, which video-language models are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.memory import require_memory
from gossamer.options import parse_options, takes
from gossamer.workloads.datasets import WHERE
from gossamer.workloads.multimodal import nlvr as sentences
from gossamer.workloads.multimodal import video_sets
from gossamer.workloads.multimodal.clips import BEGIN, END, PAD, ClipData, Clips
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.multimodal.tokens import SPECIAL
from gossamer.workloads.samples import num_bytes

FEW = 1000  # clips that show mean and standard deviation
POOL = 100


class NlvrClipOptions(sentences.NlvrOptions):
    """Options of `nlvr`; else as `NlvrOptions`.

    Attributes:
        height, width: to which images of 100 x 400 pixels are resized; a model's patches must divide them.
        boxes: whether the three boxes of an image are three frames, without the grey between them.
        objects: whether clips have labels besides, how many objects of each colour and shape an image shows.
        pool: test clips that are evaluated at a time.
    """

    height: Annotated[int, Field(ge=1)] = 24
    width: Annotated[int, Field(ge=1)] = 96
    boxes: bool = False
    objects: bool = False
    pool: int = Field(POOL, ge=1)


class VideoClipOptions(video_sets.VideoOptions):
    """Options of `captioned_videos`; else as `VideoOptions`.

    Attributes:
        captions_per_video: the first ones are used, each with a copy of the video in memory; None: all of them.
        pool: test clips, in order, among which a caption is to be found.
    """

    captions_per_video: Annotated[int, Field(ge=1)] | None = 1
    pool: int = Field(POOL, ge=1)


@takes(NlvrClipOptions)
def nlvr(options: Mapping[str, Any]) -> ClipData:
    """NLVR as videos of one or three frames: the sentence is question and caption, the answer ``true`` or ``false``.

    See `gossamer.workloads.multimodal.nlvr`.

    Args:
        options: see `NlvrClipOptions`.

    Raises:
        ConfigError: an unknown or wrong option, or more images than this machine could hold.
        DataError: a file is missing or malformed.
    """
    chosen = parse_options(NlvrClipOptions, options, WHERE)
    if chosen.boxes and chosen.width % 8:
        raise ConfigError(f"{WHERE}.width = {chosen.width} cannot be divided into boxes: give a multiple of 8")
    own = NlvrClipOptions.model_fields.keys() - sentences.NlvrOptions.model_fields.keys()
    data = sentences.nlvr({name: value for name, value in options.items() if name not in own} | _size(chosen))
    vocabulary = _vocabulary(data.vocabulary, *sentences.LABELS)
    words = torch.tensor([vocabulary.index(word) for word in sentences.LABELS])  # in the order of the labels 0 and 1

    def clips(split: MultimodalSplit, files: Sequence[str]) -> Clips:
        """Return a split as clips."""
        text, images = _renumbered(split, data.vocabulary, vocabulary), _whole(split, "image")
        frames = _boxes(images) if chosen.boxes else images[:, None]
        labels = {"truth": split.labels} | (_objects(files, chosen.images) if chosen.objects else {})
        return Clips(frames, text, text[:, None], words[split.labels][:, None], labels)

    counts = dict.fromkeys(sentences.KINDS if chosen.objects else (), sentences.MOST_OBJECTS + 1)
    train, test = clips(data.train, chosen.train), clips(data.test, chosen.test)
    return _clip_data(data, train, test, vocabulary, {"truth": data.num_labels} | counts, chosen.pool)


def _boxes(images: Tensor) -> Tensor:
    """Return the three boxes of images [N, channels, height, width] as frames [N, 3, channels, height, width / 4]."""
    eighth = images.shape[-1] // 8  # a box has two of them, and what is between two boxes one
    return torch.stack([images[..., first * eighth : (first + 2) * eighth] for first in (0, 3, 6)], dim=1)


def _objects(files: Sequence[str], num_images: int) -> dict[str, Tensor]:
    """Return how many objects of each kind images show, int64 [N] each."""
    folder = sentences.folder_of_data()
    counts = torch.cat([sentences.count_objects(folder / f"{name}.jsonl") for name in files])
    return dict(zip(sentences.KINDS, counts.repeat_interleave(num_images, 0).unbind(1), strict=True))


@takes(VideoClipOptions)
def captioned_videos(options: Mapping[str, Any]) -> ClipData:
    """A folder of videos with captions, in memory; it has a label ``class``, and no questions.

    Where a model asks, the question is empty and its answer padding: choose tasks without questions. See
    `gossamer.workloads.multimodal.video_sets`.

    Args:
        options: see `VideoClipOptions`.

    Raises:
        ConfigError: an unknown or wrong option, or more videos than this machine could hold.
        DataError: a file is missing or malformed, or more videos are broken than allowed.
    """
    chosen = parse_options(VideoClipOptions, options, WHERE)
    given = {name: value for name, value in options.items() if name != "pool"}
    data = video_sets.captioned_videos(given | {"captions_per_video": chosen.captions_per_video})
    vocabulary = _vocabulary(data.vocabulary)

    def clips(split: MultimodalSplit) -> Clips:
        """Return a split as clips."""
        text, count = _renumbered(split, data.vocabulary, vocabulary), len(split.labels)
        question = torch.tensor([BEGIN, END]).repeat(count, 1, 1)
        answer = torch.full((count, 1), PAD)
        return Clips(_whole(split, "video"), text, question, answer, {"class": split.labels})

    return _clip_data(data, clips(data.train), clips(data.test), vocabulary, {"class": data.num_labels}, chosen.pool)


def _size(options: NlvrClipOptions) -> dict[str, int]:
    return {"height": options.height, "width": options.width}


def _vocabulary(known: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Return the words of a tokenizer in the order of clips: special tokens first."""
    words = [word for word in known if word not in SPECIAL]
    return (*SPECIAL, *words, *(word for word in more if word not in words))


def _renumbered(split: MultimodalSplit, known: tuple[str, ...], vocabulary: tuple[str, ...]) -> Tensor:
    """Return the tokens of a split by their numbers in the vocabulary of clips, int64 [N, length]."""
    number = {word: place for place, word in enumerate(vocabulary)}
    table = torch.tensor([number[word] for word in known])
    return table[split.samples["text"][:]]


def _whole(split: MultimodalSplit, modality: str) -> Tensor:
    """Read all samples of a modality.

    Raises:
        ConfigError: this machine could not hold them.
    """
    samples = split.samples[modality]
    require_memory(num_bytes(samples), f"{len(samples):,} samples of {modality}", "take a smaller size or fewer frames")
    return samples[:]


def _clip_data(
    data: MultimodalData,
    train: Clips,
    test: Clips,
    vocabulary: tuple[str, ...],
    num_labels: dict[str, int],
    pool: int,
) -> ClipData:
    """Return a data set whose first label is the one to divide by."""
    few = train.video[:: -(-len(train) // FEW)].numpy()
    mean, std = float(np.mean(few)) / 255, float(np.std(few)) / 255 or 1.0
    label = next(iter(num_labels))
    return ClipData(data.name, train, test, vocabulary, num_labels, label, min(pool, len(test)), mean, std)
