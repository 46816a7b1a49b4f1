"""A small file of spoken digits, made of noise, in the place of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gossamer.workloads.spoken import FILE

NUM_SPEAKERS, NUM_DIGITS, NUM_CLIPS = 3, 10, 7  # clips 5 and 6 are for training


def recordings() -> dict[str, Any]:
    """Make clips of noise, ordered as in the real file: by speaker, digit and number."""
    source = np.random.default_rng(0)
    keys = [(s, d, i) for s in range(NUM_SPEAKERS) for d in range(NUM_DIGITS) for i in range(NUM_CLIPS)]
    clips = [source.integers(-3000, 3000, source.integers(300, 900)).astype(np.int16) for _ in keys]
    return {
        "pcm": np.concatenate(clips),
        "offset": np.cumsum([0, *map(len, clips)]),
        "label": np.array([digit for _, digit, _ in keys], dtype=np.uint8),
        "speaker": np.array([("zoe", "ann", "bob")[speaker] for speaker, _, _ in keys]),
        "index": np.array([index for _, _, index in keys], dtype=np.uint8),
    }


def write(folder: Path, arrays: dict[str, Any]) -> None:
    """Write them as the real file is, below a folder for GOSSAMER_DATA."""
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
