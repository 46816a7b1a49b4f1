"""Runs on ranks that are recorded: each rank writes a trace of its own, bytes are counted, and bits stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.profiling.graphs import messages_of
from gossamer.profiling.trace import read_trace, stage_totals
from gossamer.reports.profile import examine
from traces import unattributed

SYNTHETIC = {"name": "synthetic", "num_train": 90, "num_test": 20, "noise": 2.0}
IMAGES = {"name": "image-classification", "dataset": SYNTHETIC, "model": {"name": "mlp", "hidden": [64]}}
COMMON = {"rounds": 4, "workload": IMAGES, "train": {"lr": 0.1, "batch_size": 8}}
RUNS: dict[str, dict[str, Any]] = {
    "clients": COMMON | {"clients": {"num": 8, "per_round": 6}},
    "peers": COMMON | {"peers": {"num": 8, "topology": "ring"}},
}
SCRIPT = """
import json, os, sys
import gossamer
from gossamer.engines.collective.group import Group
from gossamer.profiling.recorder import Recorder

groups, counted, path = [], {}, ""
make, begin, close = Group.__init__, Recorder.__init__, Recorder.close

def make_noted(self, *arguments, **options):
    groups.append(self)
    make(self, *arguments, **options)

def begin_noted(self, *arguments):
    self.began = groups[-1].bytes_sent
    begin(self, *arguments)

def close_noted(self):
    counted[self.directory.parent.name] = groups[-1].bytes_sent - self.began
    close(self)

Group.__init__, Recorder.__init__, Recorder.close = make_noted, begin_noted, close_noted
for name, config in json.loads(sys.argv[1]).items():
    gossamer.run(config, out=f"{sys.argv[2]}/{name}")
with open(f"{sys.argv[2]}/bytes.{os.environ['RANK']}", "w") as file:
    json.dump(counted, file)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run and record all at once on two ranks, because starting processes takes longer than what they do."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "every.py").write_text(SCRIPT)
    configs = {name: config | {"engine": {"name": "collective"}, "profile": True} for name, config in RUNS.items()}
    command = [sys.executable, str(Path(__file__).with_name("launch.py")), "2", str(directory / "every.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, json.dumps(configs), str(directory)], check=True, timeout=240, env=environment)
    return directory


def bytes_of(trace: Path, kind: str) -> Counter[str]:
    """Return the bytes of all spans of a kind, by message, as they stand in the files of a trace."""
    found = Counter[str]()
    for path in (trace / "trace").glob("*.jsonl"):
        for line in path.read_text().splitlines()[1:]:
            span = json.loads(line)
            if isinstance(span, list) and span[0] == kind and span[7]:
                found[span[7]] += span[6]
    return found


@pytest.mark.parametrize("name", RUNS)
class TestRanks:
    def test_the_bits_are_those_of_a_run_that_is_not_recorded(self, name: str, runs: Path, tmp_path: Path) -> None:
        plain = gossamer.run(RUNS[name] | {"engine": {"workers": 0}}, out=tmp_path / "plain")
        found = gossamer.load(runs / name).state_dict()
        assert all(torch.equal(value, found[key]) for key, value in gossamer.load(plain.directory).state_dict().items())

    def test_bytes_of_spans_are_those_of_the_messages(self, name: str, runs: Path) -> None:
        counted = [json.loads((runs / f"bytes.{rank}").read_text())[name] for rank in range(2)]
        sent, received = (bytes_of(runs / name, kind) for kind in ("send", "receive"))
        assert sent.total() == pytest.approx(sum(counted), rel=0.01)
        both = sent.keys() & received.keys()
        assert len(both) > 0.9 * len(sent)
        assert {key: sent[key] for key in both} == {key: received[key] for key in both}

    def test_ranks_are_linked_and_add_up(self, name: str, runs: Path) -> None:
        trace = read_trace(runs / name)
        assert [one.number for one in trace.rounds] == [1, 2, 3, 4]
        last = trace.rounds[-1]
        assert {lane.name for lane in last.lanes} == {"driver", "rank-0"}
        for segments in last.lanes.values():
            assert sum(segment.seconds for segment in segments) == pytest.approx(last.seconds, rel=1e-3)
        _, arrivals = messages_of(last)  # which of them were waited for depends on who was quicker
        assert {arrival.lane.name for arrival in arrivals} == {"driver", "rank-0"}
        assert {"train", "evaluate", "serialise", "wait"} <= stage_totals(trace.rounds).keys()
        assert examine(trace).replay_error < 0.03
        assert min(map(unattributed, trace.rounds)) < 0.1  # a gap between spans would be in every round
