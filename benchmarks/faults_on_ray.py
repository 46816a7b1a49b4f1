"""Blows at runs on Ray.

Three experiments on made-up images: FedRolex with mixed capacities and gradient tracking of peers, each on a Ray of its
own, and SCAFFOLD on a cluster of two nodes. A child process runs
one, commits every round, and reports the start and end of every span through a pipe; this process draws what to do to
it, and when:

- kill-in-round: SIGKILL to an actor at a random moment of a round; kill-at-boundary: when a phase starts or ends;
- stop: SIGSTOP to an actor, and SIGCONT later, sooner or later than the run gives its work to others;
- kill-driver: SIGKILL to the child; the next one resumes its directory;
- kill-node: SIGKILL to the raylet of the second node, which then joins anew.

A blow counts if its target was alive. Of the Rays of killed drivers nothing may stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import gossamer
import kill_and_resume
from gossamer.storage.runlog import read_config, read_events, read_metrics

NUM_FAULTS = 200
STRAGGLER_SECONDS = 1.5
WARM_UP_ROUNDS = 100  # in which caches and allocators fill
GONE_SECONDS = 150.0  # in which the Ray of a killed driver must be gone
PHASES = ("train", "exchange", "evaluate", "commit")
KINDS = ("kill-in-round", "kill-at-boundary", "kill-driver", "stop")
LEVELS = (0.25, 0.5, 1.0)
BASE: dict[str, Any] = {
    "rounds": 40,
    "workload": {"dataset": {"name": "synthetic", "num_train": 150, "num_test": 40}, "model": "softmax"},
    "train": {"lr": 0.1, "batch_size": 8},
    "checkpoint": {"every_seconds": 0},
    "engine": {"workers": 2, "block_size": 1, "modes": [{"capacity": 1.0}]},
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "fedrolex": {
        "algorithm": "fedrolex",
        "workload": BASE["workload"] | {"model": {"name": "mlp", "hidden": [16]}},
        "clients": {"num": 12, "per_round": 8},
        "submodel": {"capacities": list(LEVELS)},
        "engine": BASE["engine"] | {"modes": [{"capacity": level} for level in LEVELS]},
    },
    "peers": {"algorithm": "dsgt", "peers": {"num": 12, "topology": "random-match"}},
    "cluster": {"algorithm": "scaffold", "clients": {"num": 12, "per_round": 8}},
}
ON_RAY: dict[str, dict[str, Any]] = {name: {"name": "ray"} for name in EXPERIMENTS}


def configuration(name: str, seed: int, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return one of the experiments, on the engine described."""
    data = BASE | {"name": name, "seed": seed} | EXPERIMENTS[name]
    return data | {"engine": data["engine"] | dict(engine)}


def digest(run: gossamer.Run) -> str:
    """Return the hash that a child reports of its final model."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in run.params.values())).hexdigest()


def without_clocks(directory: Path) -> list[dict[str, Any]]:
    """Return a run's metrics but for the fields that a clock fills."""
    return [{k: v for k, v in one.items() if k not in kill_and_resume.CLOCKS} for one in read_metrics(directory)]


class Child(kill_and_resume.Child):
    """A child process, what it has reported so far, and when its rounds began."""

    def __init__(self, directory: Path, config: Path) -> None:
        self._reports, theirs = os.pipe()
        command = [sys.executable, kill_and_resume.__file__, "--child", str(directory), str(config), str(theirs)]
        self.process = subprocess.Popen(command, pass_fds=[theirs], stdout=sys.stderr)  # Ray tells there who died
        os.close(theirs)
        self.lines: list[str] = []
        self.began: list[float] = []
        self._rest = b""

    def read(self) -> bool:
        """Wait for reports; returns False when the child is gone."""
        is_there = super().read()
        self.began += [time.monotonic()] * (self.lines.count("+train") - len(self.began))
        return is_there

    def next(self, line: str, count: int = 1) -> bool:
        """Read until a line was reported again, `count` times; returns False if the child ends first."""
        self.drain()
        wanted = self.lines.count(line) + count
        return self.read_until(lambda: self.lines.count(line) >= wanted)

    def drain(self) -> None:
        """Read what is there by now."""
        while select.select([self._reports], [], [], 0)[0] and self.read():
            pass

    def round_seconds(self) -> float:
        """Return how long a round takes, or a guess."""
        gaps = np.diff(self.began)
        return statistics.median(gaps.tolist()) if len(gaps) > 2 else 0.2

    def kill(self) -> None:
        """Send it SIGKILL and wait for its end."""
        self.process.kill()
        self.finish()


# ---- processes, as the kernel sees them


