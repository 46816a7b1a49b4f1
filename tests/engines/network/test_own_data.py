"""Peers with data of their own: the bits of the same samples in the experiment's file, and what is refused."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from federation import LEVELS, STACKED, SYNTHETIC, events, modes, wait_for
from gossamer.build import build
from gossamer.cli.main import app
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, Refused
from gossamer.experiment import Hooks, run
from gossamer.storage.runlog import read_config, read_metrics
from peer_threads import Peers, committed_rows, ended_after
from slow_peers import decentralized

CONFIGS: dict[str, dict[str, Any]] = {
    "dsgd": {},
    "windows": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}} | modes(LEVELS, **STACKED),
    "dirichlet": {"peers.partition": {"name": "dirichlet", "alpha": 0.5}, "train.steps": 2, "algorithm": "dsgt"},
}


def configured(changes: Mapping[str, Any], num_peers: int) -> dict[str, Any]:
    """Return an experiment of some peers, each of whom hears from all others."""
    return decentralized({"peers.num": num_peers, "peers.topology": "complete", **changes})


def part_of(config: Mapping[str, Any], peer: int, file: Path) -> dict[str, Any]:
    """Write a peer's part of an experiment's own data, and all test data, in a file; return the data set."""
    workload: Any = build(parse(config)).workload
    positions = np.arange(workload.num_samples[peer])[None]
    samples = workload.batch(np.array([peer]), positions).samples
    arrays = {"x_train": samples["x"][0], "y_train": samples["y"][0]}
    arrays |= {"x_test": workload.data.test_images, "y_test": workload.data.test_labels}
    np.savez(file, **{name: value.numpy() for name, value in arrays.items()})
    return {"name": "arrays", "path": str(file)}


@settings(max_examples=3, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 3), who=st.sets(st.integers(0, 2), min_size=1))
def test_bits(name: str, seed: int, who: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A peer that is given what its part of the experiment's data holds does as it would without."""
    folder = tmp_path_factory.mktemp("own")
    config = configured(CONFIGS[name] | {"seed": seed}, 3)
    peers = Peers(folder, config)
    for peer in range(3):
        own = {"data": part_of(config, peer, folder / f"{peer}.npz")} if peer in who else {}
        peers.start(peer, **own)
    peers.join()
    assert not peers.errors
    run(config, out=folder / "local")
    expected = committed_rows(folder / "local")
    for peer in range(3):
        assert torch.equal(committed_rows(peers.where(peer))[0], expected[peer])


def test_the_command(tmp_path: Path) -> None:
    """``--data`` names what a client's does; such a peer evaluates on its own test data, and goes on with them."""
    config = configured({"rounds": 6}, 2)
    peers = Peers(tmp_path, config)
    file, own = tmp_path / "file.yaml", part_of(config, 1, tmp_path / "own.npz")
    file.write_text(yaml.safe_dump(config))
    command = ["node", "peer", str(file), "--id", "1", "--peers", str(peers.book), "--listen", "127.0.0.1:0", "--quiet"]
    command += ["--data", own["path"], "--out", str(peers.where(1))]
    peers.start(0)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    peers.join()
    assert not peers.errors
    assert read_config(peers.where(1))["engine"]["data"] == own
    assert read_config(peers.where(1))["workload"] == read_config(peers.where(0))["workload"]
    run(config, out=tmp_path / "local")
    assert torch.equal(committed_rows(peers.where(1))[0], committed_rows(tmp_path / "local")[1])
    last = read_metrics(peers.where(1))[-1]
    assert last["accuracy"] * SYNTHETIC["num_test"] == pytest.approx(round(last["accuracy"] * SYNTHETIC["num_test"]))
    with pytest.raises(ConfigError, match="holds the run of peer 1, which had data of its own"):
        run({**config, "replay": str(tmp_path)}, out=tmp_path / "replayed")


def test_other_data_take_part(tmp_path: Path) -> None:
    """Peers of as many samples as they please train together, are observed, and go on after they were stopped."""
    config = configured({"rounds": 6, "train.epochs": 1}, 3)
    peers = Peers(tmp_path, config)
    sizes = (20, 50, 90)
    hooks = {2: ended_after(2)}
    peers.start(None)
    for peer, num_train in enumerate(sizes):
        peers.start(peer, hooks.get(peer), data={**SYNTHETIC, "num_train": num_train})
    peers.join(2)
    peers.start(2)
    peers.join()
    assert not peers.errors
    assert {len(read_metrics(peers.where(peer))) for peer in (None, 0, 1, 2)} == {6}
    assert [read_metrics(peers.where(peer))[-1]["total_samples"] for peer in range(3)] == [18 * n for n in sizes]
    assert not events(peers.where(2), "state-lost")
    assert committed_rows(peers.where(0)).isfinite().all()


@pytest.mark.parametrize(
    ("own", "changes", "sentence"),
    [
        ({"num_labels": 4}, {}, "peer-[01]: the data have samples of shape .* labels, but those of peer [01] samples"),
        (None, {"workload.dataset": {**SYNTHETIC, "noise": 1.0}}, "have other experiments, or data: give both"),
    ],
)
def test_who_does_not_fit(own: Any, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Whoever dials first is told, and ends."""
    peers, over = Peers(tmp_path, configured({}, 2)), threading.Event()
    hooks = Hooks(is_ended=over.is_set)
    peers.start(0, hooks)
    peers.config = configured(changes, 2)
    peers.start(1, hooks, **({} if own is None else {"data": SYNTHETIC | own}))
    wait_for(lambda: any(isinstance(error, Refused) for error in list(peers.errors.values())))
    over.set()
    peers.join()
    told = [str(error) for error in peers.errors.values() if isinstance(error, Refused)]
    assert re.search(sentence, told[0])


@pytest.mark.parametrize(
    ("changes", "engine", "sentence"),
    [
        ({}, {"peer": 3}, "there is no peer 3 in this run: give a number below 3"),
        ({}, {"data": "arrays"}, "path"),
        ({"workload": {"name": "least-squares", "dim": 5}}, {}, "dataset"),
    ],
)
def test_refused(changes: dict[str, Any], engine: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config = configured(changes, 3)
    (tmp_path / "book").mkdir()
    given = {"name": "network", "peers_file": str(tmp_path / "book"), "address": "127.0.0.1:0", "peer": 0}
    given |= {"data": SYNTHETIC, **engine}
    with pytest.raises(ConfigError, match=sentence):
        run({**config, "engine": {**config["engine"], **given}}, out=tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("")
    command = ["node", "peer", "FILE", "--id", "0", "--peers", str(tmp_path), "--data", str(tmp_path / "own")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "is neither a folder of images nor a table" in str(done.output) + str(done.exception)
