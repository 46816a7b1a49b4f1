"""What a moved stage was predicted to change, against rounds in which it was moved: closed cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import gossamer
from federation import configure
from gossamer.cli.main import app
from gossamer.profiling.offload import Costs, Offload, stage_named
from gossamer.profiling.trace import Lane, Round, Segment
from gossamer.profiling.verification import AGREES, CANNOT_TELL, DIFFERS, Verification, change, verify
from slow_peers import decentralized

DRIVER = Lane("driver", "driver", 1, 1)
FREE = Costs(1.0, 1, 0.0, 0.0, 0.0, 0.0)  # of a device and a link that take no time
CHECKPOINT = stage_named("checkpoint")


def rounds(checkpoint: float, number: int = 8, delay: float = 0.0) -> list[Round]:
    """Return rounds of a second of training, and a checkpoint."""
    end = 1.0 + checkpoint
    spans = [Segment("train", 0.0, 1.0, 1.0, delay), Segment("checkpoint", 1.0, end, checkpoint)]
    return [Round(place, end, {DRIVER: spans[: 2 if checkpoint else 1]}) for place in range(1, number + 1)]


def verified(moved: list[Round], plain: list[Round] | None = None) -> Verification:
    """Return what comes of moving a checkpoint of 0.25 s to a device as quick as the host."""
    before = rounds(0.25) if plain is None else plain
    return verify(before, moved, Offload(CHECKPOINT, FREE), same_bits=True)


def test_a_checkpoint_in_the_background_takes_its_time_away() -> None:
    found = verified(rounds(0.0))
    assert found.predicted is not None
    assert found.predicted.mean == pytest.approx(-0.2)
    assert found.measured == pytest.approx((-0.2, -0.2, -0.2))
    assert found.error == pytest.approx(0.0)
    assert found.outcome == AGREES


def test_what_does_not_get_shorter_differs() -> None:
    found = verified(rounds(0.25))
    assert found.error == pytest.approx(-0.2)
    assert found.outcome == DIFFERS


def test_rounds_that_waited_for_a_processor_do_not_count() -> None:
    found = verified(rounds(0.0) + rounds(3.0, 3, delay=0.5))
    assert (len(found.moved.seconds), found.moved.num_rejected) == (8, 3)
    assert found.outcome == AGREES
    assert verified(rounds(0.0, 3) + rounds(0.0, 5, delay=0.5)).outcome == CANNOT_TELL


def test_noise_that_is_larger_than_the_effect_tells_nothing() -> None:
    noisy = [one for pair in zip(rounds(0.0, 4), rounds(2.0, 4), strict=True) for one in pair]
    assert verified(noisy).outcome == CANNOT_TELL


def test_the_change_is_that_of_the_means() -> None:
    found = change([1.0, 2.0, 3.0], [4.0])
    assert found.mean == pytest.approx(1.0)
    assert found.lo <= found.mean <= found.hi


def call(*arguments: object) -> Result:
    """Run ``gossamer offload``."""
    return CliRunner().invoke(app, ["offload", *(str(one) for one in arguments)])


@pytest.mark.parametrize("stage", ["aggregation", "logging"])
def test_a_run_is_repeated_with_a_side_car(stage: str, tmp_path: Path) -> None:
    gossamer.run({**configure({"rounds": 2}), "profile": True}, out=tmp_path / "run")
    options = "--device", "emulated", "--stage", stage, "--verify", "--rounds", 3
    result = call(tmp_path / "run", *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["same_bits"]
    sides = [len(found[side]["seconds"]) + found[side]["num_rejected"] for side in ("plain", "moved")]
    assert sides == [6, 6], "three runs of each, without their first rounds"
    assert found["outcome"] in (AGREES, DIFFERS, CANNOT_TELL)
    text = call(tmp_path / "run", *options).stdout
    assert "All runs end with the same bits." in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", 5], "--rounds changes nothing without --verify"),
        (["--verify", "--stage", "codec"], "no span of stage 'codec' was recorded"),
        (["--verify", "--stage", "mixing"], "engine local, and this run is of 'ray'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[object], told: str, tmp_path: Path) -> None:
    gossamer.run({**decentralized({"rounds": 1}), "profile": True}, out=tmp_path / "run")
    if "ray" in told:
        file = tmp_path / "run" / "config.yaml"
        file.write_text(file.read_text().replace("name: local", "name: ray"))
    result = call(tmp_path / "run", "--device", "emulated", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