def processes() -> Iterator[tuple[int, int, str, str]]:
    """Yield pid, parent, title and start of all live processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if fields[0] != "Z":
                yield int(folder.name), int(fields[1]), title, fields[19]


def descendants(ancestor: int) -> list[tuple[int, int, str, str]]:
    """Return the processes that a process, its children and theirs started."""
    everyone, found = list(processes()), [ancestor]
    for pid in found:
        found += [one[0] for one in everyone if one[1] == pid]
    return [one for one in everyone if one[0] in found[1:]]


def is_actor(title: str) -> bool:
    """Tell whether a process's title is that of one of our actors."""
    return title.startswith(("ray::ClientActor", "ray::PeerActor"))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until a condition holds; returns False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class TwoNodes:
    """A Ray cluster of two nodes on this machine, of which the second can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._second = self._cluster.add_node(num_cpus=1)
        self.address: str = self._cluster.address

    def lose_one(self) -> bool:
        """Kill the second node's raylet, and let a new one join; returns False if it has no actor."""
        raylet = self._second.all_processes["raylet"][0].process.pid
        if not any(parent == raylet and is_actor(title) for _, parent, title, _ in processes()):
            return False
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(num_cpus=1)
        return True

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()


# ---- blows


class Trial:
    """One experiment, struck many times."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        """Run the experiment undisturbed on the local engine; what follows takes its resolved configuration."""
        self.name, self.folder, self.random = name, folder, random.Random(f"{options.seed} {name}")
        reference = folder / f"{name}-undisturbed"
        done = gossamer.run(configuration(name, options.seed, {"workers": 0}), out=reference)
        self.expected = digest(done), without_clocks(reference)
        self.nodes = TwoNodes() if name == "cluster" else None
        resolved = read_config(reference)
        engine = ON_RAY[name] | {"workers": 2, "straggler_seconds": STRAGGLER_SECONDS}
        engine |= {"address": self.nodes.address} if self.nodes is not None else {}
        self.config = folder / f"{name}.json"  # JSON is YAML
        self.config.write_text(json.dumps(resolved | {"engine": resolved["engine"] | engine}))
        self.fired: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.killed: list[tuple[int, int, str, str]] = []
        self.num_runs, self.num_resumed, self.all_equal, self.actors_gone_seconds = 0, 0, True, 0.0

    def strike(self, num_faults: int) -> None:
        """Strike that often, and compare every run with the reference."""
        own = ("kill-node", *KINDS) if self.nodes is not None else KINDS
        waiting = [own[number % len(own)] for number in range(num_faults)]
        self.random.shuffle(waiting)
        while waiting:
            self.num_runs += 1
            directory = self.folder / f"{self.name}-{self.num_runs}"
            while not self._run(directory, waiting):
                self.num_resumed += 1
            self._compare(directory)

    def close(self) -> None:
        """Stop the cluster."""
        if self.nodes is not None:
            self.nodes.close()

    def _run(self, directory: Path, waiting: list[str]) -> bool:
        """Run or resume, and strike as often as there is something to strike at; returns False if the driver died."""
        child = Child(directory, self.config)
        while waiting and child.next("+train", self.random.randint(1, 3)):
            if not self._strike(child, waiting[-1]):
                continue
            kind = waiting.pop()
            self.fired[kind] += 1
            if kind == "kill-driver":
                return False
        child.finish()
        if child.process.returncode != 0:
            raise RuntimeError(f"{directory} failed with exit code {child.process.returncode}: see its message above")
        self.outcome = child.lines[-1].removeprefix("="), without_clocks(directory)
        return True

    def _strike(self, child: Child, kind: str) -> bool:
        """Do something to a run; returns False if its target was gone."""
        if kind == "kill-at-boundary":
            if not child.next(self.random.choice("+-") + self.random.choice(PHASES)):
                return False
        else:
            time.sleep(self.random.uniform(0, child.round_seconds()))
        child.drain()
        if any(line.startswith("=") for line in child.lines) or child.process.poll() is not None:
            return False
        if kind == "kill-driver":
            self._kill_driver(child)
            return True
        if kind == "kill-node":
            assert self.nodes is not None
            return self.nodes.lose_one()
        actors = [pid for pid, _, title, _ in descendants(self._home(child)) if is_actor(title)]
        if not actors:
            return False
        target = self.random.choice(sorted(actors))
        with suppress(ProcessLookupError):
            if kind != "stop":
                os.kill(target, signal.SIGKILL)
                return True
            os.kill(target, signal.SIGSTOP)
            time.sleep(self.random.uniform(0, 4 * STRAGGLER_SECONDS))
            with suppress(ProcessLookupError):  # killed and replaced meanwhile
                os.kill(target, signal.SIGCONT)
            return True
        return False

    def _home(self, child: Child) -> int:
        """Return the process whose descendants the actors are."""
        return child.process.pid if self.nodes is None else os.getpid()

    def _kill_driver(self, child: Child) -> None:
        before = descendants(self._home(child))
        left = [one for one in before if is_actor(one[2])] if self.nodes is not None else before
        child.kill()
        began, actors = time.monotonic(), {(one[0], one[3]) for one in left if is_actor(one[2])}
        wait_until(lambda: not actors & {(one[0], one[3]) for one in processes()}, GONE_SECONDS)
        self.actors_gone_seconds = max(self.actors_gone_seconds, time.monotonic() - began)
        self.killed += left

    def _compare(self, directory: Path) -> None:
        self.events.update(event["kind"] for event in read_events(directory))
        if self.outcome != self.expected:
            self.all_equal = False
            what = "parameters" if self.outcome[0] != self.expected[0] else "metrics"
            print(f"{directory.name}: the {what} differ from those of the undisturbed run", file=sys.stderr)

    def report(self) -> dict[str, Any]:
        """Return what this experiment adds to the JSON."""
        return {
            "fired": dict(sorted(self.fired.items())),
            "runs": self.num_runs,
            "resumed": self.num_resumed,
            "retries": self.events["retry"],
            "actors_replaced": self.events["actor-replaced"],
            "actors_gone_seconds": round(self.actors_gone_seconds, 2),
            "model_sha256": self.expected[0],
            "all_equal": self.all_equal,
        }


def left_behind(killed: list[tuple[int, int, str, str]]) -> list[str]:
    """Return the titles of those processes of killed drivers that do not go."""
    known = {(one[0], one[3]) for one in killed}

    def left() -> list[str]:
        """Return those that still run."""
        return [title for pid, _, title, start in processes() if (pid, start) in known]

    wait_until(lambda: not left(), GONE_SECONDS)
    return left()


# ---- memory


def memory(name: str, num_rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run calmly; return what every process takes, and how fast that grows once it is warm."""
    model = {"workload": BASE["workload"] | {"model": {"name": "mlp", "hidden": [128]}}}
    data = configuration(name, seed, ON_RAY[name]) | model | {"rounds": WARM_UP_ROUNDS + num_rounds}
    config = folder / f"{name}-memory.json"
    config.write_text(json.dumps(data))
    child, taken = Child(folder / f"{name}-memory", config), dict[str, list[tuple[float, ...]]]()
    while child.next("+train", 2):
        others = [(pid, role(title)) for pid, _, title, _ in descendants(child.process.pid)]
        for pid, who in [(child.process.pid, "driver"), *others]:
            with suppress(OSError, KeyError):  # it has just ended
                if who and len(child.began) > WARM_UP_ROUNDS:
                    key = f"{who} {pid}" if who == "actor" else who
                    taken.setdefault(key, []).append((len(child.began), *memory_bytes(pid)))
    child.finish()
    grown = {who: growth(np.array(samples).T) for who, samples in taken.items() if len(samples) > 10}
    return {"warm_up_rounds": WARM_UP_ROUNDS, "rounds": num_rounds, "processes": grown}


