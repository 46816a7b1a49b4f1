"""Plain modules as models: against the models that are declared here, on sub-models, in federations, and refused."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_modules as reference
import user_modules
from federation import STACKED, assert_same, configure, events, mixed, modes
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.experiment import run
from gossamer.submodel import Cutter, Dim, Layout, extract, trace_axes
from gossamer.submodel.layout import as_dim
from gossamer.submodel.strategies import rolling
from gossamer.task import load_workload
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.models import CNN, MLP
from gossamer.workloads.modules import ModuleModel
from gossamer.workloads.resnet import PreActResNet18

SHAPE, NUM_LABELS = (2, 9, 8), 4
DATA = {"name": "synthetic", "num_train": 75, "num_test": 30, "num_labels": 4, "shape": [2, 8, 8]}
TWINS = {
    "mlp": (partial(reference.MLP, SHAPE, NUM_LABELS, (12, 10)), MLP(SHAPE, NUM_LABELS, hidden=[12, 10])),
    "cnn": (partial(reference.CNN, SHAPE, NUM_LABELS), CNN(SHAPE, NUM_LABELS)),
    "resnet": (
        partial(reference.PreActResNet18, SHAPE, NUM_LABELS, (4, 8, 16, 32)),
        PreActResNet18(SHAPE, NUM_LABELS, width=1 / 16),
    ),
}


def wrapped(build: Any, **options: Any) -> ModuleModel:
    """Return a module as a model."""
    return ModuleModel(build, SHAPE, NUM_LABELS, **options)


def of_layers(*layers: Any, **options: Any) -> ModuleModel:
    """Wrap a sequence of layers; functions among them stand for layers without parameters."""

    class Between(nn.Module):
        """A function as a layer."""

        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    def build() -> nn.Module:
        """Return the layers, one after another."""
        made = [layer() if isinstance(layer, partial) else Between(layer) for layer in layers]
        return nn.Sequential(*made)

    return wrapped(build, **options)


def inputs(*lead: int, seed: int = 0) -> Tensor:
    """Return random inputs."""
    return torch.randn(*lead, *SHAPE, generator=torch.Generator().manual_seed(seed))


def initial(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return the initial parameters of a model."""
    return model.init(np.random.default_rng(seed))


HEAD = partial(nn.Linear, 144, 6)
TAIL = partial(nn.Linear, 6, 4)
FLAT = partial(nn.Flatten)


class TestTwins:
    """A traced module and the model that is declared in gossamer compute the same."""

    @pytest.mark.parametrize("name", TWINS)
    @pytest.mark.parametrize(("capacity", "scale"), [(1.0, 1.0), (0.5, 1.0), (0.5, 2.0)])
    def test_logits_and_gradients(self, name: str, capacity: float, scale: float) -> None:
        build, declared = TWINS[name]
        model = wrapped(build)
        params = extract(initial(declared), declared.axes, capacity, round=3).params
        mine = {n: params[n].clone().requires_grad_() for n in model.shapes}
        theirs = {n: params[n].clone().requires_grad_() for n in model.shapes}
        if name == "resnet" and scale != 1.0:
            scale = 1.0  # its scaler stands before the BatchNorm layers instead
        found, expected = (
            model.apply(mine, inputs(5), ForwardContext(scale=scale)),
            declared.apply(theirs, inputs(5), ForwardContext(scale=scale)),
        )
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
        found.square().sum().backward()
        expected.square().sum().backward()
        for n in params:
            assert torch.allclose(mine[n].grad, theirs[n].grad, atol=1e-3, rtol=1e-3), n

    def test_the_scaler_does_something(self) -> None:
        model = wrapped(TWINS["cnn"][0])
        params = initial(model)
        assert not torch.allclose(
            model.apply(params, inputs(2), ForwardContext(scale=2.0)), model.apply(params, inputs(2))
        )

    def test_static_batch_norm(self) -> None:
        build, declared = TWINS["resnet"]
        model, params = wrapped(build), initial(TWINS["resnet"][1])
        mine: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}
        model.apply(params, inputs(7), ForwardContext(record=mine))
        declared.apply(params, inputs(7), ForwardContext(record=theirs))
        assert set(model.norms) == set(declared.norms)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].dtype == torch.float64
            assert torch.allclose(mine[name], value, rtol=1e-4, atol=1e-4), name
        found = model.apply(params, inputs(3, seed=1), ForwardContext(statistics=mine))
        assert torch.allclose(
            found, declared.apply(params, inputs(3, seed=1), ForwardContext(statistics=theirs)), atol=1e-4
        )
        alone = model.apply(params, inputs(3, seed=1)[:1], ForwardContext(statistics=mine))
        assert torch.allclose(found[:1], alone, atol=1e-5)

    def test_a_full_window_is_the_identity(self) -> None:
        model = wrapped(TWINS["cnn"][0])
        params = initial(model)
        full = extract(params, model.axes, 1.0, round=5).params
        assert torch.equal(model.apply(full, inputs(2)), model.apply(params, inputs(2)))


