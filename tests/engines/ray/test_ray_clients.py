"""Federations on Ray: the bits of the local engine, whatever the number of actors, the kind of work and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from federation import (
    LEVELS,
    SCAFFOLD,
    SINGLY,
    STACKED,
    Injected,
    assert_same,
    configure,
    digest,
    environment,
    events,
    failing,
    mixed,
    wait_for,
)
from gossamer import resume, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.ray.actor_pool import ActorPool
from gossamer.engines.ray.client_actor import ClientActor
from gossamer.engines.ray.cluster import arrays_of
from gossamer.engines.ray.shared_memory import SharedMemory
from gossamer.engines.task import VariantMode
from gossamer.engines.training.job import Job
from gossamer.errors import ConfigError, DataError, EngineError, GossamerError, Interrupted
from gossamer.experiment import Hooks
from gossamer.plan import Block
from gossamer.profiling.spans import Spans
from gossamer.storage.runlog import read_metrics
from slow_peers import decentralized

SHARED = pytest.mark.usefixtures("one_ray")

RAY = {"engine.name": "ray", "engine.workers": 2}
CNN = {"workload.model": {"name": "cnn", "width": 0.125}, "submodel.scaler": False, "rounds": 2}
CASES: dict[str, dict[str, Any]] = {
    "rolling": mixed("fedrolex", **STACKED) | {"evaluation": {"by_capacity": True}},
    "random": mixed("fedavg", **SINGLY) | {"submodel.strategy": "random"},
    "magnitude": mixed("fedavg", **STACKED) | {"submodel.strategy": "magnitude", "evaluation.by_capacity": True},
    "codecs": mixed("fedrolex", **STACKED)
    | {"communication": {"uplink": {"name": "top-k", "share": 0.05}, "downlink": "int8"}},
    "codecs of each client's own windows": mixed("federated-dropout", **SINGLY)
    | {"communication": {"uplink": {"name": "int4", "rounding": "nearest"}, "downlink": "int8"}},
    "changes sent by the server": {
        "clients": {"num": 4, "per_round": 4},
        "communication": {"uplink": "sign", "downlink": {"name": "top-k", "share": 0.05}},
    },
    "windows of each client's own": mixed("federated-dropout"),
    "private state": SCAFFOLD | {"clients.num": 4},
    "channels last": mixed("fedrolex", (0.5, 1.0), **SINGLY, channels_last=True) | CNN,
    "a plug-in found by path": {"workload.name": "recording:Recording", "algorithm": "counting:Counting"},
    "scalars of a plug-in": {"algorithm": "tallying:Tallying"},
    "private state of windows": mixed("keeping:Keeping", **STACKED) | {"submodel.strategy": "random"},
    "moments of windows": mixed("fedrolex", **STACKED)
    | {"train.optimizer": {"name": "adamw", "state": "keep"}, "train.lr": 0.01},
    "two phases, private state": {"algorithm": "two_phases:FedLin"},
    "two phases, rolling": mixed("two_phases:MimeLite", **STACKED),
    "one too large": {
        "workload.name": "faulty:Faulty",
        "workload.clients": [3],
        "workload.fault": "huge",
        "train": {"lr": 0.1, "batch_size": 20, "steps": 1},
        "clients.per_round": 8,
    },
    "frozen parameters": mixed("fedrolex", (0.5, 1.0))
    | {"workload.model": "user_modules:Adapted", "train.weight_decay": 0.1, "rounds": 2},
    "dropout": mixed("fedrolex", (0.5, 1.0), **STACKED) | {"workload.model": "user_modules:Dropping", "rounds": 2},
    "low-rank factors": mixed("heterofl", (0.5, 1.0))
    | {
        "workload.model": "user_modules:Tokens",
        "workload.lora": {"rank": 4, "targets": ["hidden", "*.out_proj"], "train": ["head.*"]},
    }
    | {"rounds": 2},
    "rows of every client": mixed("flexlora", (0.5, 1.0), **STACKED)
    | {
        "workload.model": "user_modules:Tokens",
        "workload.lora": {"rank": 4, "targets": ["hidden"], "train": ["head.*"]},
    }
    | {"rounds": 2},
    "buffers that change": {
        "workload.model": "user_modules:Tracking",
        "workload.buffers": "personal",
        "rounds": 2,
        "clients": {"num": 4, "per_round": 3},
    },
    "double precision": mixed("fedrolex", (0.5, 1.0), **STACKED)
    | {"train.precision": "float64", "train.momentum": 0.9, "train.optimizer": {"name": "sgd", "state": "keep"}},
    "float64": {
        "workload": {"name": "least-squares", "dim": 5, "num_samples": 12, "heterogeneity": 1.0},
        "train.batch_size": 4,
    },
}
GOLDEN = {"clients": configure(CASES["rolling"] | {"rounds": 5}), "peers": decentralized({"rounds": 5})}


def on_ray(config: Mapping[str, Any], workers: int = 2, **engine: Any) -> dict[str, Any]:
    """Return an experiment that runs on Ray."""
    return dict(config) | {"engine": config["engine"] | {"name": "ray", "workers": workers, **engine}}


@pytest.mark.sweep(keep=0.08)
@SHARED
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_own", [False, True], ids=["object store", "shared memory"])
def test_bits_of_the_local_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, is_own: bool) -> None:
    config = configure(CASES[case])
    here = run(config, out=tmp_path / "local")
    replies = [] if not is_own else recorded(monkeypatch)
    there = run(on_ray(config), out=tmp_path / "ray")
    assert_same(there, here)
    assert events(there.directory, "retry") == []
    assert bool(replies) == is_own


@pytest.mark.sweep(keep=0.5, at_least=1)
@SHARED
@pytest.mark.parametrize("started", [True, False], ids=["before the commit", "after"])
def test_resumed_between_phases(tmp_path: Path, started: bool) -> None:
    """The fourth commit is that of the first phase of round 2."""
    config = configure(CASES["two phases, private state"])
    with pytest.raises(Injected):
        run(on_ray(config), out=tmp_path / "ray", hooks=failing("commit", started, 4))
    assert_same(resume(tmp_path / "ray"), run(config, out=tmp_path / "local"))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make engines take the Ray of the tests for one of their own; list what they find in their own memory."""
    replies: list[Any] = []
    take_back = SharedMemory.take_back
    monkeypatch.setattr("gossamer.engines.ray.engine.is_running", lambda: False)
    monkeypatch.setattr(SharedMemory, "take_back", lambda self, reply: replies.append(reply) or take_back(self, reply))
    return replies


