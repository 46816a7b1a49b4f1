"""Mixtures of experts: against a loop over tokens, and sub-models that hold whole experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import SINGLY, STACKED, assert_same, configure, modes, relative_error
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import rolling
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.text import NextCharacter
from gossamer.workloads.transformer import Transformer

SIZES = {"stream": 8, "num_heads": 2, "num_blocks": 2, "hidden": 6}
MODEL = {"name": "transformer", **SIZES, "experts": 4}
TEXT = {"name": "next-character", "dataset": "synthetic", "context": 8, "model": MODEL}
LEVELS = [0.5, 1.0]


def mixture(**options: Any) -> Transformer:
    """Return a transformer of four experts, with options."""
    return Transformer(7, 5, **SIZES, **{"experts": 4, **options})


def params_of(model: Transformer, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters of which none is what it starts as."""
    torch.manual_seed(seed)
    drawn = model.init(np.random.default_rng(seed))
    return {name: value + 0.3 * torch.randn(value.shape) for name, value in drawn.items()}


def characters(count: int = 3) -> Tensor:
    """Return characters int64 [count, 7], drawn."""
    return torch.from_numpy(np.random.default_rng(1).integers(5, size=(count, 7)))


def slow_mixture(params: dict[str, Tensor], block: str, token: Tensor, held: list[int], top: int) -> Tensor:
    """Return what the best `top` of the experts `held` make of one token [stream]."""
    logits = {e: float(params[f"{block}.router.weight"][e] @ token) for e in held}
    best = sorted(held, key=lambda e: -logits[e])[:top]
    total = sum(np.exp(logits[e]) for e in best)
    found, size = params[f"{block}.contract.bias"].clone(), SIZES["hidden"]
    for expert in best:
        rows = slice(expert * size, (expert + 1) * size)
        hidden = F.gelu(params[f"{block}.expand.weight"][rows] @ token + params[f"{block}.expand.bias"][rows])
        found += float(np.exp(logits[expert]) / total) * (params[f"{block}.contract.weight"][:, rows] @ hidden)
    return found


@pytest.mark.parametrize("top", [1, 2, 4])
def test_against_a_loop(top: int) -> None:
    model = mixture(top_experts=top)
    params, x = params_of(model), torch.randn(2, 7, 8)
    for block in model.blocks:
        found = model._feed_forward(params, block, x, ForwardContext())
        for row in range(2):
            for place in range(7):
                expected = slow_mixture(params, block, x[row, place], [0, 1, 2, 3], top)
                assert torch.allclose(found[row, place], expected, atol=1e-5)


def test_imbalance() -> None:
    """1 where all experts are alike, the number of experts where one gets everything; of each sample by itself."""
    model, x = mixture(top_experts=1), torch.ones(2, 7, 8)
    router = torch.zeros(4, 8)
    router[2] = 100.0
    gates, imbalance = model._routed(router, x)
    assert torch.allclose(imbalance, torch.full((2,), 4.0))
    assert torch.equal(gates.argmax(-1), torch.full((2, 7), 2))
    _, even = mixture(top_experts=4)._routed(torch.zeros(4, 8), x)
    assert torch.allclose(even, torch.ones(2))
    terms = dict[str, Tensor]()
    model.apply(params_of(model), characters(), ForwardContext(terms=terms))
    assert [*terms] == ["block0.balance", "block1.balance"]
    assert all(term.shape == (3,) for term in terms.values())


