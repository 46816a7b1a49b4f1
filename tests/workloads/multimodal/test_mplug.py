"""mPLUG-2 in small: who needs which module, what a loss reaches, and sub-models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gossamer.errors import ConfigError, ContractError, GossamerError
from gossamer.submodel import Cutter
from gossamer.submodel.strategies import find_strategy
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import MODEL, SMALL, gradients, merged, modules, nudged, workload

SENSES = (("video+text", 0.5), ("text", 0.25), ("video", 0.25))


def client_with(made: VideoLanguage, name: str) -> int:
    """Return the first client of a holding."""
    number = [one.name for one in made.holdings].index(name)
    return int(np.flatnonzero(made.client_holdings(np.arange(made.num_clients)) == number)[0])


def test_it_keeps_the_contract() -> None:
    check_workload(workload(modalities=SENSES))


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
            (
                {"task_weights": (("retrieve", 1.0),)},
                "task_weights names 'retrieve', which is none of .* mean 'retrieval'",
            ),
            (
                {"tasks": ("captioning",), "task_weights": (("retrieval", 1.0),)},
                "'retrieval', which is none of captioning",
            ),
            ({"task_weights": (("retrieval", -1.0),)}, "retrieval = -1.0: input should be greater than or equal to 0"),
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
        """Says that clients hold what there is not."""

        def client_holdings(self, clients: Any) -> Any:
            """Return a number that no holding has."""
            return np.full(len(clients), 9, dtype=np.int16)

    with pytest.raises(ContractError, match=r"client_holdings returned .*: return a number from 0 to 0"):
        check_workload(Wrong({**SMALL, "tasks": ["recognition"]}, num_clients=2, partition="iid", seed=0))
