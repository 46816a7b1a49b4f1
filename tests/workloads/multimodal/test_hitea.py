"""HiTeA in small: short clips, moments and their words, relations of views; and the shuffling test."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.workloads.multimodal.clips import MASK, PAD
from gossamer.workloads.multimodal.hitea import HiTeAForward, short_clips
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import gradients, merged, nudged, with_model, workload


class TestShortClips:
    video = torch.arange(64 * 5).reshape(64, 5, 1, 1, 1).float()

    @pytest.mark.parametrize(("share", "length"), [(0.6, 3), (0.1, 1), (1.0, 5)])
    def test_frames_follow_one_another(self, share: float, length: int) -> None:
        clips = short_clips(self.video, torch.tensor(3), share)
        assert clips.shape == (64, length, 1, 1, 1)
        start = clips[:, 0, 0, 0, 0] - self.video[:, 0, 0, 0, 0]
        assert torch.equal(clips.flatten(1) - clips[:, :1].flatten(1), torch.arange(length).float().expand(64, -1))
        assert set(start.tolist()) == set(range(5 - length + 1))

    def test_the_key_decides(self) -> None:
        first, again, other = (short_clips(self.video, torch.tensor(key), 0.6) for key in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def pass_of(made: VideoLanguage) -> HiTeAForward:
    """Begin a forward pass of a batch whose clips all have another caption."""
    found = made.model.forward(nudged(made), merged(made))
    assert isinstance(found, HiTeAForward)
    return found


def test_moments_are_contrasted_with_the_words_that_suit_them() -> None:
    """By loops: the three most similar words of each caption, their mean, and cross entropies both ways."""
    made = with_model("hitea")
    forward = pass_of(made)
    caption = forward.batch["caption"]
    clip, chosen = forward.embedded("video", forward.short.mean(1)), []
    for i in range(8):
        words = forward.embedded("text", forward.caption[i][caption[i] > MASK])
        best = sorted(range(len(words)), key=lambda n, i=i, words=words: -float(words[n] @ clip[i]))[:3]
        chosen.append(F.normalize(words[best].mean(0), dim=0))
    logits = clip @ torch.stack(chosen).T / made.model.options.temperature
    same = (caption[:, None] == caption[None]).all(-1) & ~torch.eye(8).bool()
    logits = logits.masked_fill(same, -1e9)
    expected = sum(F.cross_entropy(x, torch.arange(8), reduction="none") for x in (logits, logits.T)) / 2
    torch.testing.assert_close(forward.moments()[0], expected, rtol=1e-4, atol=1e-4)


def test_relations_predict_the_other_view() -> None:
    """By hand: each view's prediction against the other's projection, of which no gradient is asked."""
    made = with_model("hitea", tasks=("relation-exploration",))
    forward = pass_of(made)
    caption = forward.batch["caption"]
    projected, predicted = [], []
    for visual in (forward.visual, forward.short):
        fused = forward.fused(caption, forward.caption, visual)
        pooled = torch.stack([one[place].mean(0) for one, place in zip(fused, caption != PAD, strict=True)])
        projected.append(made.model.projector(forward.params, pooled))
        predicted.append(made.model.predictor(forward.params, projected[-1]))
    similar = [F.cosine_similarity(predicted[i], projected[1 - i], dim=-1) for i in (0, 1)]
    torch.testing.assert_close(forward.relations()[0], -(similar[0] + similar[1]) / 2, rtol=1e-5, atol=1e-5)


def test_no_gradient_goes_through_targets() -> None:
    """With a predictor that tells the same of everything, what is projected cannot be moved."""
    made = with_model("hitea", tasks=("relation-exploration",))
    params = nudged(made)
    params["relation.predictor.contract.weight"] = torch.zeros_like(params["relation.predictor.contract.weight"])
    grads = gradients(made, params, merged(made))
    reached = {name for name, grad in grads.items() if grad is not None and bool(grad.any())}
    assert reached == {"relation.predictor.contract.weight", "relation.predictor.contract.bias"}


def metrics_of(made: VideoLanguage, params: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics of the test clips."""
    chunks = [made.evaluate(params, {}, chunk) for chunk in range(made.num_evaluation_chunks)]
    return made.metrics({name: np.sum([one[name] for one in chunks], axis=0) for name in chunks[0]})


def test_a_model_that_sees_no_order_has_no_drop() -> None:
    """The mean over frames stands against HiTeA, both as they start."""
    blind = workload(model="mean_pool:MeanPool", shuffles=5, evaluate=("recognition",))
    found = metrics_of(blind, nudged(blind))
    drops = {name: value for name, value in found.items() if name.endswith("_drop")}
    assert {"motion_accuracy_drop", "digit_accuracy_drop", "loss_drop"} <= set(drops)
    assert max(map(abs, drops.values())) < 1e-6
    seeing = with_model("hitea", shuffles=5, evaluate=("recognition",))
    assert abs(metrics_of(seeing, nudged(seeing))["loss_drop"]) > 1e-4