class TestMended:
    """Layers whose attributes hold sizes that are cut."""

    def test_layer_norms_and_root_mean_square_norms(self) -> None:
        model = of_layers(FLAT, HEAD, partial(nn.LayerNorm, 6), partial(nn.RMSNorm, 6), TAIL)
        params = extract(initial(model), model.axes, 0.5, round=1).params
        x = F.linear(inputs(2).flatten(1), params["1.weight"], params["1.bias"])
        x = F.rms_norm(F.layer_norm(x, (3,), params["2.weight"], params["2.bias"]), (3,), params["3.weight"])
        assert torch.allclose(model.apply(params, inputs(2)), F.linear(x, params["4.weight"], params["4.bias"]))

    def test_grouped_convolutions(self) -> None:
        layers = (
            partial(nn.Conv2d, 2, 6, 1),
            partial(nn.Conv2d, 6, 12, 3, groups=6),
            partial(nn.Conv2d, 12, 8, 1, groups=2),
        )
        model = of_layers(*layers, lambda x: x.mean((2, 3)), partial(nn.Linear, 8, 4))
        params = extract(initial(model), model.axes, 0.5, round=0, strategy="static").params
        assert model.axes["1.weight"][0] == Dim("0", outer=2, inner=2)
        assert params["1.weight"].shape == (4, 1, 3, 3)
        x = F.conv2d(inputs(2), params["0.weight"], params["0.bias"])
        x = F.conv2d(x, params["1.weight"], params["1.bias"], groups=2)
        x = F.conv2d(x, params["2.weight"], params["2.bias"], groups=2).mean((2, 3))
        assert torch.allclose(
            model.apply(params, inputs(2)), F.linear(x, params["4.weight"], params["4.bias"]), atol=1e-6
        )

    def test_attention_and_what_is_kept(self) -> None:
        tokens = lambda x: x.flatten(2)  # noqa: E731
        model = of_layers(
            tokens,
            partial(nn.Linear, 72, 16),
            partial(reference.Attention, 16, 4, "head-dim"),
            lambda x: x.mean(1),
            partial(nn.Linear, 16, 4),
            attention="head-dim",
            keep=["1", "2.project"],
        )
        assert Layout.of(model.shapes, model.axes).cut_axes == ("2.qkv.head-dim",)