@pytest.mark.parametrize("round", [0, 1, 3])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_a_sub_model_is_the_whole_one_whose_router_knows_its_experts_alone(round: int, top: int) -> None:
    model = mixture(top_experts=top)
    layout = Layout.of(model.shapes, model.axes)
    cut = Cutter(layout, rolling, 1, 0).cut(0.5, round, 0)
    params = params_of(model)
    row, is_held = layout.flatten(params), torch.zeros(layout.d, dtype=torch.bool)
    cut.write(is_held, torch.ones(cut.sub.d, dtype=torch.bool))
    sub = cut.sub.views(cut.read(row, row.new_zeros(cut.sub.d)))
    whole = layout.views(is_held)
    for block in model.blocks:
        held = [e for e in range(4) if whole[f"{block}.router.weight"][e].all()]
        assert len(held) == 2
        for name, along in (("expand.weight", 0), ("contract.weight", 1)):  # never part of an expert
            parts = whole[f"{block}.{name}"].movedim(along, 0).unflatten(0, (4, -1)).flatten(1)
            assert [bool(part.all()) for part in parts] == [bool(part.any()) for part in parts]
            assert [bool(part.all()) for part in parts] == [e in held for e in range(4)]
        x = torch.randn(1, 3, 8)
        found = model._feed_forward(sub, block, x, ForwardContext(scale=2.0))  # the scaler changes nothing of it
        for place in range(3):
            expected = slow_mixture(params, block, x[0, place], held, top)
            assert torch.allclose(found[0, place], expected, atol=1e-5)
    assert model.apply(sub, characters()).shape == (3, 7, 5)


def test_a_width_has_the_shapes_of_the_sub_model() -> None:
    whole, narrow = (mixture(width=width) for width in (1.0, 0.5))
    cut = Layout.of(whole.shapes, whole.axes).cut(0.5)
    assert dict(zip(cut.names, cut.shapes, strict=True)) == narrow.shapes


def federation(out: Path, changes: dict[str, Any] | None = None) -> Any:
    """Run two rounds of clients that hold two or four of four experts."""
    given = {"workload": TEXT, "rounds": 2, "train": {"lr": 0.1, "batch_size": 8, "steps": 2}}
    rolling = {"algorithm": "fedrolex", "submodel": {"capacities": LEVELS}} | modes(LEVELS, **SINGLY)
    return run(configure(given | rolling | (changes or {})), out=out)


def test_bits_do_not_depend_on_workers_and_hardly_on_modes(tmp_path: Path) -> None:
    done = federation(tmp_path / "one")
    assert_same(federation(tmp_path / "two", {"engine.workers": 2, "engine.block_size": 1}), done)
    stacked = federation(tmp_path / "stacked", modes(LEVELS, **STACKED))
    assert relative_error(stacked.params, done.params) < 1e-4


def test_experts_that_nobody_held_keep_their_bits(tmp_path: Path) -> None:
    static = {"algorithm": "heterofl", "submodel": {"capacities": [0.5]}} | modes([0.5], **SINGLY)
    done = federation(tmp_path / "a", static)
    made = build(parse(configure({"workload": TEXT}))).workload
    before = made.params_of(made.init(0))
    for block in ("block0", "block1"):
        for name, along in (("router.weight", 0), ("expand.weight", 0), ("expand.bias", 0), ("contract.weight", 1)):
            old, new = (one[f"{block}.{name}"].movedim(along, 0).unflatten(0, (4, -1)) for one in (before, done.params))
            assert torch.equal(old[2:], new[2:])
            assert not torch.equal(old[:2], new[:2])


def test_contract_and_loss() -> None:
    """The loss has its share of imbalance, and padding counts for nothing."""
    options = {name: value for name, value in TEXT.items() if name != "name"}
    made = NextCharacter(options, num_clients=3, partition="iid", seed=0)
    check_workload(made)
    params = made.layout.views(made.init(0))
    losses = []
    for positions in ([[0, 1, 2]], [[0, 1, 2, -1, -1]]):
        batch = made.batch(np.array([0]), np.array(positions))
        one = {key: value[0] for part in batch for key, value in part.items()} | {"scale": 1.0}
        losses.append(float(made.loss(params, one)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    terms = dict[str, Tensor]()
    one = {k: v[0] for part in made.batch(np.array([0]), np.array([[0, 1, 2]])) for k, v in part.items()}
    cross_entropy = made.loss_of_logits(made.logits(params, one, terms), one)
    imbalance = sum(float(term.mean()) for term in terms.values())
    assert losses[0] == pytest.approx(0.99 * float(cross_entropy) + 0.01 * imbalance, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"experts": None, "top_experts": 1}, r"top_experts changes nothing without experts"),
        ({"experts": None, "balance": 0.1}, r"balance changes nothing without experts"),
        ({"experts": 2, "top_experts": 3}, r"top_experts 3 exceeds experts 2"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        mixture(**options)