@SHARED
def test_actors_with_and_without_gpus_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts GPUs that it is told of, so that who trains what can be tested without any."""
    import ray

    ways = [{"capacity": level, **SINGLY} | ({"device": "cpu:0"} if level >= 0.5 else {}) for level in LEVELS]
    config = configure(mixed("fedrolex", **SINGLY) | {"engine.modes": ways, "clients.per_round": 8})
    here = run(config, out=tmp_path / "local")
    inner, seen = ActorPool.map, list[tuple[list[str], float]]()

    def noted(self: ActorPool, *given: Any) -> Iterator[Any]:
        yield from inner(self, *given)
        seen.append((sorted(actor.kind for actor in self._actors), ray.available_resources().get("GPU", 0)))

    monkeypatch.setattr(ActorPool, "map", noted)
    # The device is the processor, but the engine takes it for a GPU's.
    monkeypatch.setattr(VariantMode, "is_on_gpu", property(lambda self: self.device == "cpu:0"))
    assert_same(run(on_ray(config), out=tmp_path / "ray"), here)
    assert seen[-1] == (["cpu", "cpu", "gpu", "gpu"], 0)


@SHARED
def test_gpus_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.engines.ray.engine.num_gpus", lambda: 0)
    config = configure({"engine.modes": [{"capacity": 1.0, "device": "cuda"}]})
    with pytest.raises(ConfigError, match="Ray finds no GPU"):
        run(on_ray(config), out=tmp_path / "clients")


@pytest.mark.sweep(keep=0.2)
@SHARED
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", GOLDEN)
def test_the_number_of_actors_changes_no_bits(tmp_path: Path, kind: str, workers: int) -> None:
    here = run(GOLDEN[kind], out=tmp_path / "local")
    assert_same(run(on_ray(GOLDEN[kind], workers), out=tmp_path / "ray"), here)
    other = GOLDEN[kind] | {"seed": 1}  # the comparison above could fail
    assert digest(run(other, out=tmp_path / "seed").params) != digest(here.params)


@pytest.mark.sweep(keep=0.25)
@SHARED
@pytest.mark.parametrize("case", ["rolling", "private state"])
@pytest.mark.parametrize("engines", [("local", "ray"), ("ray", "local")], ids=" then ".join)
def test_resumed_on_the_other_engine(tmp_path: Path, case: str, engines: tuple[str, str]) -> None:
    config = configure(CASES[case] | {"rounds": 4})
    whole = run(config, out=tmp_path / "whole")
    first = config | {"engine": config["engine"] | {"name": engines[0], "workers": 1}}
    with pytest.raises(Injected):
        run(first, out=tmp_path / "part", hooks=failing("train", True, 3))
    assert_same(resume(tmp_path / "part", overrides=[f"engine.name={engines[1]}", "engine.workers=1"]), whole)


@SHARED
def test_an_actor_that_trained_nothing_evaluates_the_windows_of_the_round() -> None:
    """Channels are ordered by the model before the round, whoever asks for them after it."""
    import ray

    parts = build(parse(configure(CASES["magnitude"])))
    recipe = {"factory": "gossamer.task:task_of", "config": parts.config.model_dump(mode="json"), "paths": []}
    before, after = ({"x": parts.workload.init(seed)[None].numpy()} for seed in (1, 2))
    order, other_order = (arrays_of(parts.task.cutter.order(torch.tensor(state["x"][0]))) for state in (before, after))
    plan = parts.planner.plan(3)
    first = (values[:1] for values in (plan.client, plan.weight, plan.steps))
    job = Job(3, 0, Block(0, 0, 1, slice(0, 1)), *first, 0.1)
    trained, idle = (ClientActor(json.dumps(recipe), []) for _ in range(2))
    where = {"is_cut": False, "memory": None, "slot": None}
    trained.train(json.dumps(job.message() | where), [ray.put(before)], order, {})
    message = json.dumps({"kind": "evaluate", "variant": 0, "round": 3, "chunk": 0, "statistics": {}, "memory": None})
    expected = trained.handle(message, after, order)
    assert idle.handle(message, after, order) == expected
    assert idle.handle(message, after, other_order) != expected  # the comparison could fail


class TestErrors:
    @SHARED
    @pytest.mark.parametrize(
        ("fault", "error", "message"),
        [
            ("refuse", DataError, r"^client 3 has no data: give it some$"),
            ("raise", EngineError, r"ArithmeticError: client 3 cannot count"),
        ],
    )
    def test_of_a_plug_in(self, tmp_path: Path, fault: str, error: type[GossamerError], message: str) -> None:
        """It does not hang; what was done before is committed, and goes on once the fault is gone."""
        flag = tmp_path / "flag"
        flag.touch()
        options = {"name": "faulty:Faulty", "fault": fault, "clients": [3], "first_round": 1, "flag": str(flag)}
        config = configure({f"workload.{key}": value for key, value in options.items()} | {"clients.per_round": 8})
        with pytest.raises(error, match=message):
            run(on_ray(config, 1), out=tmp_path / "run")
        assert len(read_metrics(tmp_path / "run")) == 1
        flag.unlink()
        resumed = resume(tmp_path / "run", overrides=["engine.name=local", "engine.workers=0"])
        assert_same(resumed, run(config, out=tmp_path / "whole"))

    def test_no_cluster_at_an_address(self, tmp_path: Path) -> None:
        done = gossamer("run", write(tmp_path, on_ray(configure(), address="127.0.0.1:1")), "--out", tmp_path / "run")
        _, errors = done.communicate(timeout=200)
        assert done.returncode == 2
        (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "cannot join the Ray cluster at '127.0.0.1:1'" in sentence
        assert "Traceback" not in errors


class TestInterrupted:
    @SHARED
    def test_within_a_round(self, tmp_path: Path) -> None:
        """Ctrl-C is heard between two blocks; the last whole round is committed, and the run can be resumed."""
        config = configure(CASES["rolling"] | {"rounds": 4})

        def interrupt(span: str, starts: bool) -> None:
            seen.append(span)
            if (span, starts) == ("train", True) and seen.count("train") == 3:
                os.kill(os.getpid(), signal.SIGINT)

        def spans() -> Spans:
            made = Spans()
            made.listeners.append(interrupt)
            return made

        seen: list[str] = []
        with pytest.raises(Interrupted, match=r"stopped after round 1 of 4; resume with: gossamer resume"):
            run(on_ray(config), out=tmp_path / "run", hooks=Hooks(spans=spans))
        assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "whole"))

    @SHARED
    def test_an_error_outside(self, tmp_path: Path) -> None:
        """Whatever ends a run, its actors are stopped."""
        with pytest.raises(Exception, match="exchange 2"):
            run(on_ray(configure(), 1), out=tmp_path / "run", hooks=failing("exchange", True, 2))
        resumed = resume(tmp_path / "run", overrides=["engine.name=local", "engine.workers=0"])
        assert_same(resumed, run(configure(), out=tmp_path / "whole"))

    @pytest.mark.sweep(keep=0.3, at_least=1)
    @pytest.mark.parametrize(
        "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "scheduler", "hang-up"]
    )
    def test_from_outside(self, tmp_path: Path, number: signal.Signals) -> None:
        """A terminal interrupts all processes of the group, Ray's too; a scheduler asks only ours to stop."""
        config = configure({"rounds": 100_000, "evaluation": {"every": 1000}, "checkpoint.every_seconds": 1000})
        process = gossamer("run", write(tmp_path, on_ray(config)), "--out", tmp_path / "run")
        wait_for(lambda: process.poll() is not None or len(list_metrics(tmp_path / "run")) >= 3, 120)
        assert process.poll() is None, process.communicate()
        if number != signal.SIGTERM:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 130, errors
        assert "error: stopped after round" in errors
        logged = read_metrics(tmp_path / "run")
        assert f"stopped after round {len(logged)} of" in errors
        assert committed(tmp_path / "run") == len(logged)


