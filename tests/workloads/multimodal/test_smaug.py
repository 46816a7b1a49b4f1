"""SMAUG in small: masked pixels, kept patches and frames, and what they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.simulation.counting import count_step
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.multimodal.blocks import normalised
from gossamer.workloads.multimodal.smaug import SmaugForward
from gossamer.workloads.multimodal.sparse import drawn_order, put_back, share_of, strongest, taken
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import merged, nudged, with_model

DENSE = (("visual_mask_rate", 0.0), ("keep_patches", 1.0), ("keep_frames", 1.0))
TASKS = ("retrieval", "masked-language", "masked-video")


def passed(made: VideoLanguage, params: dict[str, Tensor], batch: dict[str, Any]) -> SmaugForward:
    """Return a forward pass of training."""
    return SmaugForward(made.model, params, batch, ForwardContext(key=batch["key"]))  # type: ignore[arg-type]


class TestMasking:
    def test_as_many_places_of_every_frame_are_seen_and_others_in_every_step(self) -> None:
        made = with_model("smaug", tasks=TASKS)
        first, second = (passed(made, nudged(made), merged(made) | {"key": torch.tensor(k)}).seen for k in (1, 2))
        assert first is not None
        assert second is not None
        assert first.shape == (8, 5, share_of(16, 0.4)) == (8, 5, 6)
        assert all(len(set(places)) == 6 for places in first.flatten(0, 1).tolist())
        assert not torch.equal(first, second)
        assert len({tuple(sorted(places)) for places in first.flatten(0, 1).tolist()}) > 30
        assert set(first.flatten().tolist()) == set(range(16))

    def test_masked_pixels_reach_nothing_but_the_target(self) -> None:
        """Noise on every masked pixel changes no bit of any loss and prediction, but of the error of pixels."""
        made = with_model("smaug", tasks=TASKS)
        params, batch = nudged(made), merged(made)
        forward = passed(made, params, batch)
        masked = torch.zeros(8, 5, 16, dtype=torch.bool).scatter(-1, forward.order[..., 6:], value=True)
        grid = masked.reshape(8, 5, 1, 4, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
        noise = torch.randn(batch["video"].shape, generator=torch.Generator().manual_seed(3))
        other = batch | {"video": torch.where(grid, batch["video"] + noise, batch["video"])}
        changed = passed(made, params, other)
        assert torch.equal(forward.frames[0], changed.frames[0])
        assert torch.equal(forward.reconstructed, changed.reconstructed)
        for task in ("retrieval", "masked-language"):
            assert torch.equal(forward.losses()[task]()[0], changed.losses()[task]()[0])
        assert not torch.equal(forward.masked_video()[0], changed.masked_video()[0])
        seen = batch | {"video": torch.where(grid, batch["video"], batch["video"] + noise)}
        assert not torch.equal(forward.reconstructed, passed(made, params, seen).reconstructed)

    def test_targets_are_normalised_patch_by_patch(self) -> None:
        """Against the patch cut out by hand."""
        made = with_model("smaug", tasks=TASKS)
        batch = merged(made)
        forward = passed(made, nudged(made), batch)
        for clip, frame, number in ((0, 0, 0), (3, 2, 4), (7, 4, 9)):
            row, column = divmod(int(forward.order[clip, frame, 6 + number]), 4)
            patch = batch["video"][clip, frame, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
            wanted = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            torch.testing.assert_close(forward.targets[clip, frame, number], wanted, rtol=1e-4, atol=1e-4)

    def test_metrics_are_of_whole_videos(self) -> None:
        made = with_model("smaug")
        batch, params = merged(made), nudged(made)
        first, second = (made.model.predict("retrieval", params, batch | {"key": torch.tensor(k)}) for k in (1, 2))
        assert torch.equal(first["video"], second["video"])
        found = made.metrics(made.evaluate(params, {}, 0))
        assert found == made.metrics(made.evaluate(params, {}, 0))
        assert found["loss_masked_video"] > 0

    def test_cls_is_half_of_what_is_compared_however_much_is_seen(self) -> None:
        """Frame by frame, of 6 places of 16 while training and of all of them in metrics."""
        made = with_model("smaug", tasks=TASKS)
        params, batch = nudged(made), merged(made)
        for training, count in ((True, 6), (False, 16)):
            context = ForwardContext(training=training, key=batch["key"])
            forward = SmaugForward(made.model, params, batch, context)  # type: ignore[arg-type]
            frames = forward.frames[0]
            assert frames.shape[2] == 1 + count
            for clip in range(8):
                halves = [one[0] / 2 + sum(one[1:]) / (2 * count) for one in frames[clip]]
                torch.testing.assert_close(forward.pooled()[clip], sum(halves) / 5, rtol=1e-4, atol=1e-5)

    def test_without_masks_there_is_nothing_to_reconstruct(self) -> None:
        with pytest.raises(ConfigError, match="names 'masked-video', which is none of"):
            with_model("smaug", model=DENSE, tasks=TASKS)


def dense(made: VideoLanguage, params: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return visual tokens and fused captions of a model that neither masks nor chooses, written plainly."""
    model: Any = made.model
    x = model.patches(params, batch["video"])
    x = torch.cat([params["vision.cls.weight"].expand(*x.shape[:2], 1, -1), x], dim=2)
    for layer in model.blocks:
        x = layer(params, x)
    x = torch.cat([model.time(params, x[:, :, 0])[:, :, None], x[:, :, 1:]], dim=2)
    visual = normalised(params, "vision.norm", x).flatten(1, 2)
    allowed, text = (batch["caption"] != 0)[:, None], model.tokens(params, batch["caption"])
    for layer in model.text:
        text = layer(params, text, allowed)
    text = normalised(params, "text.norm", text)
    for layer in model.fusion:
        text = layer(params, text, allowed, visual)
    return visual, normalised(params, "fusion.norm", text)


