"""Train TW-BERT, and draw what it sees and says: frames, caption, answers, and where each word looks in every frame.

    python experiments/temporal-reliance/pictures.py docs/trajectories.png --out runs/trajectories

One client trains on moving digits, for a minute or two. Below each strip of frames stand two words of its caption: the
brighter a patch, the more of the word's attention within that frame it has, by the mean of the heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import gossamer
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.workloads.multimodal.clips import QUESTIONS

CLIPS = (7, 53)  # of the test clips
WORDS = (1, 3)  # places in "a five moves left then up" of the digit and of its first direction


def config(rounds: int) -> dict[str, Any]:
    """Return one client that learns to tell, to find and to answer."""
    tasks = ["question-answering", "retrieval", "recognition"]
    return {
        "rounds": rounds,
        "workload": {"name": "video-language", "model": {"name": "tw-bert", "matching": False}, "tasks": tasks},
        "clients": {"num": 1, "per_round": 1},
        "train": {"epochs": 1, "batch_size": 25, "lr": 0.003, "optimizer": {"name": "adam"}},
        "algorithm": "fedavg",
        "evaluation": {"every": rounds},
        "engine": {"name": "local", "workers": 0},
    }


def draw(made: Any, params: dict[str, torch.Tensor], file: Path) -> None:
    """Draw clips of the test set, one below another, to a PNG file."""
    data, patches, chosen = made.data, made.model.patches, list(CLIPS)
    clips = data.test
    video = (clips.video[chosen].float() / 255 - data.mean) / data.std
    batch = {"video": video, "caption": clips.caption[chosen]}
    with torch.no_grad():
        shares = made.model.forward(params, batch).shares(batch["caption"]).mean(1)  # [clips, n, frames, places]
        said = [
            made.model.predict("question-answering", params, batch | {"question": clips.question[chosen, number]})
            for number in range(len(QUESTIONS))
        ]
    answers = torch.stack([one["logits"].argmax(-1) for one in said], 1)
    frames, (height, width) = video.shape[1], video.shape[-2:]
    grid = height // patches.patch, width // patches.patch
    rows = 1 + len(WORDS)
    figure = plt.figure(figsize=(1.5 * frames + 0.5, (1.5 * rows + 0.5) * len(chosen)), layout="constrained")
    parts: Any = figure.subfigures(len(chosen))
    for number, (clip, part) in enumerate(zip(chosen, parts, strict=True)):
        words = data.words(clips.caption[clip]).split()
        shown = clips.video[clip, :, 0].numpy()
        block = part.subplots(rows, frames)
        told = ", ".join(data.vocabulary[answer] for answer in answers[number])
        part.suptitle(f'"{" ".join(words)}"; asked for digit, first and last move, it says: {told}', fontsize=10)
        block[0][0].set_ylabel("frames")
        for row, place in zip(block[1:], WORDS, strict=True):
            row[0].set_ylabel(f'"{words[place]}"')
        for frame in range(frames):
            block[0][frame].imshow(shown[frame], cmap="gray")
            for row, place in zip(block[1:], WORDS, strict=True):
                share = shares[number, place + 1, frame].reshape(grid).numpy()  # the first token begins the text
                row[frame].imshow(shown[frame], cmap="gray")
                row[frame].imshow(
                    np.kron(share, np.ones((patches.patch, patches.patch))), cmap="magma", alpha=0.65, vmin=0
                )
        for axis in block.flat:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(file, dpi=110)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="PNG file to be written")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--rounds", type=int, default=8, help="passes over the training clips")
    arguments = parser.parse_args()
    given = config(arguments.rounds)
    run = gossamer.run(given, out=arguments.out)
    print({name: run.metrics[-1][name] for name in ("question_accuracy", "recall_at_1", "motion_accuracy")})
    draw(build(parse(given)).workload, run.params, arguments.file)


if __name__ == "__main__":
    main()