@pytest.mark.sweep(keep=0.5, at_least=1)
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_daemon_that_dies_is_one_sentence(tmp_path: Path, name: str) -> None:
    config = configure({"rounds": 100_000, "evaluation": {"every": 1000}, "checkpoint.every_seconds": 1000})
    process = gossamer("run", write(tmp_path, on_ray(config)), "--quiet", "--out", tmp_path / "run")
    wait_for(lambda: process.poll() is not None or len(list_metrics(tmp_path / "run")) >= 3, 120)
    of_driver, found = rf"\d+ \({name}\) \w {process.pid} ", list[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in the meantime
            found += [int(path.parent.name)] if re.match(of_driver, path.read_text(errors="replace")) else []
    (daemon,) = found
    os.kill(daemon, signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"error: Ray's process {name} ended, as when it was killed or memory was short: look at")
    assert committed(tmp_path / "run") == len(read_metrics(tmp_path / "run"))


def gossamer(*arguments: Any) -> subprocess.Popen[str]:
    """Start the command line in a group of its own."""
    command = [sys.executable, "-m", "gossamer.cli.main", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(), start_new_session=True)


def write(folder: Path, config: Mapping[str, Any]) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    return path


def list_metrics(directory: Path) -> list[Any]:
    return read_metrics(directory) if (directory / "metrics.jsonl").exists() else []


def committed(directory: Path) -> int:
    """Return the round of the last commit."""
    from gossamer.storage.checkpoint import Checkpoints

    latest = Checkpoints(directory / "checkpoints").latest()
    assert latest is not None
    return latest.round
