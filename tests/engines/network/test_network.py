"""Federations whose clients dial in have the bits of the local engine, whatever happens to servers and clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import gossamer
from federation import STACKED, assert_same, configure, environment, events, mixed, modes
from gossamer import experiment
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, Interrupted
from gossamer.storage.runlog import read_events, read_metrics
from gossamer.task import held_task_of, task_of
from nodes import Nodes, real
from video_language import SMALL

RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "mixed capacities": mixed("fedrolex", **STACKED) | {"evaluation.by_capacity": True},
    "private state": {"algorithm": "scaffold", "clients.per_round": 3} | modes(**STACKED),
    "private windows": mixed("federated-dropout"),
    "ranked channels": mixed("fiarse"),
    "residuals": {"communication.uplink": {"name": "top-k", "share": 0.1}},
    "updates too large": mixed("fedrolex")
    | {"train.lr_by_capacity": {1.0: 30.0}, "aggregation.max_update_norm_ratio": 5, "clients.quorum": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_bits(name: str, nodes: Nodes, tmp_path: Path) -> None:
    config = configure(RUNS[name])
    nodes.start([0, 2, 4, 6])
    nodes.start([1, 3, 5, 7])
    run = gossamer.run(real(config, nodes), out=tmp_path / "network")
    nodes.join()
    assert not nodes.errors
    assert_same(run, gossamer.run(config, out=tmp_path / "local"))


def stalled(until: threading.Event) -> Callable[[Mapping[str, Any]], Any]:
    """Return what makes the task of a node that trains nothing before `until`."""

    def make(config: Mapping[str, Any]) -> Any:
        """Make the task."""
        task = task_of(config)
        batch = task.workload.batch

        def late(clients: Any, positions: Any, *address: int) -> Any:
            """Return samples, once there may be some."""
            if positions.size > 1:  # it is asked for one sample first, to see how large they are
                until.wait(60)
            return batch(clients, positions, *address)

        vars(task.workload)["batch"] = late
        return task

    return make


@pytest.mark.parametrize(
    ("options", "reason"), [({"deadline_seconds": 2.0}, "deadline"), ({"over_selection": 1.6}, "over-selection")]
)
def test_clients_dropped_by_the_clock_are_dropped_again(
    options: dict[str, float], reason: str, nodes: Nodes, tmp_path: Path
) -> None:
    """With private state, which must be that of the last round whose update was used."""
    clients = {"num": 5, "per_round": 3 if reason == "over-selection" else 5, "quorum": 0.1, **options}
    config = configure({"algorithm": "scaffold", "clients": clients, "rounds": 2})
    over = threading.Event()
    nodes.start([0, 1, 2, 3])
    nodes.start([4], make_task=stalled(over))
    run = gossamer.run(real(config, nodes), out=tmp_path / "network")
    over.set()
    dropped = [event for event in read_events(run.directory) if event["kind"] == "update-dropped"]
    assert {event["reason"] for event in dropped} == {reason}
    assert 4 in {event["client"] for event in dropped}
    again = gossamer.run({**config, "replay": str(run.directory)}, out=tmp_path / "replayed")
    assert_same(run, again, but=("local_accuracy", "worst_client_accuracy"))
    not_evaluated = events(run.directory, "not-evaluated")
    assert len(not_evaluated) == 2
    assert all(4 in event["clients"] for event in not_evaluated), "nor does it answer in time how good the model is"


def test_a_run_of_another_experiment_is_not_replayed(tmp_path: Path) -> None:
    config = configure({"rounds": 1})
    gossamer.run(config, out=tmp_path / "run")
    again = {**config, "replay": str(tmp_path / "run")}
    assert_same(gossamer.run(again, out=tmp_path / "same"), gossamer.load(tmp_path / "run"))
    for changes, told in (
        ({"train.lr": 0.2}, r"of another experiment, in which train.lr = 0.1, not 0.2"),
        ({"workload.dataset.noise": 1.0}, r"workload.dataset.noise = 2.0, not 1.0"),
    ):
        with pytest.raises(ConfigError, match=told):
            gossamer.run({**configure({"rounds": 1, **changes}), "replay": again["replay"]}, out=tmp_path / "other")


def test_data_of_another_shape(nodes: Nodes, tmp_path: Path) -> None:
    """The client refuses, and both it and the server say which shapes they have."""
    config = configure({"clients": {"num": 1, "per_round": 1}})
    table = tmp_path / "own.csv"
    table.write_text("a,b,label\n" + "".join(f"{n}.0,{-n}.0,{n % 2}\n" for n in range(20)))
    stopped = threading.Event()
    nodes.start(
        [0],
        make_task=lambda told: held_task_of(told, 0, {"name": "table", "path": str(table)}),
        is_simulated=False,
    )
    hooks = experiment.Hooks(tell=lambda line: stopped.set() if "refuses" in line else None, is_ended=stopped.is_set)
    with pytest.raises(Interrupted):
        experiment.run(real(config, nodes), out=tmp_path / "network", hooks=hooks)
    nodes.join()
    (error,) = nodes.errors
    told = "the data have samples of shape [2] and 2 labels, but those of the server samples of shape [1, 8, 8] and 10"
    assert str(error).startswith(told)


def test_own_data(nodes: Nodes, tmp_path: Path) -> None:
    """Clients of other data than the server's tell how many samples there are, and of which labels; nothing else."""
    config = configure({"clients": {"num": 2, "per_round": 2}, "rounds": 2})
    shared = {"name": "synthetic", "num_test": 40, "noise": 2.0}
    for client, num_train in ((0, 50), (1, 80)):
        own = {**shared, "num_train": num_train}
        nodes.start(
            [client],
            make_task=lambda told, client=client, own=own: held_task_of(told, client, own),  # type: ignore[misc]
            is_simulated=False,
        )
    run = gossamer.run(real(config, nodes), out=tmp_path / "network")
    nodes.join()
    assert not nodes.errors
    assert [record["total_samples"] for record in run.metrics] == [130, 260]


