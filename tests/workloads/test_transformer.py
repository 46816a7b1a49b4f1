"""The transformer: equality with PyTorch's own, causality, and sub-models by head and by channel of a head."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN, resolve
from gossamer.submodel import Cut, Cutter, Dim, Layout
from gossamer.submodel.layout import LABEL_AXIS
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.models import CNN
from gossamer.workloads.transformer import TextClassifier, Transformer, TransformerBlocks

CONTEXT, NUM_LABELS = 7, 5
SMALL = {"stream": 8, "num_heads": 2, "hidden": 12}
STRATEGIES = {name: resolve("strategy", name) for name in BUILTIN["strategy"]}
KINDS = [
    {"cut": cut, "cut_stream": cut_stream}
    for cut, cut_stream in itertools.product(("heads", "head-dim"), (False, True))
]


def small(**options: Any) -> Transformer:
    return Transformer(CONTEXT, NUM_LABELS, **(SMALL | options))


def layout_of(model: Any) -> Layout:
    return Layout.of(model.shapes, model.axes)


def row_of(model: Any, seed: int = 0) -> Tensor:
    """Return random parameters, normalisations included, as a flat row."""
    layout = layout_of(model)
    drawn = {name: value + 0.1 * torch.randn(value.shape) for name, value in model.init(source(seed)).items()}
    return layout.flatten(drawn)


def source(seed: int = 0) -> np.random.Generator:
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def characters(*lead: int, seed: int = 0, length: int = CONTEXT) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(NUM_LABELS, size=(*lead, length)))


def plain_logits(model: TransformerBlocks, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what a stack of `torch.nn.TransformerEncoderLayer` makes of the same parameters, at every place."""
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if model.is_causal else None
    stream = params["embedding.weight"][x] + params["positions.weight"][: x.shape[1]]
    size = stream.shape[-1]
    for block in model.blocks:
        hidden = len(params[f"{block}.expand.bias"])
        layer = nn.TransformerEncoderLayer(
            size, model.num_heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        fused = {
            f"self_attn.in_proj_{kind}": torch.cat([params[f"{block}.{n}.{kind}"] for n in ("query", "key", "value")])
            for kind in ("weight", "bias")
        }
        names = {"self_attn.out_proj": "project", "linear1": "expand", "linear2": "contract"}
        names |= {"norm1": "norm0", "norm2": "norm1"}
        pairs = itertools.product(names.items(), ("weight", "bias"))
        layer.load_state_dict(
            fused | {f"{theirs}.{kind}": params[f"{block}.{mine}.{kind}"] for (theirs, mine), kind in pairs}
        )
        stream = layer(stream, src_mask=mask, is_causal=model.is_causal)
    stream = nn.functional.layer_norm(stream, (size,), params["norm.weight"], params["norm.bias"])
    output = params.get("output.weight", params["embedding.weight"])
    return stream @ output.T + params.get("output.bias", 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [1, 4, CONTEXT])
def test_it_is_pytorchs_encoder_with_a_causal_mask(tied: bool, length: int) -> None:
    model = small(tied=tied, num_blocks=3)
    params = layout_of(model).views(row_of(model))
    x = characters(3, length=length)
    logits = model.apply(params, x)
    assert logits.shape == (3, length, NUM_LABELS)
    assert torch.allclose(logits, plain_logits(model, params, x), atol=1e-5)
    assert ("output.weight" in params) == (not tied)


@pytest.mark.parametrize("cut", ["heads", "head-dim"])
def test_a_classifier_is_pytorchs_encoder_averaged(cut: str) -> None:
    model = TextClassifier((CONTEXT,), 3, NUM_LABELS, cut=cut, **SMALL)
    params = layout_of(model).views(row_of(model))
    x = characters(4)
    assert torch.allclose(model.apply(params, x), plain_logits(model, params, x).mean(1), atol=1e-5)
    dims = dict(zip(layout_of(model).names, layout_of(model).axes, strict=True))
    assert (dims["embedding.weight"], dims["output.weight"]) == ((Dim(None),) * 2, (Dim(LABEL_AXIS), Dim(None)))


@given(st.integers(0, CONTEXT - 2), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_nothing_depends_on_what_comes_later(place: int, seed: int) -> None:
    model = small()
    params = layout_of(model).views(row_of(model))
    x = characters(2, seed=seed)
    changed = x.clone()
    changed[:, place + 1 :] = (changed[:, place + 1 :] + 1) % NUM_LABELS
    before, after = model.apply(params, x), model.apply(params, changed)
    assert torch.allclose(before[:, : place + 1], after[:, : place + 1], atol=1e-6)
    assert not torch.allclose(before[:, place + 1], after[:, place + 1], atol=1e-3)
    assert torch.allclose(model.apply(params, x[:, : place + 1]), before[:, : place + 1], atol=1e-6)


def test_the_number_of_parameters() -> None:
    """By the usual formula, with biases and two normalisations a block."""
    model = Transformer(64, 65)
    block = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 2 * 64
    assert layout_of(model).num_parameters == 65 * 64 + 64 * 64 + 2 * block + 2 * 64 + 65 * 64 + 65
    assert model.norms == ()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_axes(kind: dict[str, Any]) -> None:
    model = small(**kind)
    layout = layout_of(model)
    dims = dict(zip(layout.names, layout.axes, strict=True))
    stream = "stream" if kind["cut_stream"] else None
    assert dims["embedding.weight"] == dims["output.weight"] == (Dim(LABEL_AXIS), Dim(stream))
    assert dims["positions.weight"] == (Dim(None), Dim(stream))
    assert dims["output.bias"] == (Dim(LABEL_AXIS),)
    for block in ("block0", "block1"):
        assert dims[f"{block}.query.weight"] == dims[f"{block}.key.weight"]
        assert dims[f"{block}.value.weight"][0] == dims[f"{block}.project.weight"][1]
        assert dims[f"{block}.expand.weight"] == (Dim(f"{block}.hidden"), Dim(stream))
        assert dims[f"{block}.contract.weight"] == (Dim(stream), Dim(f"{block}.hidden"))
        if kind["cut"] == "heads":
            assert dims[f"{block}.query.weight"][0] == dims[f"{block}.value.weight"][0]
            assert dims[f"{block}.query.weight"][0] == Dim(f"{block}.heads", inner=4)
        else:
            assert dims[f"{block}.query.weight"][0] == Dim(f"{block}.query-key", outer=2)
            assert dims[f"{block}.value.weight"][0] == Dim(f"{block}.value-output", outer=2)
    assert len(layout.cut_axes) == (4 if kind["cut"] == "heads" else 6) + kind["cut_stream"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cut", ["heads", "head-dim"])
def test_windows_never_cross_a_head(cut: str, strategy: str) -> None:
    """A cut by channels keeps as many of each head, the same ones; a cut by heads keeps all channels of some."""
    model = small(cut=cut, stream=24, num_heads=3)
    cutter = Cutter(layout_of(model), STRATEGIES[strategy], 1, 0)
    numbers = torch.arange(24.0)
    params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
    params["block0.query.bias"], params["block0.key.bias"] = numbers, numbers
    params["block0.value.bias"], params["block0.project.weight"] = numbers, numbers.expand(24, -1).clone()
    row = cutter.layout.flatten(params)
    for round in range(10):
        made = cutter.cut(0.5, round, 4, cutter.order(row))
        sub = made.sub.views(made.read(row, torch.zeros(made.sub.d)))
        assert torch.equal(sub["block0.query.bias"], sub["block0.key.bias"])
        assert torch.equal(sub["block0.value.bias"], sub["block0.project.weight"][0])
        for name in ("block0.query.bias", "block0.value.bias"):
            heads, channels = sub[name].int() // 8, sub[name].int() % 8
            if cut == "heads":
                assert channels.tolist() == list(range(8))
                assert len(set(heads.tolist())) == 1
            else:
                assert heads.tolist() == [0] * 4 + [1] * 4 + [2] * 4
                assert channels[:4].tolist() == channels[4:8].tolist() == channels[8:].tolist()


def cut_and_silenced(model: Transformer, row: Tensor, cut: Cut) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of a sub-model, and those of the full model with everything outside it set to zero."""
    held = torch.zeros(cut.full.d)
    cut.add_(held, torch.ones(cut.sub.d))
    return cut.sub.views(cut.read(row, torch.zeros(cut.sub.d))), cut.full.views(row * held)


@pytest.mark.sweep(keep=0.34)
@pytest.mark.parametrize("capacity", [0.5, 0.25])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [{"cut": "heads"}, {"cut": "head-dim"}, {"cut": "heads", "tied": True}], ids=str)
def test_a_sub_model_is_the_full_one_with_the_rest_silenced(
    kind: dict[str, Any], strategy: str, capacity: float
) -> None:
    model = small(stream=16, num_heads=4, **kind)
    row, x = row_of(model), characters(3)
    cutter = Cutter(layout_of(model), STRATEGIES[strategy], 1, 0)
    whole = model.apply(cutter.layout.views(row), x)
    for round in range(5):
        sub, silenced = cut_and_silenced(model, row, cutter.cut(capacity, round, 3, cutter.order(row)))
        assert sub["block0.expand.weight"].shape == (12 * capacity, 16)
        logits = model.apply(sub, x)
        assert torch.allclose(logits, model.apply(silenced, x), atol=1e-5)
        assert not torch.allclose(logits, whole, atol=1e-2)


@pytest.mark.sweep(keep=0.34)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [*KINDS, "cnn"], ids=str)
def test_capacity_one_is_the_global_model_in_every_round(kind: Any, strategy: str) -> None:
    model: Any = CNN((1, 8, 8), 3, width=0.1) if kind == "cnn" else small(**kind)
    x = torch.randn(3, 1, 8, 8) if kind == "cnn" else characters(3)
    row = row_of(model)
    cutter = Cutter(layout_of(model), STRATEGIES[strategy], 1, 0)
    expected = model.apply(cutter.layout.views(row), x)
    for round in (0, 1, 5, 11):
        cut = cutter.cut(1.0, round, round, cutter.order(row))
        logits = model.apply(cut.sub.views(cut.read(row, torch.zeros(cut.sub.d))), x)
        assert float((logits - expected).abs().max()) < 1e-5


def repeated(full: Layout, sub: Layout, row: Tensor) -> Tensor:
    """Return a full row made of a sub-model's, whose channels are repeated along every axis."""
    params = {}
    lengths = sub.widths
    for (name, value), dims in zip(sub.views(row).items(), full.axes, strict=True):
        for at, dim in enumerate(dims):
            if dim.cuttable and dim.axis is not None:
                length = lengths[dim.axis]
                index = [
                    (block * length + channel % length) * dim.inner + i
                    for block in range(dim.outer)
                    for channel in range(full.widths[dim.axis])
                    for i in range(dim.inner)
                ]
                value = value.index_select(at, torch.tensor(index))
        params[name] = value
    return full.flatten(params)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_scaler_makes_a_share_of_equal_channels_the_whole(kind: dict[str, Any]) -> None:
    """Where every channel has a double, half of them, scaled by 2, compute what all of them compute."""
    model = small(**kind)
    full, half = layout_of(model), layout_of(model).cut(0.5)
    row = half.flatten({name: torch.randn(view.shape) for name, view in half.views(torch.zeros(half.d)).items()})
    x = characters(3)
    expected = model.apply(full.views(repeated(full, half, row)), x)
    assert torch.allclose(model.apply(half.views(row), x, ForwardContext(scale=2.0)), expected, atol=1e-4)
    assert torch.allclose(model.apply(half.views(row), x, ForwardContext(scale=torch.tensor(2.0))), expected, atol=1e-4)
    assert not torch.allclose(model.apply(half.views(row), x), expected, atol=1e-1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stacked_models_equal_single_ones(kind: dict[str, Any]) -> None:
    model = small(**kind)
    layout = layout_of(model).cut(0.5)
    rows = torch.stack(
        [
            layout.flatten({n: torch.randn(v.shape) for n, v in layout.views(rows).items()})
            for rows in torch.zeros(3, layout.d)
        ]
    )
    x = characters(3, 2)
    logits = torch.vmap(lambda params, one: model.apply(params, one, ForwardContext(scale=2.0)))(layout.views(rows), x)
    for i in range(3):
        assert torch.allclose(logits[i], model.apply(layout.views(rows[i]), x[i], ForwardContext(scale=2.0)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [0.5, 0.25])
def test_width_gives_the_shapes_of_a_sub_model(kind: dict[str, Any], width: float) -> None:
    narrow = small(**kind, width=width)
    assert layout_of(narrow).shapes == layout_of(small(**kind)).cut(width).shapes
    logits = narrow.apply(narrow.init(source()), characters(2))
    assert bool(torch.isfinite(logits).all())


def test_initial_values() -> None:
    model = small()
    params = model.init(source())
    assert set(params) == set(model.shapes)
    assert torch.equal(params["block0.norm0.weight"], torch.ones(8))
    assert not params["norm.bias"].any()
    for name in ("embedding", "positions", "block1.query", "output"):
        assert 0.5 / 8**0.5 < float(params[f"{name}.weight"].abs().max()) <= 1 / 8**0.5
    assert all(
        torch.equal(value, again) for value, again in zip(params.values(), model.init(source()).values(), strict=True)
    )


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workload\.model: stream 8 cannot be divided among num_heads 3"):
        small(num_heads=3)
    with pytest.raises(
        ConfigError, match=r"workload\.model\.num_head'; did you mean 'num_heads'|did you mean 'num_heads'"
    ):
        small(num_head=3)
    with pytest.raises(ConfigError, match=r"workload\.model\.cut = 'columns'"):
        small(cut="columns")
