"""Trajectory-to-word attention: frames do not mix in the first step, and one frame is plain attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import find_strategy
from gossamer.workloads.models import DeclaredModel
from gossamer.workloads.multimodal.blocks import glorot
from gossamer.workloads.multimodal.trajectories import TrajectoryToWord, fine_grained

BLOCK = TrajectoryToWord("cross", 12, 3, 4)
FRAMES, PLACES, WORDS = 5, 6, 4


@pytest.fixture(scope="module")
def params() -> dict[str, Tensor]:
    model = DeclaredModel()
    BLOCK.declare(model)
    drawn = glorot(model.shapes, np.random.default_rng(0))
    source = torch.Generator().manual_seed(0)
    return {name: value + 0.1 * torch.randn(value.shape, generator=source) for name, value in drawn.items()}


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(2, WORDS, 12, generator=source), torch.randn(2, FRAMES, PLACES, 12, generator=source)


def slow(params: dict[str, Tensor], words: Tensor, patches: Tensor) -> Tensor:
    """Return what the block does for one sample, as the formulas are written."""

    def apply(layer: str, x: Tensor, head: int) -> Tensor:
        rows = slice(head * 4, head * 4 + 4)
        return params[f"cross.{layer}.weight"][rows] @ x + params[f"cross.{layer}.bias"][rows]

    out = []
    for word in words:
        mixed = []
        for head in range(3):
            query, found = apply("query", word, head), []
            for frame in patches:
                scores = torch.stack([query @ apply("key", patch, head) / math.sqrt(4) for patch in frame])
                values = torch.stack([apply("value", patch, head) for patch in frame])
                found.append(scores.softmax(0) @ values)
            q, k, v = (params[f"cross.along-{layer}.weight"][head] for layer in ("query", "key", "value"))
            scores = torch.stack([(q @ query) @ (k @ y) / math.sqrt(4) for y in found])
            mixed.append(scores.softmax(0) @ torch.stack([v @ y for y in found]))
        out.append(params["cross.project.weight"] @ torch.cat(mixed) + params["cross.project.bias"])
    return torch.stack(out)


def test_it_is_what_the_formulas_say(params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    words, patches = inputs
    found = BLOCK(params, words, patches)
    expected = torch.stack([slow(params, *one) for one in zip(words, patches, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_shares_sum_to_one_in_each_frame(params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    _, shares = BLOCK.trajectories(params, *inputs)
    assert shares.shape == (2, 3, WORDS, FRAMES, PLACES)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, WORDS, FRAMES))


def test_a_frame_that_is_boosted_changes_its_own_trajectory_only(
    params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]
) -> None:
    words, patches = inputs
    boosted = patches.clone()
    boosted[:, 2] *= 7
    before, after = (BLOCK.trajectories(params, words, one)[0] for one in (patches, boosted))
    others = [frame for frame in range(FRAMES) if frame != 2]
    assert torch.equal(before[..., others, :], after[..., others, :])
    assert not torch.allclose(before[..., 2, :], after[..., 2, :])


def test_one_frame_is_one_attention_and_a_linear_map(params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    words, patches = inputs
    found, _ = BLOCK.trajectories(params, words, patches[:, :1])
    mapped = torch.einsum("hde,bhne->bnhd", params["cross.along-value.weight"], found[..., 0, :]).flatten(-2)
    expected = mapped @ params["cross.project.weight"].T + params["cross.project.bias"]
    torch.testing.assert_close(BLOCK(params, words, patches[:, :1]), expected, rtol=1e-5, atol=1e-5)


def test_it_runs_under_vmap_and_cut_by_heads(params: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    model = DeclaredModel()
    BLOCK.declare(model)
    layout = Layout.of(model.shapes, model.axes)
    row = layout.flatten(params)
    cut = Cutter(layout, find_strategy("rolling"), 1, 0).cut(0.67, 1, 0)
    sub = cut.sub.views(cut.read(row, torch.zeros(cut.sub.d)))
    masked = torch.zeros(layout.d)
    cut.write(masked, cut.read(row, torch.zeros(cut.sub.d)))
    torch.testing.assert_close(BLOCK(sub, *inputs), BLOCK(layout.views(masked), *inputs), rtol=1e-5, atol=1e-5)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
    both = torch.vmap(lambda own: BLOCK(own, *inputs))(stacked)
    torch.testing.assert_close(both[0], BLOCK(params, *inputs), rtol=1e-5, atol=1e-5)


def test_fine_grained_similarity() -> None:
    """The mean of the best match of each token, both ways, by loops; tokens that do not count have no say."""
    source = torch.Generator().manual_seed(2)
    first, second = torch.randn(3, 4, 5, generator=source), torch.randn(3, 6, 5, generator=source)
    some, others = torch.ones(3, 4).bool(), torch.ones(3, 6).bool()
    some[1, 2:], others[0, 4:] = False, False
    found = fine_grained(first, second, some, others)
    for i in range(3):
        for j in range(3):
            a, b = first[i][some[i]], second[j][others[j]]
            cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
            expected = (cosines.max(1).values.mean() + cosines.max(0).values.mean()) / 2
            torch.testing.assert_close(found[i, j], expected, rtol=1e-5, atol=1e-5)