class Encoder(nn.Module):
    """PyTorch's own transformer layer between linear ones, with a causal mask and one padded place."""

    def __init__(self, batch_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.before, self.after = nn.Linear(16, 12), nn.Linear(12, 4)
        self.layer = nn.TransformerEncoderLayer(12, 3, 8, dropout, batch_first=batch_first, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.reshape(len(x), 9, 16))
        mask = nn.Transformer.generate_square_subsequent_mask(9)
        padding = (torch.arange(9) == 4).expand(len(x), -1)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layer(x, mask, torch.zeros(padding.shape).masked_fill(padding, -torch.inf))
        return self.after(x.mean(1 if self.batch_first else 0))


class TestAttention:
    """`torch.nn.MultiheadAttention`, whose code divides fixed sizes."""

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("attention", ["heads", "head-dim"])
    def test_sub_models_are_masked_models(self, attention: Any, batch_first: bool) -> None:
        model = wrapped(partial(Encoder, batch_first), attention=attention, keep=["before"])
        params = initial(model)
        layout = Layout.of(model.shapes, model.axes)
        assert layout.cut_axes == (f"layer.self_attn.in_proj.{attention}", "layer.linear1")
        cut = Cutter(layout, rolling, 1, 0).cut(0.7, 2, 0)
        assert not cut.is_full
        row = cut.read(layout.flatten(params), torch.zeros(cut.sub.d))
        whole = torch.zeros(layout.d)
        cut.add_(whole, row)
        found = model.apply(cut.sub.views(row), inputs(3))
        assert torch.allclose(found, model.apply(layout.views(whole), inputs(3)), atol=1e-6)
        assert not torch.allclose(found, model.apply(params, inputs(3)), atol=1e-2)

    @pytest.mark.parametrize("attention", ["heads", "head-dim"])
    def test_the_scaler_makes_up_for_equal_channels(self, attention: Any) -> None:
        """Where all channels and heads are alike, half of them, scaled by 2, are worth the whole."""

        class Attending(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attend, self.hidden, self.output = reference.Attending(16, 4), HEAD(), TAIL()

            def forward(self, x: Tensor) -> Tensor:
                x = x.reshape(len(x), 9, 16).transpose(0, 1)
                x = self.attend(x).transpose(0, 1).flatten(1)
                return self.output(F.relu(self.hidden(x)))

        model = wrapped(Attending, attention=attention)
        layout = Layout.of(model.shapes, model.axes)
        params = {name: torch.full(shape, 0.2 / len(shape)) for name, shape in model.shapes.items()}
        half = extract(params, model.axes, 0.5, round=0).params
        cut_axes = (f"attend.attention.in_proj.{attention}", "attend.attention.out_proj", "hidden")
        assert layout.cut_axes == cut_axes
        expected = model.apply(params, inputs(3))
        assert torch.allclose(model.apply(half, inputs(3), ForwardContext(scale=2.0)), expected, atol=1e-5)
        assert not torch.allclose(model.apply(half, inputs(3)), expected, atol=1e-3)

    def test_the_full_model_is_what_pytorch_computes(self) -> None:
        model = wrapped(Encoder)
        params = initial(model)
        expected = torch.func.functional_call(Encoder(), params, (inputs(3),))
        assert torch.allclose(model.apply(params, inputs(3)), expected, atol=1e-6)
        assert model.traits.supports_stacking

    @pytest.mark.parametrize(
        "options", [{"dropout": 0.1, "add_bias_kv": True}, {"add_bias_kv": True}, {"add_zero_attn": True}]
    )
    def test_what_it_cannot_do_is_refused(self, options: Any) -> None:
        class Attending(nn.MultiheadAttention):
            def forward(self, x: Tensor) -> Tensor:
                x = x.reshape(len(x), 9, 16)
                return super().forward(x, x, x)[0].mean(1)[:, :4]

        build = partial(Attending, 16, 4, batch_first=True, **options)
        if options.get("dropout"):
            with pytest.raises(ConfigError, match="can neither be cut nor have dropout"):
                wrapped(build)
            return
        model = wrapped(build)  # as a whole, it is PyTorch's
        params = initial(model)
        expected = torch.func.functional_call(build(), params, (inputs(2),))
        assert torch.allclose(model.apply(params, inputs(2)), expected, atol=1e-6)
        if options.get("add_zero_attn"):  # joins what cannot be cut
            assert Layout.of(model.shapes, model.axes).cut_axes == ()
            return
        with pytest.raises(ConfigError, match="build it without them"):
            _ = model.axes


class TestModes:
    def test_what_works_is_found_out(self) -> None:
        model = wrapped(TWINS["cnn"][0])
        assert (model.traits.has_images, model.traits.supports_stacking) == (True, True)
        assert not wrapped(TWINS["mlp"][0]).traits.has_images

    def test_a_module_that_needs_contiguous_images(self) -> None:
        convolution, tail = partial(nn.Conv2d, 2, 3, 3), partial(nn.Linear, 3 * 42, 4)
        assert of_layers(convolution, lambda x: x.flatten(1), tail).traits.has_images
        assert not of_layers(convolution, lambda x: x.view(len(x), -1), tail).traits.has_images
        found = of_layers(convolution, lambda x: x.flatten(1), tail)
        for axes in (found.whole_axes, found.axes):
            layout = Layout.of(found.shapes, axes)
            assert layout.convolutions == {name for name, shape in found.shapes.items() if len(shape) == 4}
            assert layout.cut(0.5).convolves

    def test_a_module_that_cannot_be_stacked(self) -> None:
        decide = lambda x: x if bool(torch.isfinite(x.detach().sum())) else x * 0  # noqa: E731
        assert not of_layers(FLAT, HEAD, TAIL, decide).traits.supports_stacking


class TestInit:
    def test_depends_on_the_source_alone(self) -> None:
        model = wrapped(TWINS["cnn"][0])
        torch.manual_seed(1)
        first = initial(model, 3)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        again, other = initial(model, 3), initial(model, 4)
        assert torch.equal(torch.get_rng_state(), state)
        assert list(first) == list(model.shapes)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)

    def test_is_the_modules_own(self) -> None:
        model = wrapped(TWINS["resnet"][0])
        params = initial(model)
        assert torch.equal(params["norm.weight"], torch.ones(32))
        assert torch.equal(params["norm.bias"], torch.zeros(32))
        assert params["output.weight"].abs().max() <= 32**-0.5


class Counting(nn.Linear):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Dropping(nn.LSTM):
    """A recurrent layer whose dropout is out of reach."""

    def __init__(self) -> None:
        super().__init__(8, 6, num_layers=2, dropout=0.5, batch_first=True)


class Table(nn.Linear):
    """A layer with a constant buffer."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.table)


REFUSED = {
    "noise": ((FLAT, HEAD, lambda x: x + torch.randn_like(x), TAIL), "draws random numbers"),
    "dropout": ((lambda x: x[:, 0], partial(Dropping), lambda x: x[0][:, -1], TAIL), "draws random numbers"),
    "buffer": ((FLAT, HEAD, partial(Counting)), "changes the buffer '2.calls'"),
    "parameter": (
        (lambda x: x.flatten(1).abs().long(), partial(nn.Embedding, 9, 4, max_norm=0.1), lambda x: x.mean(1)),
        r"changes the parameter '1\.weight' in place",
    ),
    "float64": ((FLAT, partial(nn.Linear, 144, 4, dtype=torch.float64)), "'1.weight' is torch.float64"),
    "nothing": ((lambda x: x.flatten(1)[:, :4],), "has no parameters"),
    "input": ((FLAT, partial(nn.Linear, 9, 4)), r"fails on a batch of shape \(3, 2, 9, 8\)"),
    "labels": ((FLAT, partial(nn.Linear, 144, 7)), r"returns \(3, 7\): return one tensor of logits, here \(3, 4\)"),
    "tuple": ((FLAT, HEAD, TAIL, lambda x: (x, x)), "returns tuple"),
    "weightless": ((FLAT, HEAD, partial(nn.BatchNorm1d, 6, affine=False), TAIL), "'2' has no weight"),
}
NOT_CUT = {
    "unknown": ((FLAT, HEAD, lambda x: torch.cdist(x, x), partial(nn.Linear, 3, 4)), "_cdist_forward"),
    "sizes": (
        (FLAT, HEAD, lambda x: x.view(-1, 2, 3).flatten(1), TAIL),
        "half its width.*take sizes from tensors.*1.heads",
    ),
    "by way of numpy": (
        (FLAT, HEAD, lambda x: torch.from_numpy(x.detach().numpy().copy()), TAIL),
        "fails at half its width",
    ),
}


class Heads(nn.Module):
    """Attention as it is often written: so many heads, of whatever size."""

    def __init__(self, input_shape: tuple[int, ...], num_labels: int, stream: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embed, self.qkv = nn.Linear(input_shape[-1], stream), nn.Linear(stream, 3 * stream)
        self.project, self.output = nn.Linear(stream, stream), nn.Linear(stream, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.output((x + self.project(mixed.transpose(1, 2).flatten(2))).mean(1))


class Shuffled(nn.Module):
    """A channel shuffle (ShuffleNet), which regroups the channels that are left."""

    def __init__(self, input_shape: tuple[int, ...], num_labels: int) -> None:
        super().__init__()
        self.stem, self.output = nn.Conv2d(input_shape[0], 8, 3), nn.Linear(8, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.output(x.mean((2, 3)))


class TestAnotherFunction:
    """A sub-model must compute what the whole model does without the rest, or it is refused."""

    def test_heads_of_a_written_number_are_narrowed(self) -> None:
        model = ModuleModel(lambda: Heads((1, 8, 8), 10), (1, 8, 8), 10)
        axis = as_dim(model.axes["qkv.weight"][0])
        assert (axis.axis, axis.outer, axis.inner) == ("qkv.head-dim", 12, 1)

    def test_whole_heads_can_be_asked_for_and_are_refused(self) -> None:
        model = ModuleModel(lambda: Heads((1, 8, 8), 10), (1, 8, 8), 10, attention="heads")
        with pytest.raises(ConfigError, match="'Heads' is another function at half its width"):
            _ = model.axes

    def test_a_channel_shuffle(self) -> None:
        """Half of either group of channels can be shuffled, one group alone cannot."""
        model = ModuleModel(lambda: Shuffled((1, 8, 8), 10), (1, 8, 8), 10)
        assert as_dim(model.axes["stem.weight"][0]) == Dim("stem.head-dim", outer=2)
        model = ModuleModel(lambda: Shuffled((1, 8, 8), 10), (1, 8, 8), 10, attention="heads")
        with pytest.raises(ConfigError, match=r"'Shuffled' is another function .* keep some of its axes whole"):
            _ = model.axes

    def test_a_constant_of_single_precision(self) -> None:
        class Constant(Heads):
            """Heads after a multiplication by a constant."""

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x @ torch.eye(x.shape[-1]))

        model = ModuleModel(lambda: Constant((1, 8, 8), 10), (1, 8, 8), 10, attention="heads")
        with pytest.raises(ConfigError, match="'Constant' is another function"):
            _ = model.axes
        assert "qkv.head-dim" in str(ModuleModel(lambda: Constant((1, 8, 8), 10), (1, 8, 8), 10).axes)


class TestRefused:
    @pytest.mark.parametrize("name", REFUSED)
    def test_with_the_reason(self, name: str) -> None:
        layers, message = REFUSED[name]
        with pytest.raises(ConfigError, match=message):
            of_layers(*layers)

    @pytest.mark.parametrize("name", NOT_CUT)
    def test_only_where_it_would_be_cut(self, name: str) -> None:
        layers, message = NOT_CUT[name]
        model = of_layers(*layers)
        assert model.apply(initial(model), inputs(3)).shape == (3, 4)
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                _ = model.axes

    def test_what_is_fine(self) -> None:
        assert of_layers(FLAT, HEAD, partial(nn.Dropout, 0.0), partial(Table)).axes["1.bias"] == (None,)
        assert of_layers(FLAT, HEAD, lambda x: x.unflatten(1, (-1, 3)).flatten(1), TAIL).axes["1.bias"] == (
            Dim("1.heads", inner=3),
        )


class TestWorkload:
    @pytest.mark.parametrize("name", ["TinyNet", "TinyPerceptron", "Unusual"])
    def test_contract(self, name: str) -> None:
        options = {
            "dataset": DATA,
            "model": f"reference_modules:{name}",
            "evaluation_chunk": 11,
            "statistics_chunk": 40,
        }
        check_workload(ImageClassification(options, num_clients=4, partition={"name": "n-classes", "n": 2}, seed=0))

    def test_options_reach_the_module(self) -> None:
        model = {"name": "reference_modules:TinyNet", "width": 5}
        workload = ImageClassification({"dataset": DATA, "model": model}, num_clients=4, partition="iid", seed=0)
        assert workload.layout.widths == {"stem": 5, "body.0": 10, "label": 4}
        with pytest.raises(ConfigError, match="does not take these options"):
            ImageClassification(
                {"dataset": DATA, "model": model | {"depth": 2}}, num_clients=4, partition="iid", seed=0
            )


class TestFederation:
    CHANGES = {
        "workload.dataset": {"name": "synthetic", "num_train": 150, "num_test": 40, "num_labels": 4, "noise": 0.3},
        "workload.model": "reference_modules:TinyNet",
        "algorithm": "fedrolex",
        "submodel": {"capacities": [1.0, 0.5]},
        "clients.per_round": 8,
        "train.lr": 0.2,
        "train.epochs": 2,
        "rounds": 3,
    } | modes([1.0, 0.5])

    def test_learns_alike_with_any_number_of_workers(self, tmp_path: Path) -> None:
        done = run(configure(self.CHANGES), out=tmp_path / "a")
        losses = [record["loss"] for record in done.metrics if "loss" in record]
        accuracies = [record["accuracy"] for record in done.metrics if "accuracy" in record]
        assert losses[-1] < 0.6 * losses[0]
        assert accuracies[-1] > 0.8
        assert_same(done, run(configure(self.CHANGES | {"engine.workers": 2}), out=tmp_path / "b"))


def classification(model: Any, **options: Any) -> ImageClassification:
    """Return a workload of images that trains a model."""
    data = DATA | {"shape": [1, 8, 8]}
    given = {"dataset": data, "model": model} | options.pop("options", {})
    return ImageClassification(given, num_clients=options.pop("num_clients", 4), partition="iid", seed=0, **options)


USERS = "Recurrent HalfFrozen Adapted Instances Attentive Encoder Tied ResNet Drawn FixedNorm"


class TestUsersModules:
    """Modules whose authors thought of whole models only."""

    @pytest.mark.parametrize("name", USERS.split())
    def test_train_whole(self, name: str, tmp_path: Path) -> None:
        """Their loss is PyTorch's, and they are trained."""
        workload = classification(f"user_modules:{name}", whole_models=True)
        check_workload(workload)
        model, row = workload.model, workload.init(0)
        params = workload.params_of(row)
        module = getattr(user_modules, name)((1, 8, 8), 4)
        module.load_state_dict(params | dict(model._module.named_buffers()), strict=False)
        x = torch.randn(5, 1, 8, 8)
        expected = module.train()(x)
        expected.square().sum().backward()
        assert torch.allclose(model.apply(workload.layout.views(row), x), expected, atol=1e-5)
        if not model.norms:  # whose running moments PyTorch would take
            with torch.no_grad():
                expected = module.eval()(x)
            found = model.apply(workload.layout.views(row), x, ForwardContext(training=False))
            assert torch.allclose(found, expected, atol=1e-5)
        config = configure({"workload.model": f"user_modules:{name}", "rounds": 1})
        done, before = run(config, out=tmp_path / "run"), load_workload(parse(config))
        start = before.params_of(before.init(0))
        assert list(done.params) == [name for name, _ in module.named_parameters()]
        moved = {key for key, value in done.params.items() if not torch.equal(value, start[key])}
        trained = [(key, value.grad) for key, value in module.named_parameters() if value.grad is not None]
        assert moved >= {key for key, grad in trained if grad.norm() > 1e-5}

    @pytest.mark.parametrize("name", ["Instances", "Encoder", "Attentive"])
    def test_are_refused_where_they_would_be_cut(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"half its width|cut|axes"):
            classification(f"user_modules:{name}", whole_models=False)

    def test_moments_that_are_constants_are_not_cut(self) -> None:
        workload = classification("user_modules:FixedNorm")
        assert workload.model.norms == ()
        assert workload.layout.cut_axes == ("after",)

    def test_evaluation_mode(self) -> None:
        class Modal(nn.Linear):
            """A linear layer that gives three times as much in evaluation."""

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.flatten(1)) * (1.0 if self.training else 3.0)

        model = wrapped(partial(Modal, 144, 4))
        params = initial(model)
        trained, evaluated = (model.apply(params, inputs(2), ForwardContext(training=one)) for one in (True, False))
        assert torch.equal(evaluated, trained * 3)
        workload = classification("user_modules:Recurrent")
        seen: list[bool] = []
        workload.model._module.register_forward_pre_hook(lambda module, _: seen.append(module.training))
        workload.evaluate(workload.layout.views(workload.init(0)), {}, 0)
        assert seen == [False]

    def test_a_batch_of_one_is_warned_of_where_batch_norm_has_one_value(self) -> None:
        flat, image = classification("user_modules:Adapted"), classification("user_modules:ResNet")
        assert sorted(flat.num_samples.tolist()) == [18, 19, 19, 19]
        (message,) = flat.warnings_of(18)
        assert message.startswith("3 of 4 clients have a batch of one sample, whose channels BatchNorm 'norm'")
        assert flat.warnings_of(16) == image.warnings_of(18) == ()


