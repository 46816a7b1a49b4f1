"""The pre-activation ResNet-18 of HeteroFL and FedRolex."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from gossamer.submodel.layout import KERNEL, LABEL_AXIS
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import ImageModel, ModelOptions, batch_norm, rescale

STAGE_WIDTHS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


class PreActResNet18(ImageModel):
    """Pre-activation ResNet-18 (He et al., arXiv 1603.05027) for small images: 3 x 3 stem, no first pooling.

    As in HeteroFL's code: shortcuts are bare 1 x 1 convolutions of the activated input where the shape changes, and a
    last BatchNorm stands before the global average. On 3 x 32 x 32 with 10 classes it has 11,172,170 parameters; at
    width 1/2, 1/4, 1/8, 1/16: 2,796,714, 701,018, 176,178, 44,510. The 12 axes are the stream of each stage, tied by
    its residual sums, and the inside of each of the 8 blocks.
    """

    def declare(self, options: ModelOptions, input_shape: tuple[int, ...], num_labels: int) -> None:
        """Declare ``stem``, ``stage<i>.block<j>.{norm0,conv0,norm1,conv1[,shortcut]}``, ``norm`` and ``output``."""
        widths = [window_length(size, options.width) for size in STAGE_WIDTHS]
        self.blocks: list[tuple[str, int]] = []
        norms: list[str] = []
        size, axis = widths[0], "stage0"
        self.add("stem", (size, input_shape[0], 3, 3), (axis, None, KERNEL, KERNEL), bias=False)
        for stage, width in enumerate(widths):
            stream = f"stage{stage}"
            for number in range(BLOCKS_PER_STAGE):
                block = f"{stream}.block{number}"
                changes = axis != stream
                self.add(f"{block}.norm0", (size,), (axis,))
                self.add(f"{block}.conv0", (width, size, 3, 3), (block, axis, KERNEL, KERNEL), bias=False)
                self.add(f"{block}.norm1", (width,), (block,))
                self.add(f"{block}.conv1", (width, width, 3, 3), (stream, block, KERNEL, KERNEL), bias=False)
                if changes:
                    self.add(f"{block}.shortcut", (width, size, 1, 1), (stream, axis, KERNEL, KERNEL), bias=False)
                self.blocks.append((block, 2 if changes else 1))
                norms += [f"{block}.norm0", f"{block}.norm1"]
                size, axis = width, stream
        self.add("norm", (size,), (axis,))
        self.norms = (*norms, "norm")
        self.add("output", (num_labels, size), (LABEL_AXIS, axis))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits, see `ImageModel.apply`; every BatchNorm's input is scaled, as in HeteroFL's code."""

        def activated(x: Tensor, layer: str) -> Tensor:
            """Normalise and activate."""
            weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
            return batch_norm(rescale(x, context.scale), f"{layer}.", weight, bias, context).relu_()

        x = F.conv2d(x, params["stem.weight"], padding=1)
        for block, stride in self.blocks:
            hidden = activated(x, f"{block}.norm0")
            shortcut = params.get(f"{block}.shortcut.weight")
            if shortcut is not None:
                x = F.conv2d(hidden, shortcut, stride=stride)
            hidden = F.conv2d(hidden, params[f"{block}.conv0.weight"], stride=stride, padding=1)
            hidden = activated(hidden, f"{block}.norm1")
            x = F.conv2d(hidden, params[f"{block}.conv1.weight"], padding=1) + x
        pooled = activated(x, "norm").mean((2, 3))
        return F.linear(pooled, params["output.weight"], params["output.bias"])
