"""Traced axes: against declared ones, against masked full models, and what tracing refuses or leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference_modules as reference
from gossamer.errors import ConfigError
from gossamer.submodel import LABEL_AXIS, Axes, Dim, Layout, trace_axes, tracing
from gossamer.submodel.layout import as_dim, with_kernels
from gossamer.submodel.tracing_rules import RULES
from gossamer.workloads.models import CNN, MLP
from gossamer.workloads.resnet import PreActResNet18

TOLERANCE = 1e-5
CHARACTERS = 9


def images(*shape: int, seed: int = 0) -> Tensor:
    """Return random images."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def characters() -> Tensor:
    """Return random characters."""
    return torch.randint(0, CHARACTERS, (2, 7), generator=torch.Generator().manual_seed(0))


def layout_of(module: nn.Module, axes: Axes) -> Layout:
    """Return the layout of a module with these axes."""
    return Layout.of({name: tuple(param.shape) for name, param in module.named_parameters()}, axes)


def partition(axes: Axes) -> set[tuple[frozenset[tuple[str, int, int, int]], bool]]:
    """Return the dimensions that each axis ties, with their nesting, and whether the axis is that of labels."""
    classes: dict[str, set[tuple[str, int, int, int]]] = {}
    for name, specs in axes.items():
        for position, dim in enumerate(map(as_dim, specs)):
            if dim.axis is not None:
                classes.setdefault(dim.axis, set()).add((name, position, dim.outer, dim.inner))
    return {(frozenset(members), axis == LABEL_AXIS) for axis, members in classes.items()}


# ---- the oracle: a sub-model computes what the full one does with everything else set to zero


def held_entries(dim: Dim, size: int, channels: Mapping[str, list[int]]) -> list[int]:
    """Return the entries of one dimension that a sub-model with these channels of each axis holds."""
    if dim.axis is None or dim.axis == LABEL_AXIS:
        return list(range(size))
    width = size // (dim.outer * dim.inner)
    return [
        (block * width + channel) * dim.inner + within
        for block in range(dim.outer)
        for channel in channels[dim.axis]
        for within in range(dim.inner)
    ]


