"""What every model of videos and texts does: modules, sub-models, missing modalities, and equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from federation import digest
from gossamer.submodel import Cutter
from gossamer.submodel.cut import Cut
from gossamer.submodel.strategies import find_strategy
from gossamer.testing import check_workload
from video_language import MODELS, SMALL, gradients, merged, modules, nudged, with_model

FROZEN = {("anchor-captioner", "captioning"): {"text", "contrast"}}  # held, but not trained by this task
ENCODERS = {  # modules that a modality alone reaches, and that lose their gradient with it
    "mplug-2": {"video": {"vision", "latents"}, "text": {"text", "contrast", "fusion", "decoder"}},
    "tw-bert": {"video": {"vision", "fusion", "recognition"}, "text": {"text", "contrast", "fusion", "answer"}},
    "hitea": {
        "video": {"vision", "fusion", "relation", "recognition"},
        "text": {"text", "contrast", "fusion", "relation", "decoder"},
    },
    "anchor-captioner": {"video": {"vision", "recognition"}, "text": {"text", "contrast", "prefix", "decoder"}},
    "smaug": {"video": {"vision", "reconstruction"}, "text": {"text", "contrast", "fusion", "decoder"}},
}
every_model = pytest.mark.parametrize("name", list(MODELS))


@pytest.mark.sweep(keep=0.4)
@every_model
def test_it_keeps_the_contract(name: str) -> None:
    check_workload(with_model(name))


@pytest.mark.sweep(keep=0.4)
@every_model
def test_every_module_that_is_held_is_trained(name: str) -> None:
    for task in with_model(name).tasks:
        made = with_model(name, tasks=(task,))
        trained = modules(gradients(made, nudged(made), merged(made)))
        assert trained == made.holdings[0].modules - FROZEN.get((name, task), set()), task


@pytest.mark.sweep(keep=0.4)
@every_model
@pytest.mark.parametrize("absent", ["video", "text"])
def test_a_batch_without_a_modality_gives_its_encoder_no_gradient(name: str, absent: str) -> None:
    made = with_model(name)
    batch = merged(made)
    batch[f"has_{absent}"] = torch.zeros_like(batch[f"has_{absent}"])
    for what in ("video",) if absent == "video" else ("caption", "question"):
        batch[what] = torch.zeros_like(batch[what])
    leaves = nudged(made)
    loss, grads = made.loss(leaves, batch), gradients(made, leaves, batch)
    assert torch.isfinite(loss)
    assert all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert not ENCODERS[name][absent] & modules(grads)
    if absent == "text":
        assert "vision" in modules(grads)


def masked_complement(full: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """Return the whole model in which everything outside a cut is 0."""
    kept = {name: torch.zeros_like(value) for name, value in full.items()}
    for piece in cut.pieces:
        sub = torch.empty(cut.sub.shapes[cut.sub.names.index(piece.name)])
        piece.read(full[piece.name], sub)
        piece.write(kept[piece.name], sub)
    return kept


@pytest.mark.sweep(keep=0.4)
@every_model
@pytest.mark.parametrize("what", ["heads", "head-dim"])
@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_a_sub_model_is_the_masked_whole_one(name: str, what: str, capacity: float) -> None:
    made = with_model(name, model=(("cut", what),))
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
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.sweep(keep=0.4)
@every_model
@pytest.mark.parametrize("what", ["heads", "head-dim"])
def test_a_narrow_model_has_the_shapes_of_a_sub_model(name: str, what: str) -> None:
    made, narrow = (with_model(name, model=(("cut", what), ("width", width))) for width in (1.0, 0.5))
    cut = Cutter(made.layout, find_strategy("static"), 1, 0).cut(0.5, 0, 0)
    shapes = [dict(zip(one.names, one.shapes, strict=True)) for one in (narrow.layout, cut.sub)]
    assert shapes[0] == shapes[1]
    assert torch.isfinite(narrow.loss(nudged(narrow), merged(narrow)))


@pytest.mark.parametrize("name", ["mplug-2", "tw-bert", "hitea"])
def test_what_stands_where_something_is_missing_has_no_effect(name: str) -> None:
    made = with_model(name)
    batch = merged(made)
    batch["has_video"], batch["has_text"] = torch.ones(8), torch.ones(8)
    batch["has_video"][2], batch["has_text"][5] = 0, 0
    other = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
    other["video"][2] = batch["video"][0] + 1
    other["caption"][5], other["question"][5] = batch["caption"][0], batch["question"][0].flip(0)
    params = nudged(made)
    assert not torch.equal(batch["caption"][5], other["caption"][5])
    torch.testing.assert_close(made.loss(params, other), made.loss(params, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.sweep(keep=0.4)
@every_model
def test_stacked_clients_are_trained_as_one_by_one(name: str) -> None:
    """The gradients of two clients under `torch.vmap` are those of each by itself."""
    made = with_model(name)
    rows = [merged(made, client) for client in (0, 1)]
    keys = [key for key, value in rows[0].items() if isinstance(value, Tensor)]
    leaves = nudged(made)

    def gradient(batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the gradient of the loss of one client."""
        return torch.func.grad(lambda params: made.loss(params, batch | {"scale": 1.0}))(leaves)

    stacked = torch.vmap(gradient)({key: torch.stack([row[key] for row in rows]) for key in keys})
    for number, row in enumerate(rows):
        for key, value in gradient({key: row[key] for key in keys}).items():
            torch.testing.assert_close(stacked[key][number], value, rtol=1e-4, atol=1e-5)


@every_model
def test_clients_in_one_call_are_trained_as_one_by_one(name: str) -> None:
    """Without `torch.vmap`: losses and gradients of three clients of unequal parameters, in a tolerance of 1e-5."""
    made = with_model(name)
    assert made.traits.stacks_natively
    rows, models = [merged(made, client) for client in (0, 1, 2)], [nudged(made, seed) for seed in (1, 2, 3)]
    batch = {
        key: torch.stack([row[key] for row in rows]) for key, value in rows[0].items() if isinstance(value, Tensor)
    }
    leaves = {key: torch.stack([model[key].detach() for model in models]).requires_grad_() for key in models[0]}
    losses = made.loss(leaves, batch | {"scale": 1.0})
    grads = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True), strict=True))
    for number, (row, model) in enumerate(zip(rows, models, strict=True)):
        torch.testing.assert_close(losses[number], made.loss(model, row), rtol=1e-5, atol=1e-5)
        for key, value in gradients(made, model, row).items():
            found = grads[key]
            assert (found is None) == (value is None)
            if found is not None:
                torch.testing.assert_close(found[number], value, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep(keep=0.4)
@every_model
def test_workers_change_no_bits(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {
        "rounds": 2,
        "workload": {"name": "video-language", **SMALL, "model": MODELS[name]},
        "clients": {"num": 4, "per_round": 4},
        "train": {"lr": 1e-3, "batch_size": 8, "steps": 1, "optimizer": {"name": "adam"}},
        "algorithm": "fedrolex",
        "submodel": {"capacities": [0.5, 1.0]},
    }
    runs = [
        gossamer.run(given | {"engine": {"name": "local", "workers": workers}}, out=tmp_path / str(workers))
        for workers in (0, 2)
    ]
    assert len({digest(run.params) for run in runs}) == 1
