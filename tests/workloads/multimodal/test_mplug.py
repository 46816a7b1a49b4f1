"""mPLUG-2 in small: who needs which module, what a loss reaches, and sub-models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigError, ContractError, GossamerError
from gossamer.submodel import Cutter
from gossamer.submodel.cut import Cut
from gossamer.submodel.strategies import find_strategy
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import MODEL, SMALL, gradients, merged, nudged, workload

SENSES = (("video+text", 0.5), ("text", 0.25), ("video", 0.25))
HEADS = [{**MODEL, "cut": "heads"}, {**MODEL, "cut": "head-dim"}]


def client_with(made: VideoLanguage, name: str) -> int:
    """Return the first client of a holding."""
    number = [one.name for one in made.holdings].index(name)
    return int(np.flatnonzero(made.client_holdings(np.arange(made.num_clients)) == number)[0])


def modules(grads: Mapping[str, Tensor | None]) -> set[str]:
    """Return the modules that a gradient reaches."""
    return {name.partition(".")[0] for name, grad in grads.items() if grad is not None and bool(grad.any())}


@pytest.mark.parametrize("senses", [(("video+text", 1.0),), SENSES])
def test_it_keeps_the_contract(senses: Any) -> None:
    check_workload(workload(modalities=senses))


class TestGraphs:
    def test_a_captioning_client_holds_neither_text_encoder_nor_fusion(self) -> None:
        made = workload(client_tasks=(("captioning", 0.5), ("question-answering+retrieval", 0.5)))
        held = {one.name: one.modules for one in made.holdings}
        assert held["video+text: captioning"] == {"vision", "universal", "latents", "decoder"}
        assert held["video+text: question-answering+retrieval"] >= {"text", "fusion", "contrast", "decoder"}
        batch = merged(made, client_with(made, "video+text: captioning"))
        names = [name for name in made.layout.names if name.partition(".")[0] in held["video+text: captioning"]]
        params = {name: value for name, value in nudged(made).items() if name in names}
        assert torch.isfinite(made.loss(params, batch))

    def test_every_module_that_is_held_is_trained(self) -> None:
        for task in ("retrieval", "question-answering", "captioning", "masked-language", "recognition"):
            made = workload(tasks=(task,))
            grads = gradients(made, nudged(made), merged(made))
            assert modules(grads) == made.holdings[0].modules, task

    def test_text_reaches_the_universal_layers_and_nothing_visual(self) -> None:
        made = workload(tasks=("masked-language",))
        grads = gradients(made, nudged(made), merged(made))
        assert modules(grads) == {"text", "universal"}
        reached = {name for name, grad in grads.items() if grad is not None and bool(grad.any())}
        for layer in ("layer0", "layer1"):
            assert {f"universal.{layer}.attention.query.weight", f"universal.{layer}.feed.expand.weight"} <= reached

    def test_matching_learns_through_fusion(self) -> None:
        made = workload(tasks=("retrieval",), model=tuple((MODEL | {"matching": True}).items()))
        grads = gradients(made, nudged(made), merged(made))
        assert {"fusion", "matching"} <= modules(grads)

    def test_who_can_do_no_task_is_named(self) -> None:
        with pytest.raises(
            ConfigError, match=r"client \d has (video|text) and would do retrieval, none of which it can do"
        ):
            workload(tasks=("retrieval",), modalities=SENSES)


class TestMissing:
    @pytest.mark.parametrize("absent", ["video", "text"])
    def test_a_batch_without_a_modality_gives_its_encoder_no_gradient(self, absent: str) -> None:
        made = workload(tasks=("retrieval", "question-answering", "captioning", "masked-language", "recognition"))
        batch = merged(made)
        batch[f"has_{absent}"] = torch.zeros_like(batch[f"has_{absent}"])
        for name in ("video",) if absent == "video" else ("caption", "question"):
            batch[name] = torch.zeros_like(batch[name])
        leaves = nudged(made)
        loss, grads = made.loss(leaves, batch), gradients(made, leaves, batch)
        assert torch.isfinite(loss)
        assert all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads.values())
        encoder = {"video": {"vision", "latents"}, "text": {"text", "contrast", "fusion", "decoder"}}[absent]
        assert not encoder & modules(grads)
        assert "universal" in modules(grads)

    def test_samples_that_lack_a_modality_change_nothing(self) -> None:
        """What stands in the place of what is missing has no effect on the loss."""
        made = workload(tasks=("retrieval", "captioning"))
        batch = merged(made)
        batch["has_text"] = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
        other = dict(batch, caption=batch["caption"].clone())
        other["caption"][1], other["caption"][4] = batch["caption"][0], batch["caption"][2]
        params = nudged(made)
        assert torch.allclose(made.loss(params, batch), made.loss(params, other), rtol=1e-6)

    def test_rates(self) -> None:
        made = workload(missing=(("train", 0.5),), num_clients=1)
        batch = made.batch(np.array([0]), np.arange(120)[None])
        for name in ("has_video", "has_text"):
            assert 0.3 < float(batch.samples[name].mean()) < 0.7
        blank = batch.samples["has_video"][0] == 0
        assert bool((batch.samples["video"][0][blank] == 0).all())
        assert bool((batch.samples["caption"][0][batch.samples["has_text"][0] == 0] == 0).all())


def masked_complement(full: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """Return the whole model in which everything outside a cut is 0."""
    kept = {name: torch.zeros_like(value) for name, value in full.items()}
    for piece in cut.pieces:
        sub = torch.empty(cut.sub.shapes[cut.sub.names.index(piece.name)])
        piece.read(full[piece.name], sub)
        piece.write(kept[piece.name], sub)
    return kept


@pytest.mark.parametrize("model", HEADS, ids=["heads", "head-dim"])
@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_a_sub_model_is_the_masked_whole_one(model: dict[str, Any], capacity: float) -> None:
    made = workload(model=tuple(model.items()))
    full = nudged(made)
    cut = Cutter(made.layout, find_strategy("rolling"), 1, 0).cut(capacity, 3, 0)
    row = made.layout.flatten(full)
    sub = cut.sub.views(cut.read(row, torch.zeros(cut.sub.d)))
    assert (cut.sub.num_parameters < made.layout.num_parameters) == (capacity < 1)
    batch = merged(made)
    expected = full if capacity == 1 else masked_complement(full, cut)
    torch.testing.assert_close(made.loss(sub, batch), made.loss(expected, batch), rtol=1e-5, atol=1e-5)
    for task in made.tasks:
        found, wanted = (made.model.predict(task, params, batch) for params in (sub, expected))
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


def test_axes_of_universal_layers_are_the_same_for_all_modalities() -> None:
    """A window of an axis does not depend on the modules that somebody holds."""
    made = workload(modalities=SENSES)
    cutter = Cutter(made.layout, find_strategy("rolling"), 1, 0)
    cuts = [cutter.cut(0.5, 2, 0, None, one.modules) for one in made.holdings]
    shared = [axis for axis in made.layout.cut_axes if axis.startswith("universal.")]
    assert shared
    for axis in shared:
        assert len({cut.windows[axis].segments for cut in cuts}) == 1
    assert all("universal" in cut.sub.modules for cut in cuts)


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": ("retrieve",)}, "names 'retrieve', which is none of retrieval"),
            ({"modalities": (("sound", 1.0),)}, "the modality 'sound'"),
            ({"modalities": (("video", 0.5),)}, "sum to 0.5"),
            ({"model": (("name", "mplug-2"), ("patch", 5))}, "does not divide frames of 16 x 16"),
            ({"model": (("name", "mplug-2"), ("num_heads", 5))}, "cannot be divided among num_heads 5"),
            ({"dataset": (("name", "moving-digits"), ("num_steps", 5))}, "leaves a frame of 16"),
        ],
    )
    def test_they_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(GossamerError, match=message):
            workload(**options)


def test_the_contract_notices_modules_that_nobody_has() -> None:
    class Wrong(VideoLanguage):
        def client_holdings(self, clients: Any) -> Any:
            return np.full(len(clients), 9, dtype=np.int16)

    with pytest.raises(ContractError, match=r"client_holdings returned .*: return a number from 0 to 0"):
        check_workload(Wrong({**SMALL, "tasks": ["recognition"]}, num_clients=2, partition="iid", seed=0))