def is_sound(module: nn.Module, axes: Axes, x: Tensor, seed: int, capacity: float = 0.5) -> bool:
    """Whether a sub-model of random channels of every axis runs, and agrees with the masked full model."""
    layout, source = layout_of(module, axes), np.random.default_rng(seed)
    channels = {
        axis: sorted(source.choice(width, max(1, int(width * capacity)), replace=False).tolist())
        for axis, width in layout.widths.items()
    }
    sub, masked = {}, {}
    for name, param in module.named_parameters():
        value = torch.from_numpy(source.normal(0.3, 1, param.shape).astype(np.float32)) / math.sqrt(param[0].numel())
        held = [held_entries(as_dim(spec), size, channels) for spec, size in zip(axes[name], param.shape, strict=True)]
        mesh = np.ix_(*held)
        sub[name], masked[name] = value[mesh], torch.zeros_like(value)
        masked[name][mesh] = sub[name]
    with torch.no_grad():
        expected = torch.func.functional_call(fitted(module), masked, (x,))
        try:
            found = torch.func.functional_call(fitted(module), sub, (x,))
        except RuntimeError:
            return False
    return found.shape == expected.shape and torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def fitted(module: nn.Module) -> nn.Module:
    """Return a copy without running moments, whose grouped convolutions have as many groups as their inputs ask for."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.forward = lambda x, layer=layer: F.conv2d(
                x, layer.weight, layer.bias, layer.stride, layer.padding, groups=x.shape[1] // layer.weight.shape[1]
            )
    return module


# ---- declared models


class TestDeclaredModels:
    @pytest.mark.parametrize("cls", [(reference.MLP, MLP), (reference.CNN, CNN)], ids=lambda pair: pair[1].__name__)
    def test_agree(self, cls: tuple[Any, Any]) -> None:
        plain, declared = cls[0]((2, 9, 8), 4), cls[1]((2, 9, 8), 4)
        axes = trace_axes(plain, images(2, 2, 9, 8))
        kernels = {name for name, shape in declared.shapes.items() if len(shape) == 4}
        assert with_kernels(axes, kernels) == declared.axes
        assert list(axes) == list(declared.axes)

    def test_resnet(self) -> None:
        plain, declared = reference.PreActResNet18((3, 32, 32), 10), PreActResNet18((3, 32, 32), 10)
        axes = trace_axes(plain, images(2, 3, 8, 8))
        assert partition(axes) == partition(declared.axes)
        layout = layout_of(plain, axes)
        assert len(layout.cut_axes) == 12
        counts = [layout.cut(1 / share).num_parameters for share in (1, 2, 4, 8, 16)]
        assert counts == [11_172_170, 2_796_714, 701_018, 176_178, 44_510]

    def test_partitions_that_differ_are_told_apart(self) -> None:
        axes = PreActResNet18((3, 32, 32), 10).axes
        loose = {**axes, "stage1.block0.shortcut.weight": ("other", "stage0", None, None)}
        assert partition(loose) != partition(axes)
        tight = {n: tuple("stage0" if s == "stage1" else s for s in specs) for n, specs in axes.items()}
        assert partition(tight) != partition(axes)


# ---- transformers


class TestTransformers:
    @pytest.mark.parametrize("cut", ["heads", "head-dim"])
    @pytest.mark.parametrize("seed", range(3))
    def test_sub_models_are_masked_models(self, cut: Any, seed: int) -> None:
        module = reference.Transformer(CHARACTERS, cut=cut)
        axes = trace_axes(module, characters(), attention=cut, keep=["embedding"])
        assert layout_of(module, axes).cut_axes == (
            f"attention0.qkv.{cut}",
            "perceptron0.1",
            f"attention1.qkv.{cut}",
            "perceptron1.1",
        )
        assert is_sound(module, axes, characters(), seed)

    def test_fused_projections(self) -> None:
        module = reference.Transformer(CHARACTERS)
        heads = trace_axes(module, characters())
        assert heads["attention0.qkv.weight"] == (Dim("attention0.qkv.heads", outer=3, inner=4), "embedding")
        assert heads["attention0.project.weight"] == ("embedding", Dim("attention0.qkv.heads", inner=4))
        inside = trace_axes(module, characters(), attention="head-dim")
        assert inside["attention0.qkv.bias"] == (Dim("attention0.qkv.head-dim", outer=12),)
        assert inside["attention0.project.weight"] == ("embedding", Dim("attention0.qkv.head-dim", outer=4))

    def test_a_wrong_nesting_is_not_sound(self) -> None:
        """Cutting across head boundaries changes what is computed."""
        module = reference.Transformer(CHARACTERS)
        axes = trace_axes(module, characters(), keep=["embedding"])
        assert is_sound(module, axes, characters(), 0)
        wrong = {
            name: tuple(Dim("across", outer=as_dim(s).outer * 4) if as_dim(s).inner == 4 else s for s in specs)
            for name, specs in axes.items()
        }
        assert not is_sound(module, wrong, characters(), 0)

    @pytest.mark.parametrize("cut", ["heads", "head-dim"])
    def test_separate_projections(self, cut: Any) -> None:
        """All four share heads; inside these, query and key share channels, and so do value and output."""

        class Apart(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.key, self.value = (nn.Linear(5, 12) for _ in range(3))
                self.project = nn.Linear(12, 3)

            def forward(self, x: Tensor) -> Tensor:
                split = (-1, 4) if cut == "heads" else (3, -1)
                q, k, v = (one(x).unflatten(-1, split) for one in (self.query, self.key, self.value))
                weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
                return self.project(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))

        axes = trace_axes(Apart(), images(2, 4, 5), attention=cut)
        if cut == "heads":
            matched = mixed = Dim("query.heads", inner=4)
        else:
            matched, mixed = Dim("query.head-dim", outer=3), Dim("value.head-dim", outer=3)
        assert [axes[f"{name}.bias"] for name in ("query", "key", "value")] == [(matched,), (matched,), (mixed,)]
        assert axes["project.weight"] == (LABEL_AXIS, mixed)
        assert is_sound(Apart(), axes, images(2, 4, 5), 0)

    def test_embeddings(self) -> None:
        tied = trace_axes(reference.Transformer(CHARACTERS), characters())
        assert tied["embedding.weight"] == (LABEL_AXIS, "embedding")
        assert "output.weight" not in tied
        free = trace_axes(reference.Transformer(CHARACTERS, tied=False), characters())
        assert free["embedding.weight"] == (None, "embedding")
        assert free["output.weight"] == (LABEL_AXIS, "embedding")
        assert free["positions"] == (None, "embedding")

    @pytest.mark.parametrize("cut", ["heads", "head-dim"])
    def test_the_layers_of_torch(self, cut: Any) -> None:
        layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True, norm_first=True)
        module = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 4))
        axes = trace_axes(module, images(2, 6, 5), attention=cut)
        inner = {"heads": 4, "head-dim": 1}[cut]
        fused = Dim(f"1.self_attn.in_proj.{cut}", outer=9 // (3 if cut == "heads" else 1), inner=inner)
        assert axes["1.self_attn.in_proj_weight"] == (fused, "0")
        assert axes["1.self_attn.out_proj.weight"] == ("0", Dim(fused.axis, fused.outer // 3, inner))
        assert axes["1.linear2.weight"] == ("0", "1.linear1")
        assert axes["2.weight"] == (LABEL_AXIS, "0")


# ---- other computations


class TestUnusual:
    def test_axes(self) -> None:
        axes = trace_axes(reference.Unusual((3, 6, 6), 5), images(2, 3, 6, 6))
        assert axes["depthwise.weight"] == (Dim("stem", inner=2), None, None, None)
        assert axes["pointwise.weight"] == (Dim("pointwise", outer=2), Dim("stem", inner=2), None, None)
        assert axes["squeeze.weight"] == ("squeeze", Dim("pointwise", outer=2))
        assert axes["gate.weight"] == (Dim("gate", outer=2), Dim("grouped", outer=4))
        assert axes["mix"] == ("gate", "mix.heads", None)
        assert axes["output.weight"] == (LABEL_AXIS, Dim("mix.heads", inner=8))
        assert axes["slope"] == (None,)

    @given(st.integers(0, 2**20), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
    @settings(max_examples=10, deadline=None)
    def test_sub_models_are_masked_models(self, seed: int, capacity: float) -> None:
        module = reference.Unusual((3, 6, 6), 5)
        axes = trace_axes(module, images(2, 3, 6, 6))
        assert is_sound(module, axes, images(3, 3, 6, 6), seed, capacity)

    def test_every_tie_is_needed(self) -> None:
        """The oracle notices any dimension that is given an axis of its own."""
        module = reference.Unusual((3, 6, 6), 5)
        axes = trace_axes(module, images(2, 3, 6, 6))
        for name, specs in axes.items():
            for position, dim in enumerate(map(as_dim, specs)):
                if dim.cuttable:
                    alone = (*specs[:position], Dim("alone", dim.outer, dim.inner), *specs[position + 1 :])
                    assert not is_sound(module, {**axes, name: alone}, images(3, 3, 6, 6), 1), (name, position)

    def test_residual_networks(self) -> None:
        module = reference.PreActResNet18((3, 8, 8), 4, (4, 6, 8, 10))
        assert is_sound(module, trace_axes(module, images(2, 3, 8, 8)), images(3, 3, 8, 8), 0)


class Rearranged(nn.Module):
    """Divides hidden channels into factors, moves these about, scales one and puts them together again."""

    def __init__(self, sizes: tuple[int, ...], order: tuple[int, ...], open_one: int) -> None:
        super().__init__()
        self.sizes = tuple(-1 if number == open_one else size for number, size in enumerate(sizes))
        self.order = tuple(one + 1 for one in order)
        self.before, self.after = nn.Linear(3, math.prod(sizes)), nn.Linear(math.prod(sizes), 2)
        self.slope = nn.Parameter(torch.ones(sizes[order[-1]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).unflatten(1, self.sizes).permute(0, *self.order) * self.slope
        return self.after(x.flatten(1))


class TestFactors:
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(["heads", "head-dim"]), st.data())
    def test_rearranging_is_sound(self, sizes: list[int], attention: Any, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(sizes))))
        wide = [number for number, size in enumerate(sizes) if size > 1] or [0]
        module = Rearranged(tuple(sizes), tuple(order), wide[0 if attention == "heads" else -1])
        axes = trace_axes(module, images(2, 3), attention=attention)
        assert len(layout_of(module, axes).cut_axes) == (1 if max(sizes) > 1 else 0)
        assert is_sound(module, axes, images(2, 3), 0)

    @pytest.mark.parametrize(("middle", "axes"), [([4, 6], Dim("before.heads", inner=6)), ([6, 4], None)])
    def test_divisions_that_disagree_are_not_cut(self, middle: list[int], axes: Any) -> None:
        class Divided(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.before, self.after = nn.Linear(3, 24), nn.Linear(24, 2)
                self.first, self.second = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(middle))

            def forward(self, x: Tensor) -> Tensor:
                x = self.before(x).view(2, 4, 6) * self.first
                return self.after((x.view(2, *middle) * self.second).flatten(1))

        assert trace_axes(Divided(), images(2, 3))["before.bias"] == (axes,)


def hidden_axis(between: Any, *, inputs: Tensor | None = None, after: int = 8) -> Any:
    """Return the axis of 8 hidden channels that go through `between` to a linear layer, None if they are not cut."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(3, 8), nn.Linear(after, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(between(self.before(x)))

    return trace_axes(Between(), images(4, 3) if inputs is None else inputs)["before.bias"][0]


