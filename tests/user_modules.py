"""Modules as users write them, who think of whole models only; images are [c, 8, 8]."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.workloads.modules import ModuleModel
from gossamer.workloads.sample_data import SampleData

Shape = tuple[int, int, int]


class Recurrent(nn.Module):
    """Rows of an image as time steps of a recurrent layer; `kind` is LSTM, GRU or RNN."""

    def __init__(self, input_shape: Shape, num_labels: int, kind: str = "GRU", hidden: int = 16) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(input_shape[0] * input_shape[2], hidden, batch_first=True)
        self.output = nn.Linear(hidden, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.recurrent(x.transpose(1, 2).flatten(2))[0][:, -1])


class LowRank(nn.Module):
    """A frozen linear layer and two trained factors beside it (LoRA)."""

    def __init__(self, before: int, after: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(before, after)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, before) / 8), nn.Parameter(torch.zeros(after, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Adapted(nn.Module):
    """A frozen network with trained low-rank factors and a trained output layer."""

    def __init__(self, input_shape: Shape, num_labels: int, hidden: int = 24, rank: int = 4) -> None:
        super().__init__()
        self.first = LowRank(math.prod(input_shape), hidden, rank)
        self.norm = nn.BatchNorm1d(hidden).requires_grad_(False)
        self.second = LowRank(hidden, hidden, rank)
        self.output = nn.Linear(hidden, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.second(F.relu(self.norm(self.first(x.flatten(1)))))))


class HalfFrozen(nn.Sequential):
    """A perceptron whose first layer is frozen, and which has a layer that nothing uses."""

    def __init__(self, input_shape: Shape, num_labels: int, freeze: bool = True) -> None:
        size = math.prod(input_shape)
        super().__init__(nn.Flatten(), nn.Linear(size, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU())
        self.output, self.unused = nn.Linear(12, num_labels), nn.Linear(3, 5)
        self[1].requires_grad_(not freeze)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            x = layer(x)
        return self.output(x)


class Instances(nn.Module):
    """Convolutions with InstanceNorm and weight normalisation, and sizes that are written down."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(input_shape[0], 8, 3, padding=1))
        self.norm = nn.InstanceNorm2d(8, affine=True)
        with warnings.catch_warnings(action="ignore"):
            self.output = torch.nn.utils.weight_norm(nn.Linear(512, num_labels))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.norm(self.first(x))).view(-1, 512))


