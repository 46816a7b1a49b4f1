"""A model of videos and texts as a third party writes one: words, and frames whatever their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import DeclaredModel
from gossamer.workloads.multimodal.blocks import FeedForward, Tokens, linear, mean_of
from gossamer.workloads.multimodal.clips import PAD
from gossamer.workloads.multimodal.graphs import Facts, Losses, Tensors, graph
from gossamer.workloads.multimodal.objectives import contrastive, contrastive_logits, label_losses
from gossamer.workloads.traits import ModelTraits


class MeanPool(DeclaredModel):
    """Compares the mean of a video's frames with the mean of a caption's words."""

    traits = ModelTraits()

    def __init__(self, facts: Facts, size: int = 12, hidden: int = 16) -> None:
        super().__init__()
        channels, height, width = facts.frame
        self.labels = facts.num_labels
        self.words = Tokens("words", size, facts.num_tokens, facts.caption_length)
        self.feed = FeedForward("frames.feed", size, hidden)
        self.add("frames.pixels", (size, channels * height * width), (None, None))
        self.feed.declare(self)
        self.words.declare(self)
        for label, count in facts.num_labels.items():
            self.add(f"classes.{label}", (count, size), (None, None))
        self.graphs = {
            "retrieval": graph("frames words", "video text"),
            "recognition": graph("frames classes", "video"),
        }

    def pooled(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], scale: Any) -> Tensor:
        """Return the mean of the frames' features, [b, size]."""
        x = linear(params, "frames.pixels", batch["video"].flatten(-3))
        return self.feed(params, F.gelu(x), scale).mean(-2)

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses of tasks, see `VideoLanguageModel`."""
        video, found = self.pooled(params, batch, context.scale), Losses()
        if "recognition" in tasks:
            logits = {name: linear(params, f"classes.{name}", video) for name in self.labels}
            losses, has_any = label_losses(logits, batch)
            found["recognition"] = losses, batch["has_video"] * has_any
        if "retrieval" in tasks:
            weights = batch["has_video"] * batch["has_text"]
            same = (batch["caption"][:, None] == batch["caption"][None]).all(-1)
            pairs = F.normalize(video, dim=-1), self.text(params, batch)
            found["retrieval"] = contrastive(contrastive_logits(*pairs, same, weights > 0, 0.1)), weights
        return found

    def text(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean of the words of each caption, of length 1, [b, size]."""
        caption = batch["caption"]
        return F.normalize(mean_of(self.words(params, caption), caption != PAD), dim=-1)

    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return what the metrics of a task need, see `VideoLanguageModel`."""
        video = self.pooled(params, batch, 1.0)
        if task == "recognition":
            return {name: linear(params, f"classes.{name}", video) for name in self.labels}
        return {"video": F.normalize(video, dim=-1), "text": self.text(params, batch)}