@pytest.mark.parametrize("select_by", ["cls", "text"])
def test_all_kept_and_nothing_masked_is_the_dense_model(select_by: str) -> None:
    made = with_model("smaug", model=(*DENSE, ("select_by", select_by)))
    params, batch = nudged(made), merged(made)
    forward = passed(made, params, batch)
    visual, fused = dense(made, params, batch)
    assert torch.equal(forward.visual, visual)
    assert torch.equal(forward.fused(batch["caption"], forward.caption, forward.visual), fused)


class TestChoice:
    @pytest.mark.parametrize("select_by", ["cls", "text"])
    def test_texts_see_few_patches_of_few_frames(self, select_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By counting what the first layer of fusion attends to: 3 frames of 5, and 1 + 3 of 6 patches of each."""
        made = with_model("smaug", model=(("select_by", select_by),))
        params, batch = nudged(made), merged(made)
        forward, sizes = passed(made, params, batch), list[int]()
        layer = type(made.model.fusion[0])
        whole = layer.__call__

        def watched(self: Any, params: Any, x: Tensor, allowed: Any, memory: Tensor, *args: Any, **more: Any) -> Tensor:
            """Note how much is attended to."""
            sizes.append(memory.shape[-2])
            return whole(self, params, x, allowed, memory, *args, **more)

        forward.visual  # noqa: B018
        caption = forward.caption
        monkeypatch.setattr(layer, "__call__", watched)
        forward.fused(batch["caption"], caption, forward.visual)
        assert sizes == [3 * (1 + 3)]

    def test_cls_keeps_what_it_attends_to_most(self) -> None:
        """Slowly, frame by frame, from the attention of the last layer."""
        made = with_model("smaug", model=(("visual_mask_rate", 0.0), ("keep_patches", 0.25)))
        params, batch = nudged(made), merged(made)
        forward = passed(made, params, batch)
        states, shares = forward.frames
        kept = forward.visual.unflatten(1, (5, -1))
        assert kept.shape[2] == 1 + 4
        for clip in range(8):
            for frame in range(5):
                best = sorted(shares[clip, frame].argsort(descending=True)[:4].tolist())
                wanted = [states[clip, frame, 0], *(states[clip, frame, 1 + place] for place in best)]
                assert torch.equal(kept[clip, frame], torch.stack(wanted))

    def test_which_frames_depends_on_the_text(self) -> None:
        """The same video with another text may lose other frames: the states of texts do not all attend alike."""
        made = with_model("smaug")
        params, batch = nudged(made, 5), merged(made)
        across, forward = made.model.fusion[0].across, passed(made, params, batch)
        first = forward.frames[0][:, :, 0]
        scores = [
            across.shares(params, forward.caption[[i] * 8, :1], first)[:, 0].topk(3).indices.sort().values
            for i in range(8)
        ]
        assert len({tuple(map(tuple, one.tolist())) for one in scores}) > 1


def test_a_full_step_is_at_least_1_9_times_as_cheap() -> None:
    """Dense against sparse, decoder of pixels included, in the FLOPs that runs are told."""

    def flops(tasks: tuple[str, ...], **model: Any) -> float:
        """Return the FLOPs of a step for each clip."""
        options: dict[str, Any] = {"dataset": {"name": "moving-digits", "num_train": 32, "num_pools": 1, "side": 24}}
        options |= {"model": {"name": "smaug", **model}, "tasks": tasks}
        made = VideoLanguage(options, num_clients=1, partition="iid", seed=0)
        found = count_step(made, made.layout, 16)
        assert not found.uncounted
        return found.flops_per_sample

    assert flops(TASKS[:2], **dict(DENSE)) >= 1.9 * flops(TASKS)
    assert flops(TASKS) > flops(TASKS[:2])  # the decoder is counted


class TestSequences:
    def test_what_is_put_back_is_where_it_was(self) -> None:
        order = drawn_order(torch.tensor(5), (2, 3, 7))
        x = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(put_back(taken(x, order), torch.zeros(4), order), x)
        some = put_back(taken(x, order[..., :3]), torch.full((4,), 9.0), order)
        for i in range(2):
            for j in range(3):
                for place in range(7):
                    is_held = place in order[i, j, :3].tolist()
                    assert torch.equal(some[i, j, place], x[i, j, place] if is_held else torch.full((4,), 9.0))

    def test_the_strongest_keep_their_order(self) -> None:
        x, scores = torch.arange(5.0)[:, None], torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3])
        assert strongest(x, scores, 3)[:, 0].tolist() == [1.0, 3.0, 4.0]
        assert strongest(x, scores, 5) is x

    @pytest.mark.parametrize(("count", "share", "wanted"), [(16, 0.4, 6), (5, 0.6, 3), (5, 0.01, 1), (7, 0.5, 4)])
    def test_shares(self, count: int, share: float, wanted: int) -> None:
        assert share_of(count, share) == wanted
