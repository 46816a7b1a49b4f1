"""`gossamer topology list | show | measure`: what is printed and drawn, and how mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer import topology
from gossamer.cli.main import app
from gossamer.registry import BUILTIN

FOLDER = Path(__file__).parents[2] / "topologies"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["topology", *map(str, arguments)])


def facts(*arguments: Any) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class TestList:
    def test_every_name_in_a_table(self) -> None:
        done = invoke("list")
        assert done.exit_code == 0
        head, *lines = done.stdout.splitlines()
        assert head.split()[:4] == ["name", "kind", "degree", "least"]
        assert {line.split()[0] for line in lines} >= set(BUILTIN["topology"])
        assert {line.split()[1] for line in lines} == {"static", "periodic", "random"}

    def test_json_tells_parameters(self) -> None:
        rows = {row["name"]: row for row in json.loads(invoke("list", "--json").stdout)}
        assert rows["od-equidyn"]["parameters"] == ["M", "eta", "lazy", "p", "rho"]
        assert rows["ring"]["minimum_n"] == 3


class TestShow:
    def test_facts(self) -> None:
        found = facts("show", "od-equidyn", "-n", 300, "-p", "M=9", "-p", "eta=0.25", "--seed", 3)
        expected = topology.build("od-equidyn", 300, seed=3, M=9, eta=0.25)
        assert found["consensus_rate"] == expected.consensus_rate()
        assert found["bound"] == expected.bound
        assert found["digest_of_round_0"] == expected.mixing(0).digest()
        assert (found["n"], found["seed"], found["kind"], found["max_degree"]) == (300, 3, "random", 1)
        assert found["parameters"]["eta"] == 0.25

    def test_table(self) -> None:
        lines = invoke("show", "base", "-n", 6, "-p", "k=2").stdout.splitlines()
        table = {line[:18].strip(): line[18:].strip() for line in lines}
        assert table["topology"] == "base"
        assert (table["period"], table["max degree"], table["symmetric"]) == ("2", "2", "yes")

    def test_specification_and_graph_file(self) -> None:
        assert facts("show", FOLDER / "mnist17-ou-equidyn.yaml")["parameters"]["M"] == 4
        assert facts("show", FOLDER / "mnist17-ou-equidyn.yaml", "-n", 20)["n"] == 20
        by_file, by_spec = (facts("show", FOLDER / f"internet-50.{end}") for end in ("graphml", "yaml"))
        assert by_file["digest_of_round_0"] == by_spec["digest_of_round_0"]
        assert by_file["n"] == 50

    @pytest.mark.parametrize(
        ("arguments", "num_panels"),
        [
            (("d-equistatic", "-n", 20), 3),
            (("ou-equidyn", "-n", 20), 7),
            (("base", "-n", 5), 6),
            (("ceca", "-n", 5), 4),
            (("ring", "-n", 3000), 3),
            ((FOLDER / "florentine-families.graphml",), 3),
        ],
        ids=["static", "random", "periodic", "joint", "large", "file"],
    )
    def test_picture(self, tmp_path: Path, arguments: tuple[Any, ...], num_panels: int) -> None:
        path = tmp_path / "new" / "a.svg"
        done = invoke("show", *arguments, "-o", path)
        assert done.exit_code == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(path)
        text = path.read_text()
        assert sum(f'<g id="axes_{number}"' in text for number in range(1, 20)) == num_panels


class TestMeasure:
    def test_rate_beside_bound(self) -> None:
        found = facts("measure", "od-equidyn", "-n", 100, "--rounds", 500, "--seed", 2)
        measured = topology.measure(topology.build("od-equidyn", 100, seed=2), 500, 2)
        assert found["rounds_to_tolerance"] == measured.rounds
        assert found["rate_measured"] == measured.rate < found["bound"]
        assert found["min_real_part"] == pytest.approx(0.01)
        assert (found["max_degree"], found["period"], found["tolerance"]) == (1, None, 1e-10)

    def test_rounds_are_a_limit(self) -> None:
        found = facts("measure", "ring", "-n", 100, "--rounds", 7)
        assert (found["rounds_to_tolerance"], found["rounds_mixed"]) == (None, 7)
        assert found["rate_measured"] <= found["consensus_rate"]
        assert "rounds to tolerance  -" in invoke("measure", "ring", "-n", 100, "--rounds", 7).stdout

    def test_finite_time(self) -> None:
        found = facts("measure", "simple-base", "-n", 23, "-p", "k=2")
        assert found["rounds_to_tolerance"] == found["period"]

    def test_drift_is_told(self) -> None:
        found = facts("measure", "el-local", "-n", 30)
        assert found["stochasticity"] == "row"
        assert found["mean_drift"] > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "rign", "-n", "5"], "unknown topology 'rign'; did you mean 'ring'?"),
        (["show", "ring"], "topology 'ring' needs the number of peers: give n"),
        (["show", "ring", "-n", "1"], "topology 'ring' with n = 1"),
        (["show", "base", "-n", "5", "-p", "k"], "parameter 'k' is not of the form KEY=VALUE"),
        (["show", "base", "-n", "5", "-p", "k=["], "parameter 'k=[' is not valid YAML"),
        (["show", "base", "-n", "5", "-p", "kk=3"], "unknown key 'base.kk'"),
        (
            ["show", "ring", "-n", "5", "-o", "a.gif"],
            "cannot tell the format of 'a.gif': give a name that ends in .png, .svg or .pdf",
        ),
        (["show", "none.yaml"], "cannot read topology 'none.yaml'"),
        (["show", "none.graphml"], "cannot read the graph 'none.graphml'"),
        (["show", "ring", "-n", "1" + "0" * 30], "topology 'ring' with n = 1000"),
        (
            ["show", "star", "-n", "100000001"],
            "topology 'star' with n = 100000001 exceeds the limit of 100000000 peers",
        ),
        (["show", "none.csv"], "cannot read the graph 'none.csv'"),
        (["show", "a" * 5000, "-n", "5"], "unknown topology 'aaa"),
        (["show", "a" * 5000 + ".yaml"], "cannot read topology 'aaa"),
        (["show", "ring", "-n", "5", "-p", "n=6"], "parameter 'n=6' gives n twice: keep one of them"),
        (["show", "ring", "-n", "5", "-p", "name=x"], "unknown key 'ring.name'"),
        (["measure", "ring", "-n", "5", "--rounds", "0"], "rounds = 0 is below 1"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
