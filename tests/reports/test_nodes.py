"""Traces of all peers of a run become one timeline, on which messages join them; and what does not fit is told."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import gossamer
from gossamer.cli.main import app
from gossamer.errors import ConfigError
from gossamer.profiling.exports import write_chrome
from gossamer.profiling.trace import Trace, read_trace
from gossamer.reports.nodes import read_nodes
from traces import span, write

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 100}, "model": "softmax"}
PEERS = ("peer-0", "peer-1", "peer-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record three peers and an observer, all processes of this machine."""
    config: dict[str, Any] = {"workload": IMAGES, "peers": {"num": 3, "topology": "ring"}, "train": {"lr": 0.1}}
    config |= {"rounds": 3, "engine": "network", "profile": True}
    return gossamer.run(config, out=tmp_path_factory.mktemp("peers") / "run").directory


@pytest.fixture
def copies(run: Path, tmp_path: Path) -> list[Path]:
    """Copy the directories of the peers, as somebody collects them."""
    for name in PEERS:
        shutil.copytree(run / "nodes" / name, tmp_path / name)
    return [tmp_path / name for name in PEERS]


def arrows(trace: Trace, path: Path) -> Counter[tuple[str, str]]:
    """Count the arrows of an export by the processes that they join; each goes on in time."""
    write_chrome(trace, path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    begins = {one["id"]: one for one in events if one["ph"] == "s"}
    ends = {one["id"]: one for one in events if one["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert all(begins[number]["ts"] < ends[number]["ts"] for number in begins)
    return Counter((names[begins[number]["pid"]], names[ends[number]["pid"]]) for number in begins)


def sent_slowly(directories: dict[str, Path], trace: Trace) -> Counter[tuple[str, str]]:
    """Count the messages between nodes whose both ends lie in the rounds of a trace, from the files."""
    begin = trace.rounds[0].unix_ns
    end = trace.rounds[-1].unix_ns + round(1e9 * trace.rounds[-1].seconds)
    ends: dict[str, dict[str, str]] = {"send": {}, "receive": {}}
    for name, directory in directories.items():
        for path in (directory / "trace").iterdir():
            header, *lines = map(json.loads, path.read_text().splitlines())
            day = header["unix_ns"] - header["monotonic_ns"]
            for kind, _, since, until, _, _, _, message in (one for one in lines if isinstance(one, list)):
                if kind in ends and message and begin < since + day and until + day < end:
                    ends[kind][message] = name
    return Counter((name, ends["receive"][key]) for key, name in ends["send"].items() if key in ends["receive"])


def test_a_run_and_the_peers_that_it_started_are_one(run: Path, tmp_path: Path) -> None:
    trace = read_nodes([run])
    assert [one.number for one in trace.rounds] == [1, 2, 3]
    for one in trace.rounds:
        assert {"observer", *PEERS} <= {lane.name for lane in one.lanes}
        for lane, segments in one.lanes.items():
            assert sum(each.seconds for each in segments) == pytest.approx(one.seconds), lane
    assert {lane.name for lane in trace.rounds[1].lanes if lane.leads} == {"observer"}
    assert sum(one.kind == "train" for each in trace.rounds for own in each.lanes.values() for one in own) >= 6
    found = arrows(trace, tmp_path / "chrome.json")
    expected = sent_slowly({"observer": run} | {name: run / "nodes" / name for name in PEERS}, trace)
    between = {pair: number for pair, number in expected.items() if pair[0] != pair[1]}
    for pair, number in between.items():
        assert found[pair] == pytest.approx(number, abs=2), pair  # at the ends of the first and the last round
    assert sum(between.values()) >= 9


def test_peers_alone_are_one_by_the_rounds_of_the_first(copies: list[Path], tmp_path: Path) -> None:
    trace = read_nodes([copies[1], copies[0], copies[2]])
    assert {lane.name for lane in trace.rounds[0].lanes if lane.leads} == {"peer-1"}
    assert (
        trace.rounds
        == read_trace(copies[1], {"peer-0": copies[0] / "trace", "peer-2": copies[2] / "trace"}, "peer-1").rounds
    )
    found = arrows(trace, tmp_path / "chrome.json")
    for sender in PEERS:
        for receiver in set(PEERS) - {sender}:
            assert found[sender, receiver] >= 1, (sender, receiver)


def test_a_single_peer_is_read_as_before(copies: list[Path]) -> None:
    assert read_nodes(copies[:1]) == read_trace(copies[0])


def test_the_command_takes_several(copies: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile", *map(str, copies), "--json", "--chrome", str(tmp_path / "c.json")])
    assert result.exit_code == 0, result.output
    assert set(PEERS) <= json.loads(result.stdout)["processes"].keys()


class TestClients:
    """A server, and two clients that recorded elsewhere."""

    @pytest.fixture
    def collected(self, tmp_path: Path) -> list[Path]:
        """Write their traces: in each round the server sends to both, and they answer; the second's clock is ahead."""
        (tmp_path / "server").mkdir()
        (tmp_path / "server/config.yaml").write_text("name: run\n")
        ahead = 5000
        spans = [span("send", 1, 1.5, message="a<1"), span("send", 2, 2.5, message="b<1")]
        spans += [span("receive", 8, 8.5, message="a>1"), span("receive", 9, 9.5, message="b>1")]
        write(tmp_path / "server", "driver", spans, [(1, 0, 10)])
        for name, late in (("a", 0), ("b.1", ahead)):
            key = name[0]
            spans = [span("receive", late + 3, late + 3.5, message=f"{key}<1"), span("train", late + 4, late + 6)]
            spans += [span("send", late + 7, late + 7.5, message=f"{key}>1")]
            write(tmp_path / name, "client", spans, boot=name)
        return [tmp_path / "server", tmp_path / "a/trace", tmp_path / "b.1"]

    def test_they_stand_beside_their_server(self, collected: list[Path], tmp_path: Path) -> None:
        folder = collected[2] / "trace"
        moved = [*collected[:2], folder.rename(tmp_path / "b.2")]
        trace = read_nodes(moved)
        (one,) = trace.rounds
        assert {lane.name for lane in one.lanes} == {"driver", "trace", "b_2"}
        assert trace.clocks["b_2"].offset == pytest.approx(5.0, abs=trace.clocks["b_2"].error)
        pairs = [("driver", "trace"), ("driver", "b_2"), ("trace", "driver"), ("b_2", "driver")]
        assert arrows(trace, tmp_path / "chrome.json") == Counter(pairs)

    def test_without_a_server_or_under_one_name_they_are_refused(self, collected: list[Path]) -> None:
        server, one, other = collected
        for given, told in (
            ([one], "is what a client recorded: give it with the run directory of its server"),
            ([server, one, other / "trace"], "two folders of clients have one name"),
            ([server, server / "trace"], r"trace' is that of '.*server', which is read with it: leave it out"),
        ):
            with pytest.raises(ConfigError, match=told):
                read_nodes(given)


def forget(copies: list[Path]) -> None:
    """Leave one out."""
    del copies[1]


def repeat(copies: list[Path]) -> None:
    """Give one twice."""
    copies.append(copies[0])


def change(copies: list[Path]) -> None:
    """Make one of another experiment."""
    path = copies[2] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"seed": 7}))


def erase(copies: list[Path]) -> None:
    """Make one that was not recorded."""
    shutil.rmtree(copies[2] / "trace")


def postpone(copies: list[Path]) -> None:
    """Make one of the same experiment on another machine, a day later."""
    for path in (copies[2] / "trace").iterdir():
        header, *lines = path.read_text().splitlines()
        late = json.loads(header)
        late |= {"unix_ns": late["unix_ns"] + 86_400 * 10**9, "boot": "another"}
        path.write_text("\n".join([json.dumps(late), *(line for line in lines if '"peer-' not in line)]) + "\n")


def make_local(copies: list[Path]) -> None:
    """Make one that is no peer's."""
    path = copies[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"engine": config["engine"] | {"name": "local"}}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (forget, "no directory of peer-1 is given: give those of all 3 peers"),
        (repeat, "are both runs of peer-0: give one of them"),
        (change, "differ in seed: give directories of one run"),
        (erase, "peer-2/trace' holds no trace: run all nodes with profile: true"),
        (postpone, "happened in a round of"),
        (make_local, "peer-1' is no run of a peer of engine network"),
    ],
)
def test_what_does_not_fit_is_one_sentence(copies: list[Path], spoil: Callable[[list[Path]], None], told: str) -> None:
    spoil(copies)
    result = CliRunner().invoke(app, ["profile", *map(str, copies)])
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_several_are_not_extrapolated(copies: list[Path]) -> None:
    result = CliRunner().invoke(app, ["profile", *map(str, copies), "--scale", "10"])
    assert result.exit_code == 2
    assert "--scale extrapolates one run, and 3 directories are given" in result.stderr