def role(title: str) -> str:
    """Return what a process does for the run; "": nothing that grows with rounds."""
    program = title.split(" ")[0].rpartition("/")[2]
    return "actor" if is_actor(title) else program if program in ("gcs_server", "raylet") else ""


def memory_bytes(pid: int) -> tuple[float, float]:
    """Return the memory that a process shares with nobody, and the pages of the object store that it has touched."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return float(status["RssAnon"].split()[0]) * 1024, float(status["RssShmem"].split()[0]) * 1024


def growth(samples: np.ndarray) -> dict[str, float]:
    """Return sizes at the end in MB, and slopes by least squares, of rounds, private and shared bytes [3, samples]."""
    (rounds, private, shared), half = samples / [[1], [1e6], [1e6]], samples.shape[1] // 2
    found = {
        "private_mb": private[-1],
        "private_mb_per_100_rounds": np.polyfit(rounds, private, 1)[0] * 100,
        "private_mb_per_100_rounds_of_last_half": np.polyfit(rounds[half:], private[half:], 1)[0] * 100,
        "shared_mb": shared[-1],
        "shared_mb_per_100_rounds": np.polyfit(rounds, shared, 1)[0] * 100,
    }
    return {name: round(float(value), 3) for name, value in found.items()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Strike at each experiment, or watch its memory; return what the JSON says of it."""
    if options.memory:
        return {"memory": {name: memory(name, options.memory, options.seed, folder) for name in ("fedrolex", "peers")}}
    names = options.experiments or list(EXPERIMENTS)
    bounds = np.linspace(0, options.faults, len(names) + 1)
    reports, killed = dict[str, Any](), list[tuple[int, int, str, str]]()
    for name, num_faults in zip(names, np.diff(np.round(bounds).astype(int)).tolist(), strict=True):
        trial = Trial(name, options, folder)
        try:
            trial.strike(num_faults)
        finally:
            trial.close()
        reports[name] = trial.report()
        killed += trial.killed
    fired = sum((Counter(report["fired"]) for report in reports.values()), Counter[str]())
    return {
        "experiments": reports,
        "fired": dict(sorted(fired.items())),
        "faults": fired.total(),
        "all_equal": all(report["all_equal"] for report in reports.values()),
        "left_behind": left_behind(killed),
    }