class TestBuild:
    def test_parameters_and_buffers_come_from_one_seeded_build(self) -> None:
        torch.manual_seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        first, again = (classification("user_modules:Drawn") for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        other = ImageClassification(
            {"dataset": DATA, "model": "user_modules:Drawn"}, num_clients=4, partition="iid", seed=1
        )
        drawn = [one.model._module.drawn for one in (first, again, other)]
        assert torch.equal(drawn[0], drawn[1])
        assert not (drawn[0] == drawn[2]).any()
        built: list[Tensor] = []

        class Recorded(user_modules.Drawn):
            """A module that notes what it drew when it was built."""

            def __init__(self) -> None:
                super().__init__(SHAPE, NUM_LABELS)
                built.append(self.weight.detach()[0, 0] + self.drawn[0])

        model = ModuleModel(Recorded, SHAPE, NUM_LABELS)
        model.reseed(np.random.default_rng(5))
        weight = model.init(np.random.default_rng(5))["weight"]
        assert built[-1] == weight[0, 0] + model._module.drawn[0]

    def test_of_a_module_that_is_wrapped_already(self) -> None:
        plain, wrapped = (classification(f"user_modules:{name}") for name in ("Drawn", "wrapped_drawn"))
        assert torch.equal(plain.init(0), wrapped.init(0))
        assert torch.equal(plain.model._module.drawn, wrapped.model._module.drawn)

    def test_other_sources_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'Unseeded' is not built alike twice from one seed \('drawn' differs\)"):
            classification("user_modules:Unseeded")

    def test_what_is_said_of_a_module_that_changes_its_input(self) -> None:
        with pytest.raises(ConfigError, match="changes its input in place"):
            of_layers(lambda x: x.mul_(2), FLAT, HEAD, TAIL)

    def test_what_is_said_of_a_module_that_remembers(self) -> None:
        calls: list[int] = []
        with pytest.raises(ConfigError, match="something else when it is given the same again"):
            of_layers(FLAT, HEAD, lambda x: (calls.append(1), x * len(calls))[1], TAIL)

    def test_a_lazy_layer(self) -> None:
        with pytest.raises(ConfigError, match=r"'1\.weight' has no size before the first batch"):
            of_layers(FLAT, partial(nn.LazyLinear, 4))

    def test_everything_frozen(self) -> None:
        with pytest.raises(ConfigError, match="has no parameters that require a gradient"):
            wrapped(lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 4)).requires_grad_(False))