def test_own_data_of_different_modalities(nodes: Nodes, tmp_path: Path) -> None:
    """Each client has the modalities of its number, whatever its own data have, and sends their modules alone."""
    kinds = {"video+text": 0.34, "text": 0.33, "video": 0.33}
    tasks = ["retrieval", "masked-language", "recognition"]
    options = {**SMALL, "tasks": tasks, "modalities": kinds}
    clients = {"num": 3, "per_round": 3, "partition": "iid"}
    config = configure({"workload": {"name": "video-language", **options}, "clients": clients, "rounds": 1})
    config["engine"] = {"name": "local", "workers": 0, "modes": {"stacked": True}}
    simulated = build(parse(config)).task.workload
    sizes = [60, 70, 80]
    for client, num_train in enumerate(sizes):
        own = {**SMALL["dataset"], "num_train": num_train}
        nodes.start(
            [client],
            make_task=lambda told, client=client, own=own: held_task_of(told, client, own),  # type: ignore[misc]
            is_simulated=False,
        )
    run = gossamer.run(real(config, nodes), out=tmp_path / "network")
    nodes.join()
    assert not nodes.errors
    (record,) = run.metrics
    assert record["total_samples"] == sum(sizes)
    assert record["num_dropped"] == 0
    held = [simulated.holdings[kind].name for kind in simulated.client_holdings(np.arange(3))]
    assert sorted(held) == sorted(kinds)
    (again,) = gossamer.run(config, out=tmp_path / "local").metrics
    assert record["total_bytes_up"] == again["total_bytes_up"]


def test_processes_that_are_killed(tmp_path: Path) -> None:
    """One command starts server and clients, and starts those again that die."""
    config = configure({"algorithm": "scaffold", "rounds": 4} | modes(**STACKED))
    config = {**config, "checkpoint": {"every_seconds": 1000}}

    class Killing:
        """Kills a process of clients after the second round."""

        def on_block(self, round: int, done: int, total: int) -> None:
            """Do nothing."""

        def on_round(self, record: Mapping[str, Any]) -> None:
            """Kill a process after the second round."""
            if record["round"] == 2:
                pattern = ["pgrep", "-P", str(os.getpid()), "-f", "clients-1"]
                found = subprocess.run(pattern, capture_output=True, text=True, check=True)
                os.kill(int(found.stdout.split()[0]), signal.SIGKILL)

    hooks = experiment.Hooks(observer=lambda name, num_rounds: Killing())
    given = {**config, "engine": {**config["engine"], "name": "network", "workers": 2}}
    run = experiment.run(given, out=tmp_path / "network", hooks=hooks)
    assert [event["worker"] for event in read_events(run.directory) if event["kind"] == "worker-restarted"] == [
        "clients-1"
    ]
    assert_same(run, gossamer.run(config, out=tmp_path / "local"))


def test_server_that_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    """Its clients wait for it; started again, it goes on from its last commit. A sampler holds it before that."""
    config = configure({"algorithm": "scaffold", "rounds": 6, "clients.sampler": "gate:hold"} | modes(**STACKED))
    file, out = tmp_path / "config.yaml", tmp_path / "network"
    file.write_text(yaml.safe_dump(config))
    nodes.start([0, 1, 2, 3])
    nodes.start([4, 5, 6, 7])
    command = [sys.executable, "-m", "gossamer", "node", "server", str(file), "--listen", nodes.address]
    command += ["--out", str(out), "--quiet"]
    first = subprocess.Popen(command, env=environment() | {"GATE": str(tmp_path)})
    try:
        wait_for(lambda: (tmp_path / "reached").exists() and len(read_metrics(out)) >= 2, out)
    finally:
        first.kill()
        first.wait()
    assert len(read_metrics(out)) < 6
    subprocess.run(command, check=True, timeout=200, env=environment())
    nodes.join()
    assert not nodes.errors
    assert_same(experiment.resume(out), gossamer.run(config, out=tmp_path / "local"))


def wait_for(is_so: Callable[[], bool], directory: Path) -> None:
    """Wait until something is so of a run."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (directory / "config.yaml").exists() and is_so():
            return
        time.sleep(0.02)
    raise AssertionError("it never was")
