"""Models: parameter counts, equality with plain modules, stacked evaluation, axes and sub-models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import ConfigError
from gossamer.submodel.layout import LABEL_AXIS, Layout
from gossamer.submodel.windows import Window
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.models import CNN, MLP, ImageModel, Softmax
from gossamer.workloads.resnet import PreActResNet18

SHAPES = {Softmax: (2, 6, 5), MLP: (2, 6, 5), CNN: (2, 9, 8), PreActResNet18: (2, 9, 8)}
EVERY_MODEL = list(SHAPES)


def source(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def small(model: type[ImageModel], **options: Any) -> ImageModel:
    return model(SHAPES[model], 4, **({"width": 0.125} | options))


def layout_of(model: ImageModel) -> Layout:
    return Layout.of(model.shapes, model.axes)


def inputs(model: type[ImageModel], *lead: int, seed: int = 0) -> Tensor:
    return torch.randn(*lead, *SHAPES[model], generator=torch.Generator().manual_seed(seed))


class PlainMLP(nn.Sequential):
    """The perceptron as one would write it."""

    def __init__(self, size: int, num_labels: int) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(size, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, num_labels)
        )


class PlainCNN(nn.Sequential):
    """McMahan's network as one would write it."""

    def __init__(self, channels: int, pixels: int, num_labels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * pixels, 512),
            nn.ReLU(),
            nn.Linear(512, num_labels),
        )


class PlainBlock(nn.Module):
    """A pre-activation block, with modules in the order in which gossamer names its parameters."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(before, track_running_stats=False)
        self.conv0 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after, track_running_stats=False)
        self.conv1 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if stride != 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm0(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return self.conv1(F.relu(self.norm1(self.conv0(hidden)))) + shortcut


class PlainPreActResNet18(nn.Module):
    """The residual network as one would write it."""

    def __init__(self, channels: int, num_labels: int, widths: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        before, blocks = widths[0], []
        for stage, width in enumerate(widths):
            for number in range(2):
                blocks.append(PlainBlock(before, width, 2 if stage > 0 and number == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before, track_running_stats=False)
        self.output = nn.Linear(before, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.output(F.adaptive_avg_pool2d(x, 1).flatten(1))


def plain_twin(model: type[ImageModel]) -> nn.Module:
    """The twin of ``model`` at width 1 (the residual network: 1/8)."""
    channels, height, width = SHAPES[model]
    if model is MLP:
        return PlainMLP(channels * height * width, 4)
    if model is CNN:
        return PlainCNN(channels, (height // 4) * (width // 4), 4)
    return PlainPreActResNet18(channels, 4, [8, 16, 32, 64])


def test_parameter_counts() -> None:
    assert layout_of(Softmax((1, 28, 28), 10)).num_parameters == 7_850
    assert layout_of(MLP((1, 28, 28), 10)).num_parameters == 199_210
    assert layout_of(MLP((1, 28, 28), 10, hidden=[])).num_parameters == 7_850
    assert layout_of(CNN((1, 28, 28), 10)).num_parameters == 1_663_370


@pytest.mark.parametrize(
    ("width", "count"), [(1, 11_172_170), (1 / 2, 2_796_714), (1 / 4, 701_018), (1 / 8, 176_178), (1 / 16, 44_510)]
)
def test_resnet_parameter_counts(width: float, count: int) -> None:
    """The published counts of FedRolex's protocol."""
    assert layout_of(PreActResNet18((3, 32, 32), 10, width=width)).num_parameters == count


@pytest.mark.parametrize("model", EVERY_MODEL)
@pytest.mark.parametrize("width", [0.5, 0.3, 0.01])
def test_width_equals_a_cut_of_the_full_model(model: type[ImageModel], width: float) -> None:
    full, narrow = layout_of(small(model, width=1.0)), layout_of(small(model, width=width))
    assert narrow.shapes == full.cut(width).shapes
    assert narrow.names == full.names


