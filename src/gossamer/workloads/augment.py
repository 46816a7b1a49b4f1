"""Data augmentation whose randomness is addressed, so that a sample looks the same on every engine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng

PADDING = 4


def crop_flip(images: Tensor, samples: NDArray[np.int64], seed: int, round: int, phase: int = 0) -> Tensor:
    """Pad by 4 black pixels, crop at random to the old size, mirror half of the images (He et al., arXiv 1512.03385).

    Args:
        images: [b, channels, height, width] of any type.
        samples: int64 [b], numbers of the training samples, each of which has one owner: a sample is drawn anew every
            phase, but not for a further epoch within one.
        seed, round, phase: address of the draw.

    Returns:
        a new tensor like `images`.
    """
    words = rng.bits(seed, "augment", round, phase, samples, 1)[:, 0]
    span = np.uint64(2 * PADDING + 1)
    top = torch.from_numpy((words % span).astype(np.int64))
    left = torch.from_numpy((words // span % span).astype(np.int64))
    flip = torch.from_numpy((words >> np.uint64(63)).astype(np.bool_))
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    rows = top[:, None] + torch.arange(height)
    across = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None], across.flip(0), across)
    which = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