class Attention(nn.Module):
    """Self-attention as in the models of Hugging Face; written by matrix products, or by PyTorch's own function."""

    def __init__(self, stream: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = num_heads, stream // num_heads, fused
        self.query, self.key, self.value, self.project = (nn.Linear(stream, stream) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """Return [b, heads, length, channels of a head]."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1) @ value
        mixed = mixed.permute(0, 2, 1, 3).contiguous()
        return self.project(mixed.view(mixed.shape[0], mixed.shape[1], self.num_heads * self.head_dim))


class Attentive(nn.Module):
    """Rows of an image as tokens of one attention layer."""

    def __init__(self, input_shape: Shape, num_labels: int, fused: bool = False, stream: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(input_shape[0] * input_shape[2], stream)
        self.attention = Attention(stream, 4, fused)
        self.output = nn.Linear(stream, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(1, 2).flatten(2))
        return self.output((x + self.attention(x)).mean(1))


class Encoder(nn.Module):
    """PyTorch's own encoder, and attention whose keys and values have sizes of their own."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_shape[0] * input_shape[2], 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attend = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, add_bias_kv=True, batch_first=True)
        self.narrow, self.output = nn.Linear(16, 8), nn.Linear(16, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x.transpose(1, 2).flatten(2)))
        kept = self.narrow(x)
        return self.output((x + self.attend(x, kept, kept, need_weights=False)[0]).mean(1))


class Dropping(nn.Module):
    """An encoder with dropout in attention and between layers, of features and of whole channels."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_shape[0] * input_shape[2], 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
        self.drop, self.output = nn.Dropout1d(0.2), nn.Linear(8, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.embed(x.transpose(1, 2).flatten(2)), 0.1, self.training)
        return self.output(self.drop(self.encoder(x)).mean(1))


class Tied(nn.Module):
    """An autoencoder's two layers of one weight, and a buffer that is drawn."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        size = math.prod(input_shape)
        self.register_buffer("features", torch.randn(size, 20) / 8)
        self.there, self.back = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
        self.back.weight = self.there.weight
        self.output = nn.Linear(20, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cos(x.flatten(1) @ self.features)
        return self.output(self.back(F.relu(self.there(x))))


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 (torchvision's, in short)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + identity)


class ResNet(nn.Module):
    """Two stages of `BasicBlock`."""

    def __init__(self, input_shape: Shape, num_labels: int, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1, self.layer2 = BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(2 * width, num_labels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class Drawn(nn.Linear):
    """Draws from all three global generators, or (`source`) from one that is not seeded."""

    def __init__(self, input_shape: Shape, num_labels: int, source: Any = None) -> None:
        super().__init__(math.prod(input_shape), num_labels)
        numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        self.register_buffer("drawn", torch.tensor([*numbers, *([source.random()] if source else [])]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * self.drawn.sum()


def wrapped_drawn(input_shape: Shape, num_labels: int) -> ModuleModel:
    """Return a module that the user has wrapped."""
    return ModuleModel(lambda: Drawn(input_shape, num_labels), input_shape, num_labels)


class Unseeded(Drawn):
    """Draws from a generator of its own, too."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__(input_shape, num_labels, np.random.default_rng())


class Distances(nn.Module):
    """Distances to trained points, for which PyTorch has no formula of FLOPs."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(num_labels, math.prod(input_shape)))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.flatten(1), self.points)


class Branch(nn.Module):
    """A recurrent layer, which cannot be cut, and a narrow branch, which can."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(input_shape[0] * input_shape[2], 32, batch_first=True)
        self.before, self.after = nn.Linear(32, 8), nn.Linear(8, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.before(self.recurrent(x.transpose(1, 2).flatten(2))[0][:, -1])))


class FixedNorm(nn.Module):
    """Fine-tuning of a network whose BatchNorm layers keep the moments that they were trained with."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(input_shape[0], 6, 3), nn.BatchNorm2d(6)
        self.norm.running_mean.normal_()
        self.after, self.output = nn.Linear(6, 8), nn.Linear(8, num_labels)

    def train(self, mode: bool = True) -> FixedNorm:
        """Set the mode of all but the normalisation."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.convolution(x))).mean((2, 3))
        return self.output(F.relu(self.after(x)))


class Normed(nn.Sequential):
    """A perceptron with BatchNorm."""

    def __init__(self, input_shape: Shape, num_labels: int, hidden: int = 8) -> None:
        first, last = nn.Linear(math.prod(input_shape), hidden), nn.Linear(hidden, num_labels)
        super().__init__(nn.Flatten(), first, nn.BatchNorm1d(hidden), nn.ReLU(), last)


class Tracking(nn.Module):
    """BatchNorm, a moving average that is assigned anew, and a counter that is changed in place."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__()
        self.before, self.norm = nn.Linear(math.prod(input_shape), 8), nn.BatchNorm1d(8)
        self.after = nn.Linear(8, num_labels)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.flatten(1))
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
            self.calls += 1
        return self.after(F.relu(self.norm(x)) + self.centre)


class SingleConstant(nn.Linear):
    """Multiplies by a tensor that is neither parameter nor buffer, so that it stays in single precision."""

    def __init__(self, input_shape: Shape, num_labels: int) -> None:
        super().__init__(math.prod(input_shape), num_labels)
        self.matrix = torch.eye(num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) @ self.matrix


class Tokens(nn.Module):
    """An embedding of grey values, PyTorch's own attention, and a head."""

    def __init__(self, input_shape: Shape, num_labels: int, stream: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, stream)
        self.attend = nn.MultiheadAttention(stream, 3, batch_first=True)
        self.hidden, self.head = nn.Linear(stream, 20), nn.Linear(20, num_labels)
        self.odd = nn.Parameter(torch.randn(4, stream))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x.flatten(1)[:, ::8] * 3).long().clamp(-8, 7) + 8)
        x = x + self.attend(x, x, x, need_weights=False)[0] + self.odd.mean(0)
        return self.head(F.relu(self.hidden(x.mean(1))))


def six_tokens(options: dict[str, Any]) -> SampleData:
    """Texts of six tokens of a vocabulary of five, in four classes."""
    tokens = torch.arange(39 * 6).view(39, 6) % 5
    labels = torch.arange(39) % 4
    return SampleData("six tokens", tokens[:30], labels[:30], tokens[30:], labels[30:], num_labels=4)