@pytest.mark.parametrize("model", [MLP, CNN, PreActResNet18])
def test_forward_and_gradient_equal_a_plain_module(model: type[ImageModel]) -> None:
    torch.manual_seed(0)
    twin = plain_twin(model)
    mine = small(model, width=0.125 if model is PreActResNet18 else 1.0)
    theirs = list(twin.parameters())
    assert [tuple(parameter.shape) for parameter in theirs] == list(mine.shapes.values())
    with torch.no_grad():
        for parameter in theirs:  # away from the 1s and 0s of fresh normalisations
            parameter += 0.1 * torch.rand_like(parameter)
    params = {name: value.detach().clone().requires_grad_() for name, value in zip(mine.shapes, theirs, strict=True)}
    x = inputs(model, 5)
    logits, expected = mine.apply(params, x), twin(x)
    assert torch.allclose(logits, expected, atol=1e-5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for value, parameter in zip(params.values(), theirs, strict=True):
        assert torch.allclose(value.grad, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_stacked_equals_one_by_one(model: type[ImageModel]) -> None:
    mine, x = small(model), inputs(model, 3, 4)
    rows = [mine.init(source(seed)) for seed in range(3)]
    labels = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 2]])

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(mine.apply(params, x, ForwardContext(scale=2.0)), y)

    stacked = {name: torch.stack([row[name] for row in rows]).requires_grad_() for name in mine.shapes}
    losses = torch.vmap(loss)(stacked, x, labels)
    losses.sum().backward()
    for i, row in enumerate(rows):
        alone = {name: value.requires_grad_() for name, value in row.items()}
        value = loss(alone, x[i], labels[i])
        value.backward()
        assert torch.allclose(losses[i], value, atol=1e-5)
        for name, parameter in alone.items():
            assert torch.allclose(stacked[name].grad[i], parameter.grad, atol=2e-5, rtol=1e-3), name


@pytest.mark.parametrize("model", [CNN, PreActResNet18])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_stays_and_changes_nothing(model: type[ImageModel], channels: int) -> None:
    mine = model((channels, 8, 8), 4, width=0.25)
    params = mine.init(source())
    x = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    last = torch.empty(3, 8, 8, channels).copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    seen: list[bool] = []
    pool, norm = F.max_pool2d, torch.batch_norm
    with pytest.MonkeyPatch.context() as patch:

        def spy(function: Any) -> Any:
            def watched(x: Tensor, *args: Any) -> Tensor:
                seen.append(x.is_contiguous(memory_format=torch.channels_last))
                return function(x, *args)

            return watched

        patch.setattr(F, "max_pool2d", spy(pool))
        patch.setattr(torch, "batch_norm", spy(norm))
        logits = mine.apply(params, last)
    assert seen
    assert all(seen)
    assert torch.allclose(logits, mine.apply(params, x), atol=1e-4)


def test_resnet_has_twelve_width_groups() -> None:
    layout = layout_of(PreActResNet18((3, 32, 32), 10))
    assert sorted(layout.widths[axis] for axis in layout.cut_axes) == sorted([64, 128, 256, 512] * 3)
    axes = dict(zip(layout.names, layout.axes, strict=True))
    for stage in range(4):  # both operands of every residual sum lie on the stage's stream
        outputs = [f"stage{stage}.block{number}.conv1.weight" for number in range(2)]
        outputs.append(f"stage{stage}.block0.shortcut.weight" if stage else "stem.weight")
        assert {axes[name][0].axis for name in outputs} == {f"stage{stage}"}
    assert ("stage0.block0.shortcut.weight" in axes, "stage1.block0.shortcut.weight" in axes) == (False, True)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_channels_and_classes_are_never_cut(model: type[ImageModel]) -> None:
    mine = small(model, width=1.0)
    layout = layout_of(mine)
    cut = dict(zip(layout.names, layout.cut(1 / 16).shapes, strict=True))
    first = next(iter(mine.shapes))
    assert cut[first][1] == mine.shapes[first][1]
    assert cut["output.weight"][0] == cut["output.bias"][0] == 4
    for name in ("output.weight", "output.bias"):
        assert layout.axes[layout.names.index(name)][0].axis == LABEL_AXIS


