"""What a process knows of itself as a rank."""

from __future__ import annotations

import pytest
import torch

from gossamer.engines.collective.environment import use_own_device


@pytest.mark.parametrize(
    ("devices", "count", "used"),
    [(["cpu", "cuda"], 2, [1]), (["cuda"], 8, [3]), (["cuda"], 0, []), (["cpu", "cuda:0"], 2, [])],
)
def test_a_device_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], count: int, used: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    use_own_device(iter(devices))
    assert found == used
