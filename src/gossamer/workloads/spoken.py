"""Spoken digits as small spectrograms, each speaker a natural client."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.threads import one_thread
from gossamer.workloads.datasets import WHERE, ImageData

FILE = "fsdd/fsdd_8khz_int16.npz"  # below $GOSSAMER_DATA
KEYS = ("pcm", "offset", "label", "speaker", "index")
NUM_TEST = 5  # recordings 0-4 of every speaker and digit, the official test split
SAMPLES_PER_SECOND = 8000
FRAME = 256  # samples: 32 ms
HOP = 160  # samples: 20 ms
FLOOR_DECIBELS = -60.0
CENTRE_DECIBELS, UNIT_DECIBELS = -40.0, 20.0  # so that features are of order 1 without statistics of anyone's data
CHUNK = 512  # clips that are transformed at a time


class SpokenOptions(Options):
    """Options of `spoken_digits`.

    Attributes:
        speakers: whose recordings are in the training data, by their numbers (in alphabetical order of their names);
            None: everybody's. The test data is always everybody's.
        bands: mel bands, the height of an image.
        frames: frames of 20 ms, the width of an image; longer clips are cut, shorter ones padded with silence.
    """

    speakers: list[Annotated[int, Field(ge=0)]] | None = None
    bands: int = Field(32, ge=1, le=64)
    frames: int = Field(32, ge=1, le=500)


@takes(SpokenOptions)
def spoken_digits(options: Mapping[str, Any]) -> ImageData:
    """Free Spoken Digit Dataset: 3,000 clips of ten digits by six speakers, as log-mel images [1, bands, frames].

    A value is the power of a mel band in a frame, in decibels relative to the loudest of its clip (from -60 to 0),
    shifted by 40 and divided by 20. Of the 50 clips of a speaker and digit, numbers 0-4 are for testing, 300 in all,
    and the other 2,700 for training; `ImageData.owner` is the speaker. Source: Jackson et al., "Free Spoken Digit
    Dataset", CC BY-SA 4.0, as one file ``$GOSSAMER_DATA/fsdd/fsdd_8khz_int16.npz`` of 8 kHz samples.

    Args:
        options: see `SpokenOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the file is missing or malformed, or has no such speaker.
    """
    chosen = parse_options(SpokenOptions, options, WHERE)
    arrays = _read()
    names, speaker = np.unique(arrays["speaker"], return_inverse=True)
    speakers = list(range(len(names))) if chosen.speakers is None else chosen.speakers
    if not speakers or max(speakers) >= len(names):
        known = ", ".join(f"{number} {name}" for number, name in enumerate(names.tolist()))
        raise DataError(f"{WHERE}.speakers = {chosen.speakers}: name one or more of the speakers {known}")
    is_test = arrays["index"] < NUM_TEST
    images = log_mel(arrays["pcm"], arrays["offset"], chosen.bands, chosen.frames)
    labels, owner = (torch.from_numpy(values.astype(np.int64)) for values in (arrays["label"], speaker))
    train, test = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~is_test & np.isin(speaker, speakers), is_test))
    return ImageData(
        "spoken-digits", images[train], labels[train], images[test], labels[test], 10, (0.0,), (1.0,), owner[train]
    )


def _read() -> dict[str, NDArray[Any]]:
    """Read and check the file's arrays.

    Raises:
        DataError: it is missing or malformed.
    """
    folder = os.environ.get("GOSSAMER_DATA")
    if not folder:
        raise DataError(f"data set 'spoken-digits' is read from $GOSSAMER_DATA/{FILE}: set GOSSAMER_DATA to its folder")
    path = Path(folder) / FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in KEYS}
    except FileNotFoundError:
        raise DataError(
            f"no file {str(path)!r} for data set 'spoken-digits': put it there, or set GOSSAMER_DATA"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {str(path)!r} as spoken digits ({error}): fetch the file again") from error
    offset, num_clips = arrays["offset"], len(arrays["label"])
    whole = offset.ndim == 1 and len(offset) == num_clips + 1 and bool((np.diff(offset) > 0).all())
    if not whole or offset[0] != 0 or offset[-1] != len(arrays["pcm"]):
        raise DataError(
            f"the offsets of {str(path)!r} do not divide its {len(arrays['pcm'])} samples into {num_clips} clips:"
            " fetch the file again"
        )
    if len(arrays["speaker"]) != num_clips or len(arrays["index"]) != num_clips:
        raise DataError(f"{str(path)!r} lacks a speaker or an index for some of its {num_clips} clips: fetch it again")
    return arrays


def log_mel(pcm: NDArray[np.int16], offset: NDArray[np.int64], bands: int, frames: int) -> Tensor:
    """Return log-mel spectrograms float32 [clips, 1, bands, frames], see `spoken_digits` for their unit.

    Args:
        pcm: int16 [samples], all clips at 8 kHz one after another.
        offset: int64 [clips + 1], where each clip begins.
        bands: mel bands from 0 to 4 kHz.
        frames: frames of 32 ms, one every 20 ms.
    """
    length = FRAME + (frames - 1) * HOP
    within = np.arange(length)
    filters = torch.from_numpy(mel_filters(bands))
    window = torch.hann_window(FRAME)
    images = torch.empty(len(offset) - 1, 1, bands, frames)
    for start in range(0, len(images), CHUNK):
        first, last = offset[:-1][start : start + CHUNK, None], offset[1:][start : start + CHUNK, None]
        place = first + within
        clips = np.where(place < last, pcm[np.minimum(place, len(pcm) - 1)], 0).astype(np.float32) / 32768
        with one_thread():  # the same bits, however many threads there are
            spectrum = torch.stft(torch.from_numpy(clips), FRAME, HOP, window=window, center=False, return_complex=True)
            power = filters @ spectrum.abs().square()
        peak = power.amax(dim=(1, 2), keepdim=True).clamp_min(1e-20)
        decibels = (10 * torch.log10((power / peak).clamp_min(1e-20))).clamp_min(FLOOR_DECIBELS)
        images[start : start + CHUNK, 0] = (decibels - CENTRE_DECIBELS) / UNIT_DECIBELS
    return images


def mel_filters(bands: int) -> NDArray[np.float32]:
    """Return triangular filters [bands, FRAME / 2 + 1] whose centres are equally spaced in mel = 2595 log10(1 + f/700).

    A triangle that is narrower than the spacing of the frequencies would miss them all, so every one reaches at least
    that far from its centre.
    """
    frequency = np.linspace(0, SAMPLES_PER_SECOND / 2, FRAME // 2 + 1)
    spacing = frequency[1]
    highest = 2595 * np.log10(1 + frequency[-1] / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    centre = edges[1:-1, None]
    below = np.maximum(centre - edges[:-2, None], spacing)
    above = np.maximum(edges[2:, None] - centre, spacing)
    rising, falling = (frequency - (centre - below)) / below, ((centre + above) - frequency) / above
    filters: NDArray[np.float32] = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    return filters
