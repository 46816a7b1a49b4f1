"""Encoders of videos that keep frames and places apart, so that what is seen are tokens of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gossamer.submodel.windows import window_length
from gossamer.workloads.models import DeclaredModel
from gossamer.workloads.multimodal.blocks import (
    Attention,
    Cut,
    Declaring,
    FeedForward,
    LocalTemporal,
    Params,
    Patches,
    Scale,
    normalised,
)
from gossamer.workloads.multimodal.forward import EncoderOptions


class Block(Declaring, Protocol):
    """A block of an encoder of videos."""

    def __call__(self, params: Params, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return the stream after the block, of the shape of x [..., frames, places, size]."""
        ...


class VideoEncoder:
    """The module ``vision``: patches, blocks one after another, and a last normalisation, ``vision.norm``.

    Attributes:
        parts: what declares its parameters, but for the normalisation.
    """

    def __init__(self, patches: Patches, blocks: Sequence[Block]) -> None:
        self.patches, self.blocks = patches, blocks
        self.parts: tuple[Declaring, ...] = (patches, *blocks)

    def __call__(self, params: Params, video: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return visual tokens [..., frames * places, size] of a video float32 [..., frames, channels, h, w]."""
        x = self.patches(params, video)
        for block in self.blocks:
            x = block(params, x, scale)
        return normalised(params, "vision.norm", x).flatten(-3, -2)


class VisionBlock:
    """Local temporal mixing, attention inside each frame, mixing again, and feed-forward, each added to the stream."""

    def __init__(self, name: str, size: int, heads: tuple[int, int], hidden: int, between: int, cut: Cut) -> None:
        """Name its parts.

        Args:
            name: prefix of their parameters.
            size: width of the stream.
            heads: number of heads, and channels of each.
            hidden, between: units of feed-forward, and of local temporal mixing.
            cut: what a capacity cuts of attention.
        """
        self.before, self.after = (LocalTemporal(f"{name}.temporal{i}", size, between) for i in range(2))
        self.attention = Attention(f"{name}.attention", size, *heads, cut)
        self.feed = FeedForward(f"{name}.feed", size, hidden)

    @property
    def zeros(self) -> tuple[str, ...]:
        """Names of the parameters that start at zero."""
        return self.before.zeros + self.after.zeros

    def declare(self, model: DeclaredModel) -> None:
        """Declare the parts, and the normalisations of attention and feed-forward."""
        parts: list[Declaring] = [self.before, self.attention, self.after, self.feed]
        for part in parts:
            part.declare(model)
        for normed in (self.attention, self.feed):
            model.add(f"{normed.name}.norm", (normed.size,), (None,))

    def __call__(self, params: Params, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return the stream after the block, of the shape of x [..., frames, places, size]."""
        x = x + self.before(params, x, scale)
        x = x + self.attention(params, normalised(params, f"{self.attention.name}.norm", x), scale=scale)
        x = x + self.after(params, x, scale)
        return x + self.feed(params, normalised(params, f"{self.feed.name}.norm", x), scale)


def vision_blocks(options: EncoderOptions, heads: tuple[int, int], hidden: int) -> list[VisionBlock]:
    """Return the blocks of mPLUG-2's encoder of videos, whose local temporal blocks have half the stream's channels.

    Args:
        options: of the model.
        heads: number of heads, and channels of each.
        hidden: units of feed-forward.
    """
    between, size = window_length(max(1, options.stream // 2), options.width), options.stream
    names = (f"vision.block{i}" for i in range(options.vision_blocks))
    return [VisionBlock(name, size, heads, hidden, between, options.cut) for name in names]
