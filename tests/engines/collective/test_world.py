"""The leader's side of a group, with ranks that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from gossamer.engines.collective.group import Group, Message
from gossamer.engines.collective.world import Letter, World
from gossamer.errors import ConfigError, EngineError, GossamerError, StorageError


class Ranks:
    """Three of them, which have their replies ready."""

    size = 3

    def __init__(self, *replies: Message) -> None:
        self.replies, self.received = replies, list[int]()

    def send(self, rank: int, message: Message, arrays: Sequence[Tensor] = ()) -> Callable[[], None]:
        return lambda: None

    def receive(self, rank: int) -> tuple[Message, list[Tensor]]:
        self.received.append(rank)
        return {"stop": False} | self.replies[rank - 1], []


class Own:
    """What rank 0 does itself."""

    def __init__(self, error: GossamerError | None = None) -> None:
        self._error = error

    def handle(self, message: Message, arrays: list[Tensor]) -> Letter:
        if self._error is not None:
            raise self._error
        return Letter({})


def world_of(ranks: Ranks, own: Any = None) -> World:
    """Return a world in the midst of a task."""
    world = World(cast(Group, ranks))
    world._handler = own or Own()
    return world


def test_all_replies_are_taken_before_an_error_is_raised() -> None:
    ranks = Ranks({"error": "broken", "exit_code": 2}, {})
    with pytest.raises(EngineError, match=r"^rank 1: broken$"):
        world_of(ranks).ask_all({"kind": "train"})
    assert ranks.received == [1, 2]


def test_all_replies_are_taken_before_an_error_of_rank_0_is_raised() -> None:
    ranks = Ranks({"error": "also broken", "exit_code": 2}, {})
    with pytest.raises(StorageError, match="no space left"):
        world_of(ranks, Own(StorageError("no space left"))).ask_all({"kind": "save"})
    assert ranks.received == [1, 2]


def test_a_directory_that_one_rank_does_not_see(tmp_path: Path) -> None:
    world_of(Ranks({"seen": True}, {"seen": True})).require_shared(tmp_path)
    with pytest.raises(ConfigError, match=r"rank 2 does not see '.*', where ranks write what they hold: give a"):
        world_of(Ranks({"seen": True}, {"seen": False})).require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