FROZEN = {
    "HalfFrozen": ("1.weight", "1.bias"),
    "Adapted": ("first.base.weight", "first.base.bias", "norm.weight", "norm.bias", "second.base.weight"),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "singly": modes(),
    "stacked": modes(**STACKED),
    "momentum": {"train.momentum": 0.9},
    "sub-models": mixed("fedrolex"),
    "stacked sub-models": mixed("fedrolex", **STACKED),
    "fiarse": mixed("fiarse"),
    "fjord": mixed("fjord") | {"algorithm": {"name": "fjord", "distillation": True}},
    "scaffold": {"algorithm": "scaffold"},
    "peers": {"algorithm": "dsgd", "clients": None, "peers": {"num": 4, "topology": "ring"}},
    "unequal peers": {"algorithm": "dsgd", "clients": None, "peers": {"num": 4, "topology": "ring"}}
    | {"submodel": {"capacities": [0.5, 1.0]}}
    | modes([0.5, 1.0]),
}


class TestFrozen:
    """Parameters that require no gradient."""

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("training", TRAININGS)
    @pytest.mark.parametrize("name", FROZEN)
    def test_keep_their_bits(self, name: str, training: str, tmp_path: Path) -> None:
        if name == "Adapted" and training.startswith("stacked"):
            pytest.skip("batches of BatchNorm are not padded")
        changes = {"workload.model": f"user_modules:{name}", "train.weight_decay": 0.3, "rounds": 2}
        config = {key: value for key, value in configure(changes | TRAININGS[training]).items() if value is not None}
        done, workload = run(config, out=tmp_path / "run"), load_workload(parse(config))
        before = workload.params_of(workload.init(0))
        assert list(done.params) == list(before)
        for key, value in before.items():
            is_kept = key in FROZEN[name] or key.startswith("unused") or key == "second.base.bias"
            same = torch.equal if key in FROZEN[name] else torch.allclose  # peers average what nobody trains, too
            assert same(done.params[key], value) == is_kept, key

    def test_as_pytorch_trains(self, tmp_path: Path) -> None:
        """One client, full batches: what gets no gradient is not moved by weight decay or momentum, either."""
        changes = {
            "workload.model": "user_modules:HalfFrozen",
            "clients": {"num": 1, "per_round": 1},
            "train": {"lr": 0.1, "batch_size": 200, "steps": 4, "momentum": 0.9, "weight_decay": 0.1},
            "rounds": 1,
        }
        config = configure(changes)
        workload = load_workload(parse(config))
        module = user_modules.HalfFrozen((1, 8, 8), 10)
        module.load_state_dict(workload.params_of(workload.init(0)))
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        batch = workload.batch(np.zeros(1, dtype=np.int64), np.arange(150)[None]).samples
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(module(batch["x"][0]), batch["y"][0]).backward()
            optimizer.step()
        found = run(config, out=tmp_path / "run").params
        for name, value in module.state_dict().items():
            assert torch.allclose(found[name], value, atol=1e-5), name

    def test_are_neither_sent_nor_counted(self, tmp_path: Path) -> None:
        """By hand: of 64 -> 20 -> 12 -> 10, and 3 -> 5 unused, the first layer is frozen."""
        free = run(
            configure({"workload.model": {"name": "user_modules:HalfFrozen", "freeze": False}, "rounds": 1}),
            out=tmp_path / "free",
        )
        frozen = run(configure({"workload.model": "user_modules:HalfFrozen", "rounds": 1}), out=tmp_path / "frozen")
        (whole,), (part,) = events(free.directory, "variant"), events(frozen.directory, "variant")
        size, first = 65 * 20 + 21 * 12 + 13 * 10 + 20, 65 * 20
        assert (whole["num_parameters"], part["num_parameters"]) == (size, size - first)
        assert (whole["bytes_up"], part["bytes_up"]) == (4 * size, 4 * (size - first))
        rest = 2 * (20 * 12 + 12 * 10)
        assert whole["flops_per_sample"] == 2 * (2 * 64 * 20) + 3 * rest
        assert part["flops_per_sample"] == 2 * 64 * 20 + 3 * rest - 2 * 20 * 12  # no gradient by the second's input
        assert frozen.metrics[-1]["total_bytes_up"] == 5 * part["bytes_up"]

    def test_belong_to_the_digest(self) -> None:
        first, again, free = (
            classification({"name": "user_modules:HalfFrozen", "freeze": freeze}) for freeze in (True, True, False)
        )
        assert first.digest() == again.digest() != free.digest()
        first.model.frozen["1.bias"][0] += 1
        assert first.digest() != again.digest()

    def test_are_not_cut(self) -> None:
        """A rank is; a layer that a frozen one reads is not."""
        workload = classification("user_modules:Adapted")
        axes = workload.model.axes
        assert axes["first.a"] == (*axes["first.b"][1:], None) == ("first.a", None)
        assert axes["output.weight"] == ("label", None)
        assert workload.layout.cut(0.5).num_parameters < workload.layout.num_parameters
        traced = trace_axes(user_modules.Adapted((1, 8, 8), 4), torch.randn(2, 1, 8, 8))
        assert traced["first.base.weight"] == (None, None)
