"""What the trackers' own packages have of two runs that were stopped and resumed; skipped where they are missing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer.storage.runlog import read_config, read_metrics

NAMES = ["all/seed-0", "ring/seed-0"]
TAGS = {"dsgd", "consensus"}
ROUNDS = 2


def trained(out: Path, tracker: str) -> dict[str, list[dict[str, Any]]]:
    """Train two methods with a tracker, ended after their first round and resumed; return their records by name."""
    config = {
        "name": "tried",
        "rounds": ROUNDS,
        "seeds": [0],
        "workload": {"name": "consensus"},
        "peers": {"num": 3, "topology": "ring"},
        "train": {"lr": 0.1, "steps": 1},
        "methods": {"ring": {}, "all": {"peers.topology": "complete"}},
        "engine": {"workers": 0},
        "log": {"sinks": [tracker]},
    }
    gossamer.run(config, out=out, on_round=lambda record: True)
    gossamer.resume(out)
    return {name: read_metrics(out / name) for name in NAMES}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, records in trained(tmp_path / "out", "tensorboard").items():
        found = EventAccumulator(str(tmp_path / "out" / name / "tensorboard"))
        found.Reload()
        logged = [(event.step, event.value) for event in found.Scalars("consensus_distance")]
        assert logged == [(one["round"], pytest.approx(one["consensus_distance"])) for one in records]
        assert "loss_peers/mean" in found.Tags()["scalars"]
        (text,) = found.Tensors("configuration/text_summary")
        (content,) = (one.decode() for one in text.tensor_proto.string_val)
        assert content.startswith(f"{name} (dsgd, consensus)")
        assert "    rounds: 2\n" in content


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    try:
        logged = trained(tmp_path / "out", "mlflow")
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tried")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert sorted(runs) == NAMES
        for name, records in logged.items():
            info, data = runs[name].info, runs[name].data
            assert info.status == "FINISHED"
            assert data.tags["group"] == "out"
            assert {tag for tag in TAGS if data.tags[tag] == "true"} == TAGS
            assert data.params["train.lr"] == "0.1"
            assert (
                data.params["peers.topology.name"] == read_config(tmp_path / "out" / name)["peers"]["topology"]["name"]
            )
            history = client.get_metric_history(info.run_id, "consensus_distance")
            assert [(one.step, one.value) for one in history] == [
                (one["round"], one["consensus_distance"]) for one in records
            ]
    finally:
        mlflow.set_tracking_uri(None)


def written_by_wandb(path: Path) -> Iterator[bytes]:
    """Yield the records of a file of W&B: after a header of seven bytes a log in blocks, as LevelDB writes it."""
    content, place, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:  # padding
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2 as proto

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        logged = trained(tmp_path / "out", "wandb")
    finally:
        wandb.teardown()
    for name, records in logged.items():
        files = sorted((tmp_path / "out" / name / "wandb").glob("offline-run-*/*.wandb"))
        assert len(files) == 2  # as begun, and as resumed
        found = [proto.Record.FromString(one) for file in files for one in written_by_wandb(file)]
        runs = [one.run for one in found if one.WhichOneof("record_type") == "run"]
        kept = json.loads((tmp_path / "out" / name / "trackers.json").read_text())
        assert {one.run_id for one in runs} == {kept["wandb"]}
        for run in runs:
            assert (run.project, run.run_group, run.display_name) == ("tried", "out", name)
            assert set(run.tags) == TAGS
            config = {one.key: json.loads(one.value_json) for one in run.config.update}
            assert (config["train.lr"], config["seed"]) == (0.1, 0)
        steps = [one.history for one in found if one.WhichOneof("record_type") == "history"]
        history = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.item} for one in steps]
        assert [(one["_step"], one["consensus_distance"]) for one in history] == [
            (one["round"], one["consensus_distance"]) for one in records
        ]
