"""Captioned videos of a ball that moves, and a model that sees nothing but what moves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gossamer.options import Options, parse_options, takes
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import DeclaredModel, rescale
from gossamer.workloads.multimodal.clips import DIRECTIONS, SPECIAL, ClipData, Clips, encoded
from gossamer.workloads.multimodal.graphs import Facts, Losses, Tensors, graph
from gossamer.workloads.multimodal.objectives import label_losses
from gossamer.workloads.traits import ModelTraits

QUESTION = "where does it move"
SIDE, NUM_FRAMES = 9, 4


class BallOptions(Options):
    """Options of `bouncing_ball`. Attributes: num_train: clips for training; num_pools: of four test clips."""

    num_train: int = Field(120, ge=1)
    num_pools: int = Field(8, ge=1)


@takes(BallOptions)
def bouncing_ball(options: Mapping[str, Any]) -> ClipData:
    """A pixel that moves left, right, up or down."""
    chosen = parse_options(BallOptions, options, "workload.dataset")
    texts = [f"the ball moves {direction}" for direction in DIRECTIONS]
    vocabulary = (*SPECIAL, *sorted({word for text in (*texts, QUESTION) for word in text.split()}))
    return ClipData(
        name="bouncing-ball",
        train=clips(torch.arange(chosen.num_train) % len(texts), texts, vocabulary, seed=0),
        test=clips(torch.arange(len(texts)).repeat(chosen.num_pools), texts, vocabulary, seed=1),
        vocabulary=vocabulary,
        num_labels={"direction": len(texts)},
        partition_label="direction",
        pool=len(texts),
        std=0.1,
    )


def clips(direction: Tensor, texts: list[str], vocabulary: tuple[str, ...], seed: int) -> Clips:
    """Return a clip of each direction, from a random place in the middle."""
    count, source = len(direction), torch.Generator().manual_seed(seed)
    place = torch.randint(NUM_FRAMES - 1, SIDE - NUM_FRAMES + 1, (count, 2), generator=source)
    steps, video = torch.tensor(list(DIRECTIONS.values()))[direction], torch.zeros(count, NUM_FRAMES, 1, SIDE, SIDE)
    for frame in range(NUM_FRAMES):
        row, column = (place + frame * steps).unbind(1)
        video[torch.arange(count), frame, 0, row, column] = 255
    captions, answers = encoded(texts, vocabulary), [vocabulary.index(word) for word in DIRECTIONS]
    return Clips(
        video.to(torch.uint8),
        captions[direction],
        encoded([QUESTION], vocabulary).expand(count, 1, -1).contiguous(),
        torch.tensor(answers)[direction][:, None],
        {"direction": direction},
    )


class FrameDifferences(DeclaredModel):
    """Tells the labels of videos by a perceptron of the differences of frames that follow each other."""

    traits = ModelTraits()

    def __init__(self, facts: Facts, hidden: int = 24) -> None:
        super().__init__()
        size = (facts.num_frames - 1) * torch.Size(facts.frame).numel()
        self.add("motion", (hidden, size), ("hidden", None))
        for label, count in facts.num_labels.items():
            self.add(f"classes.{label}", (count, hidden), (None, "hidden"))
        self.labels = tuple(facts.num_labels)
        self.graphs = {"recognition": graph("motion classes", "video")}

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses of tasks, see `VideoLanguageModel`."""
        logits = self._logits(params, batch["video"], context.scale)
        each, has_any = label_losses(logits, batch)
        return {"recognition": (each, batch["has_video"] * has_any)}

    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return logits of each label, [b, classes]."""
        return self._logits(params, batch["video"], 1.0)

    def _logits(self, params: Mapping[str, Tensor], video: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        moves = (video[..., 1:, :, :, :] - video[..., :-1, :, :, :]).flatten(-4)
        hidden = rescale(F.gelu(F.linear(moves, params["motion.weight"], params["motion.bias"])), scale)
        return {
            name: F.linear(hidden, params[f"classes.{name}.weight"], params[f"classes.{name}.bias"])
            for name in self.labels
        }
