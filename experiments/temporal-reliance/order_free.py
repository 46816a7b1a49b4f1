"""The control of the experiment: a model of a user's own that cannot know in which order it sees the frames."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import DeclaredModel
from gossamer.workloads.multimodal.blocks import FeedForward, Patches, glorot, linear
from gossamer.workloads.multimodal.graphs import Facts, Losses, Tensors, graph
from gossamer.workloads.multimodal.objectives import label_losses


class OrderFree(DeclaredModel):
    """The mean, over all patches of all frames, of what a feed-forward layer makes of each by itself, and its place.

    The positions of the frames are not added, and the mean is one in float64, so that the order of its summands is
    no more than 1e-15 of it.
    """

    def __init__(self, facts: Facts, stream: int = 48, hidden: int = 192, patch: int = 4) -> None:
        """Declare the parameters: channels of the stream, hidden units, and pixels of a patch's side."""
        super().__init__()
        self.facts = facts
        self.patches = Patches("vision", stream, facts.frame, 1, patch)
        self.feed = FeedForward("vision.feed", stream, hidden)
        self.patches.declare(self)
        self.feed.declare(self)
        for label, count in facts.num_labels.items():
            self.add(f"recognition.{label}", (count, stream), (None, None))
        self.graphs = {"recognition": graph("vision recognition", "video")}

    def init(self, source: Any) -> dict[str, Tensor]:
        """Return initial parameters."""
        return glorot(self.shapes, source)

    def logits(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits of each label, float32 [b, classes]."""
        tokens = self.patches(params, batch["video"].flatten(0, 1)[:, None])  # every frame is a video of its own
        tokens = tokens.reshape(*batch["video"].shape[:2], *tokens.shape[-2:])
        x = (tokens + self.feed(params, tokens)).double().mean((-3, -2)).to(tokens.dtype)
        return {label: linear(params, f"recognition.{label}", x) for label in self.facts.num_labels}

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses of recognition, the only task."""
        losses, has_any = label_losses(self.logits(params, batch), batch)
        return dict.fromkeys(tasks, (losses, batch["has_video"] * has_any))

    @torch.no_grad()
    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return the logits of each label."""
        return self.logits(params, batch)
