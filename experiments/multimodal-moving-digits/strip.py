"""Draw what a trained model sees and says: frames of test clips, their captions, and the captions that it finds.

    python experiments/multimodal-moving-digits/strip.py RUN FIGURE

RUN is the directory of one run, such as runs/OUT/all-largest/seed-0. Of the first test pool it draws one clip of every
third digit: its frames in order, its own caption, and the three captions of the pool's 120 that are most similar.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import gossamer
from gossamer.workloads.multimodal.workload import VideoLanguage

CLIPS = (2, 40, 77, 113)  # of the pool; captions are in the order of the digits, twelve motions each
BEST = 3
RIGHT, HALF, WRONG = "#009E73", "#555555", "#D55E00"


def colour(found: str, wanted: str) -> str:
    """Return green for the right caption, grey for the right motion of another digit, orange for another motion."""
    if found == wanted:
        return RIGHT
    return HALF if found.split()[2:] == wanted.split()[2:] else WRONG


def frames(panels: list[Axes], video: torch.Tensor, caption: str) -> None:
    """Draw the frames of a video uint8 [frames, 1, height, width], and its caption above the first one."""
    for panel, frame in zip(panels, video, strict=True):
        panel.imshow(frame[0], cmap="gray_r", vmin=0, vmax=255)
        panel.set(xticks=[], yticks=[])
    panels[0].set_title(caption, loc="left", fontsize=11, fontweight="bold")


def main() -> None:
    """Load, find captions and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("figure", type=Path)
    given = parser.parse_args()
    run = gossamer.load(given.run)
    options = {name: value for name, value in run.config["workload"].items() if name != "name"}
    workload = VideoLanguage(options, num_clients=1, partition="iid", seed=0)
    data = workload.data
    video, tokens = data.test.video[: data.pool], data.test.caption[: data.pool]
    captions = [data.words(caption) for caption in tokens]
    batch = {"video": (video / 255 - data.mean) / data.std, "caption": tokens}
    found = workload.model.predict("retrieval", run.params, batch)
    similarity = found["video"] @ found["text"].T
    num_frames = data.test.video.shape[1]
    figure, panels = plt.subplots(len(CLIPS), num_frames + 1, figsize=(2.0 * num_frames + 4, 2.15 * len(CLIPS)),
                                  width_ratios=[1] * num_frames + [2])  # fmt: skip
    for clip, row in zip(CLIPS, panels, strict=True):
        frames(list(row[:-1]), data.test.video[clip], captions[clip])
        row[-1].axis("off")
        for place, other in enumerate(similarity[clip].topk(BEST).indices.tolist()):
            text = f"{place + 1}. {captions[other]}"
            row[-1].text(0, 0.75 - 0.25 * place, text, fontsize=11, color=colour(captions[other], captions[clip]))
    figure.suptitle(
        "Test clips, their captions, and what the model finds first of 120 captions (green: right; grey: right motion,"
        " another digit; orange: another motion)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(given.figure, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
