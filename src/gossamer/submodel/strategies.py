"""Ways to choose windows: rolling, static, random."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.registry import resolve
from gossamer.submodel.layout import Layout
from gossamer.submodel.windows import Window, window_length, wrapped


class Chooser(Protocol):
    """Returns the window of `length` channels of an axis of `width` at one address."""

    def __call__(
        self,
        width: int,
        length: int,
        *,
        round: int,
        stride: int,
        offset: int = 0,
        seed: int,
        client: int,
        group: Hashable,
    ) -> Window: ...


@dataclass(frozen=True)
class Strategy:
    """A way to choose windows.

    Attributes:
        choose: the window of one axis.
        shared: whether all clients of a round and capacity get the same windows.
        groups: ``(layout, capacity) -> {axis: group}``: what `choose` is told of an axis's place among the others;
            None: its name.
        rank: ``(layout, x [d]) -> {axis: order}``: all channels of each axis, int64 [width], the most important first,
            by the model at the start of a round; a window then holds the first ones, and `choose` serves only where
            there is no model. None: windows do not depend on the model.
        unused: those of "stride" and "offsets" that have no effect.
        about: what it is, in a sentence; "": the first paragraph of the docstring of `choose`.
    """

    choose: Chooser
    shared: bool
    groups: Callable[[Layout, float], Mapping[str, Hashable]] | None = None
    rank: Callable[[Layout, Tensor], Mapping[str, Tensor]] | None = None
    unused: tuple[str, ...] = ()
    about: str = ""


def _rolling(
    width: int, length: int, *, round: int, stride: int, offset: int = 0, seed: int, client: int, group: Hashable
) -> Window:
    """Channels ``(offset + round * stride + t) mod width``, 0 <= t < length (FedRolex, arXiv 2212.01548, Eq. 3).

    They are the same for all clients. The paper's offset is 0 and its stride 1; ``stride=-1`` gives the backward window
    of its public code.
    """
    return wrapped(width, offset + round * stride, length)


def _static(
    width: int, length: int, *, round: int, stride: int, offset: int = 0, seed: int, client: int, group: Hashable
) -> Window:
    """HeteroFL (arXiv 2010.01264): always the first `length` channels (from `offset` on, if there is one)."""
    return wrapped(width, offset, length)


def _random(
    width: int, length: int, *, round: int, stride: int, offset: int = 0, seed: int, client: int, group: Hashable
) -> Window:
    """Federated Dropout (arXiv 1812.07210): a uniform subset, fresh for each width group, client and round."""
    if length == width:
        return Window(width, ((0, width),))
    source = rng.generator(seed, "window", round, 0, client, rng.stable_hash(str(group)))
    return Window.of_indices(width, np.sort(source.choice(width, size=length, replace=False)))


rolling = Strategy(_rolling, shared=True)


static = Strategy(_static, shared=True, unused=("stride",))


random = Strategy(_random, shared=False, unused=("stride", "offsets"))


def find_strategy(name: str) -> Strategy:
    """Return the strategy of a name.

    Raises:
        ConfigError: the name is unknown, or stands for something else.
    """
    found = resolve("strategy", name)
    if not isinstance(found, Strategy):
        raise ConfigError(
            f"submodel.strategy {name!r} is a {type(found).__name__}: give a gossamer.submodel.Strategy, or name"
            " another one"
        )
    return found


def window(
    strategy: str,
    width: int,
    capacity: float,
    round: int,
    stride: int = 1,
    seed: int = 0,
    client: int = 0,
    group: Hashable = 0,
    offset: int = 0,
) -> Window:
    """Return the window that `strategy` gives a client on an axis.

    Args:
        strategy: ``"rolling"``, ``"static"``, ``"random"``, ``"covering"``, ``"magnitude"`` or a plug-in's name.
        width: number of channels of the axis, >= 1.
        capacity: share of the channels, in (0, 1].
        round: round number, >= 0.
        stride: channels by which a rolling window moves each round.
        seed, client, group: address of the random draw; `group` names the width group (axis).
        offset: channels by which the window is moved in every round.

    Raises:
        ConfigError: capacity outside (0, 1], width below 1 or an unknown strategy.
    """
    if width < 1:
        raise ConfigError(f"axis width {width!r} is below 1: an axis needs at least one channel")
    length = window_length(width, capacity)
    found = find_strategy(strategy)
    return found.choose(width, length, round=round, stride=stride, offset=offset, seed=seed, client=client, group=group)
