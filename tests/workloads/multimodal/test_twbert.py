"""TW-BERT in small: trajectories of words inside the model, and what retrieval learns by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.workloads.multimodal.blocks import Attention
from gossamer.workloads.multimodal.clips import MASK, PAD
from gossamer.workloads.multimodal.twbert import TwBertForward
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import merged, nudged, with_model


@pytest.fixture(scope="module")
def made() -> VideoLanguage:
    """Return a workload of the model."""
    return with_model("tw-bert")


def forward_of(made: VideoLanguage, frames: int | None = None) -> TwBertForward:
    """Begin a forward pass of a batch, of the first frames of its videos."""
    batch = merged(made)
    found = made.model.forward(nudged(made), batch | {"video": batch["video"][:, :frames]})
    assert isinstance(found, TwBertForward)
    return found


def met(forward: TwBertForward) -> tuple[Tensor, Tensor]:
    """Return what asks for trajectories, [b, n, size], and the patches [b, frames, places, size] in the first layer."""
    (layer, *_), allowed = forward.model.crossing, (forward.batch["caption"] != PAD)[..., None, :]
    patches = layer.met(forward.params, forward.caption, forward.framed(forward.visual), allowed)
    return layer.asked(forward.params, forward.caption, allowed)[1], patches


def test_shares_of_patches_sum_to_one_in_each_frame(made: VideoLanguage) -> None:
    shares = forward_of(made).shares(merged(made)["caption"])
    assert shares.shape == (8, 4, made.data.train.caption.shape[1], 5, 16)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))
    assert float(shares.std()) > 1e-3


def test_a_frame_that_is_boosted_changes_its_own_trajectory_only(made: VideoLanguage) -> None:
    forward = forward_of(made)
    block, (asking, patches) = forward.model.crossing[0].trajectory_to_word, met(forward)
    boosted = patches.clone()
    boosted[:, 3] *= 5
    before, after = (block.trajectories(forward.params, asking, one)[0] for one in (patches, boosted))
    assert torch.equal(before[..., [0, 1, 2, 4], :], after[..., [0, 1, 2, 4], :])
    assert not torch.allclose(before[..., 3, :], after[..., 3, :])


def test_of_one_frame_it_is_plain_attention_and_a_linear_map(made: VideoLanguage) -> None:
    """Attention to the frame, with the second value projection of each head multiplied into the output's."""
    forward = forward_of(made, frames=1)
    block, (asking, patches) = forward.model.crossing[0].trajectory_to_word, met(forward)
    along = torch.block_diag(*forward.params[f"{block.name}.along-value.weight"])
    project = forward.params[f"{block.name}.project.weight"] @ along
    params = {**forward.params, f"{block.name}.project.weight": project}
    plain = Attention(block.name, block.size, block.num_heads, block.head_dim)
    expected = plain(params, asking, patches.flatten(1, 2))
    torch.testing.assert_close(block(forward.params, asking, patches), expected, rtol=1e-5, atol=1e-5)


def test_patches_attend_to_all_words_and_to_nothing_else(made: VideoLanguage) -> None:
    """What stands in a word's place moves the patches of every frame; what stands in padding moves none."""
    forward = forward_of(made)
    words, allowed = forward.caption, (forward.batch["caption"] != PAD)[..., None, :].clone()
    allowed[..., -1] = False
    layer, patches = forward.model.crossing[0], forward.framed(forward.visual)
    before = layer.met(forward.params, words, patches, allowed)
    for place, moves in ((2, True), (-1, False)):
        other = words.clone()
        other[:, place] += 1
        moved = (layer.met(forward.params, other, patches, allowed) - before).abs().amax((2, 3)) > 1e-6
        assert bool(moved.all()) if moves else not bool(moved.any())


def test_retrieval_is_the_sum_of_its_losses() -> None:
    """Contrastive losses of whole clips and of their tokens, as loops; captions that are alike are no negatives."""
    made = with_model("tw-bert", model=(("matching", False),))
    forward = forward_of(made)
    caption, temperature = forward.batch["caption"], made.model.options.temperature
    patches, words = forward.embedded("video", forward.visual), forward.embedded("text", forward.caption)
    whole, fine = torch.full((8, 8), -1e9), torch.full((8, 8), -1e9)
    for i in range(8):
        for j in range(8):
            if i != j and torch.equal(caption[i], caption[j]):
                continue
            cosines = patches[i] @ words[j][caption[j] > MASK].T
            fine[i, j] = (cosines.amax(1).mean() + cosines.amax(0).mean()) / 2 / temperature
            whole[i, j] = forward.video_embedding[i] @ forward.text_embedding[j] / temperature
    both = [F.cross_entropy(x, torch.arange(8), reduction="none") for x in (whole, whole.T, fine, fine.T)]
    losses, weights = forward.retrieval()
    torch.testing.assert_close(losses, torch.stack(both).sum(0) / 2, rtol=1e-4, atol=1e-4)
    assert bool((weights == 1).all())


def test_a_decoder_that_it_lacks_has_no_layers() -> None:
    with pytest.raises(ConfigError, match="decoder_layers"):
        with_model("tw-bert", model=(("decoder_layers", 2),))