class TestWhatIsNotCut:
    @pytest.mark.parametrize(
        "between",
        [
            lambda x: x.softmax(-1),
            lambda x: x - x.mean(-1, keepdim=True),
            lambda x: x / x.norm(dim=1, keepdim=True),
            lambda x: F.normalize(x, dim=1),
            lambda x: x.cumsum(1),
            lambda x: x.flip(1),
            lambda x: x[:, torch.arange(8).flip(0)],
            lambda x: x.sort(1).values,
            lambda x: x + torch.arange(8.0),
            lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
            lambda x: torch.cat([x[:, -3:], x[:, :-3]], 1),
            lambda x: F.layer_norm(x, (8,)),
            lambda x: F.avg_pool1d(x, 3, 1, 1),
            lambda x: F.pad(x[:, None], (1, 1))[:, 0, 1:-1],
            lambda x: x @ torch.eye(8),
            lambda x: x.roll(1, 1),
            lambda x: torch.cat([torch.zeros(0), x]),
        ],
    )
    def test_what_mixes_channels(self, between: Any) -> None:
        assert hidden_axis(between) is None

    @pytest.mark.parametrize(
        "between",
        [
            lambda x: x.softmax(0),
            lambda x: x - x.mean(0),
            lambda x: x[:, None].squeeze(1).T.clone().t(),
            lambda x: F.dropout(x, 0.5).clamp(0, 1).add_(1).mul_(2),
            lambda x: torch.stack([x, x * 2], 0).sum(0),
            lambda x: torch.stack([x, x * 2], -1).unbind(-1)[1],
            lambda x: x.expand(3, -1, -1).amax(0),
            lambda x: x[torch.arange(4).flip(0)] + x[:1] + x[2],
            lambda x: torch.cat([x, x.relu()], 0)[4:],
            lambda x: x.masked_fill(x > 1, 0.0),
            lambda x: F.interpolate(x[..., None, None], scale_factor=2).mean((2, 3)),
            lambda x: torch.zeros_like(x).copy_(x),
        ],
    )
    def test_what_keeps_channels_apart(self, between: Any) -> None:
        assert hidden_axis(between) == "before"

    @pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
    def test_recurrent_layers(self, recurrent: Any) -> None:
        axes = trace_axes(recurrent(4, 6), images(5, 2, 4))
        assert {spec for specs in axes.values() for spec in specs} == {None}

    def test_a_mean_that_nobody_uses_is_no_matter(self) -> None:
        assert hidden_axis(lambda x: (x, x.mean(1))[0]) == "before"
        assert hidden_axis(lambda x: x + x.mean(1)[:, None]) is None
        axes = trace_axes(nn.MultiheadAttention(6, 3), *[images(4, 2, 6)] * 3, label_outputs=False)
        assert axes["in_proj_weight"] == (Dim("in_proj", outer=9), None)  # means over heads are an output: only inside
        attention = reference.Attending(6, 3)
        assert trace_axes(attention, images(4, 2, 6))["attention.in_proj_bias"] == (
            Dim("attention.in_proj.heads", outer=3, inner=2),
        )

    def test_what_joins_equal_blocks(self) -> None:
        assert hidden_axis(lambda x: torch.cat([x, x], 1), after=16) == "before"
        assert hidden_axis(lambda x: torch.cat([x, x[:, :1]], 1), after=9) is None
        assert hidden_axis(lambda x: F.glu(x), after=4) == Dim("before", outer=2)
        assert hidden_axis(lambda x: x[:, :4] * x[:, 4:], after=4) == Dim("before", outer=2)
        assert hidden_axis(lambda x: x.repeat(1, 3), after=24) == "before"

    def test_inputs_outputs_and_unused_parameters(self) -> None:
        module = nn.Sequential(nn.Linear(3, 4))
        module.register_parameter("unused", nn.Parameter(torch.ones(7)))
        axes = trace_axes(module, images(2, 3))
        assert axes == {"unused": (None,), "0.weight": (LABEL_AXIS, None), "0.bias": (LABEL_AXIS,)}
        assert trace_axes(module, images(2, 3), label_outputs=False)["0.bias"] == (None,)

    def test_outputs_that_are_also_summed_over_are_no_labels(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.outer(self.inner(x))

        axes = trace_axes(Residual(), images(2, 4))
        assert axes["outer.weight"] == (None, "inner")
        assert axes["inner.weight"] == ("inner", None)

    def test_keep(self) -> None:
        module, x = reference.MLP((1, 2, 3), 4), images(2, 1, 2, 3)
        assert trace_axes(module, x, keep={"hidden0"})["hidden1.weight"] == ("hidden1", None)
        assert trace_axes(module, x, keep=lambda name: name.endswith("1"))["hidden1.weight"] == (None, "hidden0")
        with pytest.raises(ConfigError, match=r"'hiden0'.*did you mean 'hidden0'"):
            trace_axes(module, x, keep=["hiden0"])


class TestNorms:
    def test_group_norm_is_cut_inside_groups(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Flatten(), nn.Linear(12 * 4, 2))
        axes = trace_axes(module, images(2, 3, 2, 2))
        assert axes["1.weight"] == (Dim("0", outer=4),)
        assert axes["3.weight"] == (LABEL_AXIS, Dim("0", outer=4, inner=4))

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
    def test_weights_follow_their_producer(self, norm: Any) -> None:
        axes = trace_axes(nn.Sequential(nn.Linear(3, 6), norm(6), nn.Linear(6, 2)), images(4, 3))
        assert {specs for name, specs in axes.items() if name.startswith("1.")} == {("0",)}
        assert axes["2.weight"] == (LABEL_AXIS, "0")

    def test_instance_norm(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 2, 1))
        assert trace_axes(module, images(2, 3, 3, 3))["1.weight"] == ("0",)