def cut_by_hand(layout: Layout, params: dict[str, Tensor], windows: dict[str, Window]) -> dict[str, Tensor]:
    """Select the windows' entries of every dimension, one index at a time."""
    cut = {}
    for name, dims in zip(layout.names, layout.axes, strict=True):
        value = params[name]
        for at, dim in enumerate(dims):
            if dim.cuttable:
                keep = [c * dim.inner + i for c in windows[dim.axis].indices for i in range(dim.inner)]
                value = value.index_select(at, torch.tensor(keep))
        cut[name] = value
    return cut


@pytest.mark.parametrize("model", [MLP, CNN, PreActResNet18])
def test_a_cut_model_equals_the_full_one_with_the_rest_silenced(model: type[ImageModel]) -> None:
    """Channels outside the window, if they read and send nothing, must not be noticed by the others."""
    mine = small(model, width=0.125)
    layout = layout_of(mine)
    params = mine.init(source())
    windows = {
        axis: Window.of_indices(width, np.sort(source(i).permutation(width)[: max(1, width // 2)]))
        for i, (axis, width) in enumerate((axis, layout.widths[axis]) for axis in layout.cut_axes)
    }
    cut = cut_by_hand(layout, params, windows)
    assert tuple(tuple(value.shape) for value in cut.values()) == layout.windowed(windows).shapes
    silenced = {}
    for name, dims in zip(layout.names, layout.axes, strict=True):
        value = params[name].clone()
        for at, dim in enumerate(dims):
            if dim.cuttable:
                held = np.repeat(np.isin(np.arange(layout.widths[dim.axis]), windows[dim.axis].indices), dim.inner)
                value = value * torch.from_numpy(held).float().view([-1 if i == at else 1 for i in range(value.dim())])
        silenced[name] = value
    x = inputs(model, 3)
    assert torch.allclose(mine.apply(cut, x), mine.apply(silenced, x), atol=1e-5)


def test_scale_multiplies_hidden_layers_only() -> None:
    mine = MLP((1, 2, 2), 3, hidden=[5, 6])
    params, x = mine.init(source()), torch.randn(4, 1, 2, 2)
    hidden = x.flatten(1)
    for i in range(2):
        hidden = F.relu(2.5 * (hidden @ params[f"hidden{i}.weight"].T + params[f"hidden{i}.bias"]))
    expected = hidden @ params["output.weight"].T + params["output.bias"]
    assert torch.allclose(mine.apply(params, x, ForwardContext(scale=2.5)), expected, atol=1e-5)
    linear = small(Softmax)
    pixels = inputs(Softmax, 2)
    assert torch.equal(
        linear.apply(linear.init(source()), pixels, ForwardContext(scale=9.0)),
        linear.apply(linear.init(source()), pixels),
    )


def test_scale_acts_before_every_normalisation() -> None:
    """A scaled input of BatchNorm is normalised away, but for epsilon: the residual stream itself stays as it is."""
    mine = PreActResNet18((1, 8, 8), 4, width=0.125)
    params, x = mine.init(source()), torch.randn(6, 1, 8, 8)
    one, seen = {}, {}
    logits = mine.apply(params, x, ForwardContext(record=one))
    scaled = mine.apply(params, x, ForwardContext(scale=4.0, record=seen))
    assert torch.allclose(logits, scaled, atol=0.02)
    assert not torch.equal(logits, scaled)
    for layer in ("stage0.block0.norm0", "stage0.block1.norm0"):
        assert torch.allclose(seen[f"{layer}.sum"], 4 * one[f"{layer}.sum"], rtol=1e-2, atol=1.0), layer


def test_recorded_sums_are_exact_and_additive() -> None:
    """Sums over pieces equal those of the whole where the layer sees the data itself; moments match numpy's."""
    mine = PreActResNet18((2, 8, 8), 4, width=0.125)
    params, x = mine.init(source()), torch.randn(10, 2, 8, 8) + 3
    whole: dict[str, Tensor] = {}
    mine.apply(params, x, ForwardContext(record=whole))
    assert {name.rpartition(".")[0] for name in whole} == set(mine.norms)
    assert len(mine.norms) == 17
    parts: list[dict[str, Tensor]] = [{}, {}]
    for record, piece in zip(parts, (x[:3], x[3:]), strict=True):
        mine.apply(params, piece, ForwardContext(record=record))
    stem = F.conv2d(x.double(), params["stem.weight"].double(), padding=1).numpy()
    for key in ("sum", "squares", "count"):
        name = f"stage0.block0.norm0.{key}"
        assert whole[name].dtype == torch.float64
        assert torch.allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-5)
    count = whole["stage0.block0.norm0.count"]
    mean = whole["stage0.block0.norm0.sum"] / count
    variance = whole["stage0.block0.norm0.squares"] / count - mean**2
    assert mean.numpy() == pytest.approx(stem.mean((0, 2, 3)), rel=1e-4, abs=1e-5)
    assert variance.numpy() == pytest.approx(stem.var((0, 2, 3)), rel=1e-4)


def test_statistics_of_a_batch_reproduce_the_batch() -> None:
    mine = PreActResNet18((2, 8, 8), 4, width=0.125)
    params, x, record = mine.init(source()), torch.randn(10, 2, 8, 8), {}
    logits = mine.apply(params, x, ForwardContext(record=record))
    assert torch.allclose(mine.apply(params, x, ForwardContext(statistics=record)), logits, atol=1e-4)
    assert torch.allclose(mine.apply(params, x[:1], ForwardContext(statistics=record)), logits[:1], atol=1e-4)
    assert not torch.allclose(mine.apply(params, x[:1]), logits[:1], atol=1e-2)


def test_a_single_value_a_channel_is_normalised_to_the_bias() -> None:
    mine = PreActResNet18((1, 8, 8), 4, width=0.125)
    params = {name: value.requires_grad_() for name, value in mine.init(source()).items()}
    logits = mine.apply(params, torch.randn(1, 1, 8, 8))
    logits.sum().backward()
    assert torch.allclose(logits, params["output.bias"], atol=1e-3)
    assert all(bool(value.grad.isfinite().all()) for value in params.values())


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_initial_values_are_pytorchs(model: type[ImageModel]) -> None:
    mine = small(model, width=1.0)
    params, again = mine.init(source(3)), mine.init(source(3))
    for name, value in params.items():
        assert torch.equal(value, again[name])
        weight = params[name.rpartition(".")[0] + ".weight"]
        if weight.dim() == 1:
            assert bool((value == (1.0 if name.endswith("weight") else 0.0)).all()), name
            continue
        bound = weight[0].numel() ** -0.5
        assert value.abs().max() <= bound
        if value.numel() > 1000:
            assert value.abs().max() > 0.99 * bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(params["output.weight"], mine.init(source(4))["output.weight"])


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"workload\.model\.hiden.*did you mean 'hidden'"):
        MLP((1, 8, 8), 10, hiden=[3])
    with pytest.raises(ConfigError, match=r"workload\.model\.hidden\.1 = 0"):
        MLP((1, 8, 8), 10, hidden=[3, 0])
    with pytest.raises(ConfigError, match=r"workload\.model\.width = 2"):
        CNN((1, 8, 8), 10, width=2.0)
    with pytest.raises(ConfigError, match="3 x 8 pixels"):
        CNN((1, 3, 8), 10)
