"""The cross-modal language model: trained on text alone, asked about videos."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigError, GossamerError
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.multimodal.anchors import AnchorForward
from gossamer.workloads.multimodal.clips import BEGIN, DIGITS, END, PAD
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import gradients, merged, modules, nudged, with_model

NAME = "anchor-captioner"


def passed(made: VideoLanguage, params: dict[str, Tensor], batch: dict[str, Any]) -> AnchorForward:
    """Return a forward pass of training."""
    return AnchorForward(made.model, params, batch, ForwardContext(key=batch["key"]))  # type: ignore[arg-type]


class TestTextAlone:
    def test_poisoned_videos_change_no_bit(self) -> None:
        """With pixels and labels of no number at all, the loss and every gradient are what they were."""
        made = with_model(NAME, tasks=("captioning",))
        params, batch = nudged(made), merged(made)
        poisoned = batch | {
            "video": torch.full_like(batch["video"], torch.nan),
            "has_video": torch.tensor([torch.nan] * 8),
        }
        assert torch.isfinite(made.loss(params, poisoned))
        assert torch.equal(made.loss(params, batch), made.loss(params, poisoned))
        for name, grad in gradients(made, params, batch).items():
            other = gradients(made, params, poisoned)[name]
            assert (grad is None and other is None) or torch.equal(grad, other), name  # type: ignore[arg-type]

    def test_clients_of_text_have_no_video_and_train_the_language_model(self) -> None:
        """The dual encoder gets no gradient from captions, so what aligns it is left as it is."""
        made = with_model(NAME, tasks=("captioning",), modalities=(("text", 1.0),))
        batch = merged(made)
        assert "video" not in batch
        assert made.holdings[0].modules == {"text", "contrast", "prefix", "decoder"}
        assert modules(gradients(made, nudged(made), batch)) == {"prefix", "decoder"}

    def test_clients_divide_the_work(self) -> None:
        """Those of text train the language model, those of pairs the dual encoder, those of videos the classes."""
        made = with_model(
            NAME,
            8,
            tasks=("retrieval", "recognition", "captioning"),
            modalities=(("video+text", 0.5), ("text", 0.25), ("video", 0.25)),
        )
        held = {one.name: one.modules for one in made.holdings}
        assert held["text"] == {"text", "contrast", "prefix", "decoder"}
        assert held["video"] == {"vision", "recognition"}


class TestAnchors:
    def test_they_are_the_nouns_of_a_caption(self) -> None:
        made = with_model(NAME, model=(("anchor_drop", 0.0),))
        batch = merged(made)
        forward = passed(made, nudged(made), batch)
        assert [made.data.vocabulary[token] for token in forward.model.nouns] == list(DIGITS)
        for caption, named in zip(batch["caption"], forward.named, strict=True):
            words = made.data.words(caption).split()
            assert [name for name, is_in in zip(DIGITS, named.tolist(), strict=True) if is_in] == [words[1]]

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_they_are_dropped_with_a_probability(self, share: float) -> None:
        made = with_model(NAME, model=(("anchor_drop", share),))
        params, batch = nudged(made), merged(made)
        kept = [
            float(passed(made, params, batch | {"key": torch.tensor(key)}).named.sum(-1).float().mean())
            for key in range(40)
        ]
        assert np.mean(kept) == pytest.approx(1 - share, abs=0.1)

    def test_their_mean_is_that_of_embeddings_of_words(self) -> None:
        """Slowly: each word as a text of its own; two anchors, one, and none, which leaves 0."""
        made = with_model(NAME)
        params, batch = nudged(made), merged(made)
        forward = passed(made, params, batch)
        each = []
        for token in forward.model.nouns:
            text = torch.tensor([[BEGIN, token, END]])
            states = forward.textual(text)[0].mean(0)
            out = params["contrast.text.weight"] @ states + params["contrast.text.bias"]
            each.append(out / out.norm())
        torch.testing.assert_close(forward.nouns, torch.stack(each))
        named = torch.zeros(3, 10, dtype=torch.bool)
        named[0, 2] = named[0, 7] = named[1, 4] = True
        means = torch.stack([(each[2] + each[7]) / 2, each[4], torch.zeros_like(each[0])])
        embedding = torch.nn.functional.normalize(
            torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        hidden = torch.cat([embedding, means], 1) @ params["prefix.expand.weight"].T + params["prefix.expand.bias"]
        out = torch.nn.functional.gelu(hidden) @ params["prefix.contract.weight"].T + params["prefix.contract.bias"]
        torch.testing.assert_close(forward.prefix(embedding, named), out.reshape(3, 2, 16))

    @pytest.mark.parametrize("kind", ["recognised", "given", "off"])
    def test_what_stands_in_their_place(self, kind: str) -> None:
        made = with_model(NAME, model=(("anchors", kind),))
        batch = merged(made)
        forward = passed(made, nudged(made), batch)
        wanted = {
            "recognised": forward.label_logits("digit").argmax(-1),
            "given": batch["digit"],
            "off": None,
        }[kind]
        assert forward.shown.sum(-1).tolist() == [0 if wanted is None else 1] * 8
        if wanted is not None:
            assert torch.equal(forward.shown.float().argmax(-1), wanted)

    def test_data_without_names_of_classes_are_refused(self) -> None:
        made = with_model(NAME)
        facts = made.blueprint().facts | {"label_words": {}}
        with pytest.raises(ConfigError, match=r"needs words that name classes.*set it to 'off'"):
            VideoLanguage.build_model({"model": NAME}, facts, 0)
        model = VideoLanguage.build_model({"model": {"name": NAME, "anchors": "off"}}, facts, 0)
        assert model.nouns == ()

    @pytest.mark.parametrize(("name", "value"), [("matching", True), ("fusion_layers", 1)])
    def test_there_is_no_fusion(self, name: str, value: Any) -> None:
        with pytest.raises(GossamerError, match=f"{name}"):
            with_model(NAME, model=((name, value),))


@cache
def trained() -> dict[str, Tensor]:
    """Return parameters after some steps of Adam on all tasks but masked language modelling, by one client."""
    made = with_model(NAME, 1, tasks=("retrieval", "recognition", "captioning"))
    leaves = {name: value.requires_grad_() for name, value in nudged(made).items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.01)
    for step in range(60):
        batch = merged(made, count=40) | {"key": torch.tensor(step)}
        optimizer.zero_grad()
        made.loss(leaves, batch).backward()
        optimizer.step()
    return {name: value.detach() for name, value in leaves.items()}


class TestCaptions:
    @pytest.mark.parametrize("kind", ["recognised", "given", "off"])
    def test_other_videos_have_other_captions(self, kind: str) -> None:
        """With all texts fixed, swapping videos swaps captions; they go on with anchors off."""
        made, params = with_model(NAME, 1, model=(("anchors", kind),)), trained()
        batch = merged(made, count=24)
        order = torch.arange(24).roll(1)
        moved = batch | {name: batch[name][order] for name in ("video", "digit", "motion")}
        found, other = (made.model.predict("captioning", params, one)["tokens"] for one in (batch, moved))
        assert torch.equal(found[order], other)
        assert len({tuple(row) for row in found.tolist()}) > 4
        for row in found:
            words = made.data.words(row).split()
            assert words[0] == "a"
            assert words[2] == "moves"

    def test_they_begin_and_end(self) -> None:
        made = with_model(NAME)
        found = made.model.predict("captioning", nudged(made), merged(made))["tokens"]
        assert found.shape == (8, made.data.train.caption.shape[1])
        for row in found.tolist():
            assert row[0] == BEGIN
            ends = [place for place, token in enumerate(row) if token in (END, PAD)]
            assert not ends or all(token == PAD for token in row[ends[0] + 1 :])

    def test_without_vision_nothing_is_captioned(self) -> None:
        """A participant of text alone measures what it can: no caption of a video."""
        made = with_model(NAME)
        params = {n: v for n, v in nudged(made).items() if not n.startswith(("vision", "recognition"))}
        found = made.metrics(made.evaluate(params, {}, 0))
        assert "cider_d" not in found
        assert "loss_masked_language" in found
