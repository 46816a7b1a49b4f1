"""Audio-visual digits: a picture of a digit, and somebody who says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets import WHERE, digits, mnist
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.spoken import spoken_digits

Ints = NDArray[np.int64]
SOURCES = {"digits": digits, "mnist": mnist}


class AudioVisualOptions(Options):
    """Options of `audio_visual_digits`.

    Attributes:
        images: ``"digits"``, scikit-learn's, or ``"mnist"``.
        split: ``"paired"``, every sample has both modalities and its owner is the speaker; ``"natural"``, training
            samples are parted: those who hear hold what was said, others what was written, and nobody holds both.
        num_train, num_test: number of pairs; None: one for each recording, 2,700 and 300. Of more, each has another
            partner in most pairs.
        num_public: number of training pairs that are taken out, and which everybody has. With `num_train`, recordings
            and images of these may be in other pairs, too.
        bands, frames: height and width of a spectrogram, see `gossamer.workloads.spoken.SpokenOptions`.
        seed: seed of the pairing.
    """

    images: Literal["digits", "mnist"] = "digits"
    split: Literal["paired", "natural"] = "paired"
    num_train: int | None = Field(None, ge=1)
    num_test: int | None = Field(None, ge=1)
    num_public: int = Field(0, ge=0)
    bands: int = Field(32, ge=1, le=64)
    frames: int = Field(32, ge=1, le=500)
    seed: int = 0


@takes(AudioVisualOptions)
def audio_visual_digits(options: Mapping[str, Any]) -> MultimodalData:
    """Images and recordings of equal digits, paired at random; modalities ``image`` and ``audio``.

    Images are uint8 [1, height, width], recordings log-mel spectrograms, float32 [1, bands, frames]. Training images
    meet training recordings only, and test images test recordings, by the official splits of both; test samples are
    always pairs. Of the natural split, owners 0 .. S - 1 are the S speakers, who have recordings alone, and owners S ..
    2 S - 1 have the images alone, dealt evenly; a sample has zeros where it lacks a modality.

    Args:
        options: see `AudioVisualOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: files are missing or malformed.
    """
    chosen = parse_options(AudioVisualOptions, options, WHERE)
    seen, heard = SOURCES[chosen.images]({}), spoken_digits({"bands": chosen.bands, "frames": chosen.frames})
    assert heard.owner is not None
    parts = {
        "train": (seen.train_images, seen.train_labels, heard.train_images, heard.train_labels, chosen.num_train),
        "test": (seen.test_images, seen.test_labels, heard.test_images, heard.test_labels, chosen.num_test),
    }
    splits = dict[str, MultimodalSplit]()
    for split, (images, image_labels, audio, audio_labels, count) in parts.items():
        num_more = chosen.num_public if split == "train" else 0
        num_pairs = len(audio_labels) if count is None else count + num_more
        if num_pairs <= num_more:
            raise DataError(
                f"{WHERE}.num_public = {num_more} takes all of the {num_pairs} training pairs: give fewer, or num_train"
            )
        pairs = paired(image_labels.numpy(), audio_labels.numpy(), num_pairs, chosen.seed, f"audio-visual-{split}")
        image_rows, audio_rows = map(torch.from_numpy, pairs)
        both = {"image": images[image_rows], "audio": audio[audio_rows]}
        owner = heard.owner[audio_rows] if split == "train" else None
        splits[split] = MultimodalSplit(both, torch.ones(num_pairs, 2).bool(), audio_labels[audio_rows], owner)
    public = splits["train"][: chosen.num_public] if chosen.num_public else None
    train = splits["train"][chosen.num_public :]
    train = train if chosen.split == "paired" else parted(train, chosen.seed)
    return MultimodalData(f"audio-visual-{chosen.images}", train, splits["test"], 10, public=public)


def paired(image_labels: Ints, audio_labels: Ints, num_pairs: int, seed: int, purpose: str) -> tuple[Ints, Ints]:
    """Pair images and recordings of equal labels; int64 [num_pairs] each, their numbers.

    All recordings are used once in random order, then again, and so on; so are the images of each label.

    Args:
        image_labels, audio_labels: int64 [N], of each.
        seed, purpose: address of the draws.

    Raises:
        DataError: a label that is heard is not seen.
    """
    audio_rows = _dealt(np.arange(len(audio_labels)), num_pairs, rng.generator(seed, purpose))
    image_rows = np.empty(num_pairs, dtype=np.int64)
    for label in np.unique(audio_labels[audio_rows]):
        members = np.flatnonzero(image_labels == label)
        if not len(members):
            raise DataError(f"there are recordings of the label {label} but no images: add some of each label")
        places = np.flatnonzero(audio_labels[audio_rows] == label)
        image_rows[places] = _dealt(members, len(places), rng.generator(seed, f"{purpose}-images", participant=label))
    return image_rows, audio_rows


def _dealt(members: Ints, count: int, source: np.random.Generator) -> Ints:
    """Return `count` members, all of them in random order before any is used again."""
    return np.concatenate([source.permutation(members) for _ in range(-(-count // len(members)))])[:count]


def parted(pairs: MultimodalSplit, seed: int) -> MultimodalSplit:
    """Part pairs of two modalities into samples that have one, see `audio_visual_digits`.

    Args:
        pairs: N samples of ``image`` and ``audio`` with owners 0 .. S - 1.
        seed: seed of the deal of images.

    Returns:
        2 N samples: the recordings, then the images.
    """
    assert pairs.owner is not None
    count, num_owners = len(pairs.labels), 1 + int(pairs.owner.max())
    image, audio = (values[:] for values in pairs.samples.values())
    order = rng.generator(seed, "audio-visual-owners").permutation(count)
    holder = torch.empty(count, dtype=torch.int64)
    holder[torch.from_numpy(order)] = num_owners + torch.arange(count) % num_owners

    def beside(values: Tensor, *, is_first: bool) -> Tensor:
        """Put zeros after or before values."""
        return torch.cat([values, torch.zeros_like(values)] if is_first else [torch.zeros_like(values), values])

    present = torch.zeros(2 * count, 2, dtype=torch.bool)
    present[count:, 0] = present[:count, 1] = True
    samples = {"image": beside(image, is_first=False), "audio": beside(audio, is_first=True)}
    return MultimodalSplit(samples, present, pairs.labels.repeat(2), torch.cat([pairs.owner, holder]))
