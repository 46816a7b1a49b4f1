"""Plain modules, written as one would without gossamer, for the tests that trace and train them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)


class PreActBlock(nn.Module):
    """A pre-activation block; its parameters bear the names that `gossamer.workloads.resnet` gives them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(before)
        self.conv0 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        if before != after or stride != 1:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm0(x))
        x = self.shortcut(hidden) if hasattr(self, "shortcut") else x
        return self.conv1(F.relu(self.norm1(self.conv0(hidden)))) + x


class PreActResNet18(nn.Module):
    """The pre-activation ResNet-18 of `gossamer.workloads.resnet`."""

    def __init__(self, input_shape: tuple[int, int, int], num_labels: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        before = widths[0]
        self.stem = nn.Conv2d(input_shape[0], before, 3, 1, 1, bias=False)
        for stage, width in enumerate(widths):
            blocks = nn.Module()
            for number in range(2):
                blocks.add_module(f"block{number}", PreActBlock(before, width, 2 if stage and not number else 1))
                before = width
            self.add_module(f"stage{stage}", blocks)
        self.norm = nn.BatchNorm2d(before)
        self.output = nn.Linear(before, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3):
            x = stage.block1(stage.block0(x))
        return self.output(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class MLP(nn.Module):
    """The perceptron of `gossamer.workloads.models`."""

    def __init__(self, input_shape: tuple[int, ...], num_labels: int, hidden: tuple[int, ...] = (200, 200)) -> None:
        super().__init__()
        size = input_shape[0] * input_shape[1] * input_shape[2]
        self.hidden = [f"hidden{number}" for number in range(len(hidden))]
        for name, width in zip(self.hidden, hidden, strict=True):
            self.add_module(name, nn.Linear(size, width))
            size = width
        self.output = nn.Linear(size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name in self.hidden:
            x = F.relu(self.get_submodule(name)(x))
        return self.output(x)


class CNN(nn.Module):
    """The convolutional network of `gossamer.workloads.models`."""

    def __init__(self, input_shape: tuple[int, int, int], num_labels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(input_shape[0], 32, 5, padding=2)
        self.conv1 = nn.Conv2d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(64 * (input_shape[1] // 4) * (input_shape[2] // 4), 512)
        self.output = nn.Linear(512, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv0, self.conv1):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))


class Attention(nn.Module):
    """Self-attention with one fused projection; sizes come from the parameters, the softmax's scale does not."""

    def __init__(self, stream: int, num_heads: int, cut: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(stream, 3 * stream)
        self.project = nn.Linear(stream, stream)
        head_dim = stream // num_heads
        self.scale, self.split = head_dim**-0.5, (-1, head_dim) if cut == "heads" else (num_heads, -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, self.split).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return self.project(mixed.transpose(1, 2).flatten(2))


class Attending(nn.Module):
    """PyTorch's own attention over samples in time, whose averaged weights are dropped."""

    def __init__(self, stream: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(stream, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Transformer(nn.Module):
    """Two pre-normalised blocks over characters with a tied or free output; `cut` says how heads are written."""

    def __init__(self, num_characters: int, cut: str = "heads", tied: bool = True, stream: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(num_characters, stream)
        self.positions = nn.Parameter(torch.randn(20, stream))
        for number in range(2):
            self.add_module(f"norm{number}", nn.LayerNorm(stream))
            self.add_module(f"attention{number}", Attention(stream, 4, cut))
            perceptron = nn.Sequential(nn.LayerNorm(stream), nn.Linear(stream, 24), nn.GELU(), nn.Linear(24, stream))
            self.add_module(f"perceptron{number}", perceptron)
        self.output = nn.Linear(stream, num_characters, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positions[: x.shape[1]]
        x = x + self.attention0(self.norm0(x))
        x = x + self.perceptron0(x)
        x = x + self.attention1(self.norm1(x))
        x = x + self.perceptron1(x)
        return self.output(x)


class Unusual(nn.Module):
    """Depthwise-separable convolution, squeeze and excitation, a gated linear unit, an einsum, joined branches."""

    def __init__(self, input_shape: tuple[int, int, int], num_labels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(24, 20, 1)
        self.squeeze, self.excite = nn.Linear(20, 10), nn.Linear(10, 20)
        self.grouped = nn.Conv2d(20, 16, 1, groups=2)
        self.gate = nn.Linear(32, 28)
        self.mix = nn.Parameter(torch.randn(14, 3, 8) / 4)
        self.slope = nn.Parameter(torch.full((8,), 0.3))
        self.output = nn.Linear(24, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.tanh(self.depthwise(F.elu(self.stem(x)))))
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = self.grouped(x * weights[:, :, None, None])
        x = torch.cat([x.amax((2, 3)), x.sum((2, 3)) / 9], dim=1)
        x = F.glu(self.gate(x))
        x = torch.einsum("bi,ikj->bkj", x, self.mix)
        x = torch.where(x > 0, x, x * self.slope)
        return self.output(x.reshape(len(x), -1))


class TinyNet(nn.Module):
    """A small residual network with BatchNorm, for federations."""

    def __init__(self, input_shape: tuple[int, int, int], num_labels: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))
        self.output = nn.Linear(width * 4, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.output(F.adaptive_avg_pool2d(x + self.body(x), 2).flatten(1))


class TinyPerceptron(nn.Sequential):
    """A perceptron with layer normalisation."""

    def __init__(self, input_shape: tuple[int, int, int], num_labels: int, hidden: int = 16) -> None:
        size = input_shape[0] * input_shape[1] * input_shape[2]
        super().__init__(
            nn.Flatten(), nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, num_labels)
        )