IN_PLACE: dict[str, Any] = {
    "transpose_": lambda x: (x + 1).unsqueeze(0).transpose_(0, 1).flatten(1),
    "t_": lambda x: (x + 1).t_().t(),
    "squeeze_": lambda x: x.unsqueeze(1).squeeze_(1),
    "unsqueeze_": lambda x: (x + 1).unsqueeze_(1)[:, 0],
}


class TestWhatIsNotFollowed:
    """An operation whose rule does not describe what came out is refused, never guessed."""

    @pytest.mark.parametrize("name", IN_PLACE)
    def test_operations_in_place(self, name: str) -> None:
        assert hidden_axis(IN_PLACE[name]) == "before"

    def test_a_rule_that_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(RULES, "relu", lambda call: [tuple(reversed(call.dims("self")))])
        monkeypatch.setattr(tracing, "rule_for", lambda operation, name: RULES.get(name))
        with pytest.raises(ConfigError, match=r"'aten\.relu\.default' in its forward"):
            hidden_axis(F.relu)


class TestConduct:
    def test_an_unknown_operation_is_named(self) -> None:
        class Inner(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.cdist(x, x)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.before, self.inner = nn.Linear(3, 4), Inner()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(self.before(x))

        with pytest.raises(ConfigError, match=r"'aten\._cdist_forward\.default' in 'inner'.*declare the axes by hand"):
            trace_axes(Outer(), images(2, 4, 3))

    def test_an_unknown_operation_on_what_is_not_cut_is_no_matter(self) -> None:
        class Distances(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.before, self.after = nn.Linear(4, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.after(self.before(torch.cdist(x, x)))

        assert trace_axes(Distances(), images(2, 4, 3))["before.weight"] == ("before", None)

    def test_outputs_must_be_tensors(self) -> None:
        class Wrapped(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return {"logits": super().forward(x), "more": object()}

        with pytest.raises(ConfigError, match="the module returns object"):
            trace_axes(Wrapped(3, 4), images(2, 3))

    def test_several_outputs_are_all_kept(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

            def forward(self, x: Tensor) -> Any:
                hidden = self.second(self.first(x))
                return {"logits": self.third(hidden), "features": hidden}

        axes = trace_axes(Two(), images(2, 3))
        assert axes["third.weight"] == (LABEL_AXIS, None)
        assert axes["second.weight"] == (None, "first")

    def test_the_module_and_the_random_state_stay_as_they_are(self) -> None:
        module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)).eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        state = torch.get_rng_state()
        trace_axes(module, images(4, 3))
        assert torch.equal(torch.get_rng_state(), state)
        assert not module.training
        assert not any(layer._forward_hooks for layer in module.modules())
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_it_is_repeatable(self) -> None:
        module = reference.Unusual((3, 6, 6), 5)
        assert trace_axes(module, images(2, 3, 6, 6)) == trace_axes(module, images(5, 3, 9, 9, seed=1))
