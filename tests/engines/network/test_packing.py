"""Where only representations travel, messages hold nothing else; bits are those of the local engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from federation import Injected, assert_same, failing
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.network import packing
from gossamer.engines.task import Task
from gossamer.transport import Client, Message, Server
from nodes import Nodes, real

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("recorded")]

NUM_PUBLIC, WIDTH = 12, 4
CONFIG: dict[str, Any] = {
    "rounds": 3,
    "workload": {
        "name": "audio-visual-digits",
        "dataset": {"bands": 8, "frames": 8, "num_public": NUM_PUBLIC},
        "width": WIDTH,
        "modalities": {"image+audio": 0.34, "image": 0.33, "audio": 0.33},
        "exchange": "representations",
        "architectures": {
            "flat": {"share": 0.5},
            "deep": {"share": 0.5, "encoders": {"image": {"name": "mlp", "hidden": [8, 6]}}},
        },
    },
    "clients": {"num": 6, "per_round": 5},
    "train": {"lr": 0.01, "batch_size": 4, "steps": 2, "optimizer": {"name": "adam"}},
    "algorithm": {"name": "creamfl", "public_batch_size": 8},
    "submodel": {"capacities": [0.5, 1.0], "strategy": "static"},
    "checkpoint": {"every_seconds": 0},
    "engine": {"name": "local", "workers": 0, "modes": {"stacked": False}},
}


def require_same(run: gossamer.Run, local: gossamer.Run) -> None:
    """Compare a run with one of the local engine, which alone can evaluate clients' own models."""
    own = [name for name in local.metrics[-1] if "_personal" in name]
    assert own
    assert_same(run, local, but=own)


class Wiretap:
    """Notes the kind and the number of bytes of the arrays of each message that a server or a client sends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, int]] = []
        for side in (Server, Client):
            patch.setattr(side, "send", self._noting(side.send))

    def _noting(self, send: Any) -> Any:
        """Return a method that notes a message, and sends it."""

        def noting(end: Any, *arguments: Any) -> Any:
            """Note and send."""
            message = next(one for one in arguments if isinstance(one, Message))
            self.sent.append((message.kind, sum(value.nbytes for value in message.arrays.values())))
            return send(end, *arguments)

        return noting


def test_bits_and_bytes(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer has the client's representations, a model those of the server, and nothing has anything besides."""
    tap, one = Wiretap(monkeypatch), NUM_PUBLIC * WIDTH * 4
    nodes.start([0, 2, 4])
    nodes.start([1, 3, 5])
    run = gossamer.run(real(CONFIG, nodes), out=tmp_path / "network")
    nodes.join()
    assert not nodes.errors
    require_same(run, gossamer.run(CONFIG, out=tmp_path / "local"))
    assert {size for kind, size in tap.sent if kind == "model"} == {2 * one}
    answers = [size for kind, size in tap.sent if kind == "update"]
    assert len(answers) == 3 * 5
    assert set(answers) == {one, 2 * one}
    assert sum(answers) == run.metrics[-1]["total_bytes_up"]
    assert {size for kind, size in tap.sent if kind not in ("model", "update")} == {0}


def test_goes_on_after_the_server_has_failed(nodes: Nodes, tmp_path: Path) -> None:
    """Clients have their models on their own disks; those that never took part have what all began with."""
    done = gossamer.run(CONFIG, out=tmp_path / "local")
    nodes.start([0, 1, 2, 3, 4, 5])
    with pytest.raises(Injected):
        gossamer.run(real(CONFIG, nodes), out=tmp_path / "network", hooks=failing("exchange", started=False, number=2))
    require_same(gossamer.resume(tmp_path / "network"), done)
    nodes.join()
    assert not nodes.errors


def test_models_and_answers_are_unpacked_as_they_were() -> None:
    """Row by row, against the names of what travels."""
    task: Task = build(parse(CONFIG)).task
    for variant in task.variants:
        names = [name for name in variant.layout.names if name.startswith("public_")]
        cut = task.cut(variant, 0)
        rows = {"x": torch.arange(1.0, task.cutter.layout.d + 1)[None]}
        initial = packing.cut_rows(cut, {"x": -rows["x"]})
        packed = packing.packed_model(variant, cut, rows)
        assert packed["x"].shape == (1, 2 * NUM_PUBLIC * WIDTH)
        found = variant.layout.views(packing.unpacked_model(variant, packed, initial)["x"][0])
        own = variant.layout.views(packing.cut_rows(cut, rows)["x"][0])
        for name, value in found.items():
            assert torch.equal(value, own[name] if name in names else -own[name])
        sent = packing.packed_answer(task, variant.index, {"x": packing.cut_rows(cut, rows)["x"][0]})
        back = variant.layout.views(packing.unpacked_answer(task, variant.index, sent)[0])
        assert {name for name, value in back.items() if value.any()} == set(
            variant.algorithm.sent(variant.layout.names)
        )
        assert all(torch.equal(back[name], own[name]) for name in back if back[name].any())
