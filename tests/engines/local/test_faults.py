"""What goes wrong on clients and in workers: dropped and logged, or an error after which the run can be resumed."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from federation import (
    LEVELS,
    SCAFFOLD,
    SINGLY,
    STACKED,
    assert_same,
    configure,
    digest,
    events,
    mixed,
    modes,
    relative_error,
)
from gossamer import resume, run
from gossamer.errors import ConfigError, EngineError, GossamerError, QuorumError
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_metrics

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
WAYS = pytest.mark.parametrize(("workers", "block_size"), [(0, "auto"), (0, 1), (2, 2)])
EVEN = {"workload.dataset.num_train": 160, "clients": {"num": 8, "per_round": 8}}  # all take three steps


def faulty(changes: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return a federation with the faulty workload; `options` are those of the plug-in."""
    workload = {"name": "faulty:Faulty", **options}
    return configure(EVEN | {f"workload.{key}": value for key, value in workload.items()} | changes)


class TestNotFinite:
    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @WAYS
    def test_as_if_it_were_absent(
        self, tmp_path: Path, mode: dict[str, bool], workers: int, block_size: int | str
    ) -> None:
        """The last row of a sum may as well not be there; without the first one the sum is rounded differently."""
        way = modes(**mode) | {"engine.workers": workers, "engine.block_size": block_size}
        for client, sampler in ((7, "without_last"), (0, "without_first")):
            dropped = run(faulty(way, clients=[client]), out=tmp_path / f"dropped-{client}")
            absent = run(faulty(way | {"clients.sampler": f"faulty:{sampler}"}), out=tmp_path / f"absent-{client}")
            assert relative_error(dropped.params, absent.params) < 1e-6
            assert client == 0 or digest(dropped.params) == digest(absent.params)
            for record, other in zip(dropped.metrics, absent.metrics, strict=True):
                assert (record["num_participants"], record["num_survivors"]) == (8, 7)
                assert (record["num_dropped"], record["dropped"]) == (1, {"not finite": 1})
                assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
            assert events(dropped.directory, "update-dropped") == [
                {"round": round, "client": client, "reason": "not finite"} for round in (1, 2, 3)
            ]

    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @pytest.mark.parametrize("algorithm", ["fedrolex", "federated-dropout"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_sub_models(self, tmp_path: Path, algorithm: str, mode: dict[str, bool], workers: int) -> None:
        way = mixed(algorithm, LEVELS, **mode) | {"engine.workers": workers}
        dropped = run(faulty(way, clients=[7]), out=tmp_path / "dropped")
        absent = run(faulty(way | {"clients.sampler": "faulty:without_last"}), out=tmp_path / "absent")
        assert relative_error(dropped.params, absent.params) < 1e-6
        assert dropped.metrics[-1]["num_survivors"] == 7

    @EITHER
    def test_private_state_is_not_kept(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        config = faulty(SCAFFOLD | modes(**mode) | {"clients.per_round": 8}, clients=[2, 5])
        done = run(config, out=tmp_path / "run")
        latest = Checkpoints(done.directory / "checkpoints").latest()
        assert latest is not None
        assert latest.arrays["store.clientstore/control/clients"].tolist() == [0, 1, 3, 4, 6, 7]
        assert done.metrics[-1]["train_loss"] < done.metrics[0]["train_loss"]

    def test_from_one_round_on(self, tmp_path: Path) -> None:
        done = run(faulty({}, clients=[1, 6], first_round=2), out=tmp_path / "run")
        assert [record["num_survivors"] for record in done.metrics] == [8, 8, 6]
        assert [(event["round"], event["client"]) for event in events(done.directory, "update-dropped")] == [
            (3, 1),
            (3, 6),
        ]


ONE_STEP = {"train": {"lr": 0.1, "batch_size": 20, "steps": 1}}  # of two, the second would not be finite


class TestTooLarge:
    """Updates that are finite, but 1e30 times as large as others, are as good as absent."""

    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @WAYS
    def test_as_if_it_were_absent(
        self, tmp_path: Path, mode: dict[str, bool], workers: int, block_size: int | str
    ) -> None:
        way = modes(**mode) | ONE_STEP | {"engine.workers": workers, "engine.block_size": block_size}
        dropped = run(faulty(way, clients=[7], fault="huge"), out=tmp_path / "dropped")
        absent = run(faulty(way | {"clients.sampler": "faulty:without_last"}), out=tmp_path / "absent")
        assert digest(dropped.params) == digest(absent.params)
        for record, other in zip(dropped.metrics, absent.metrics, strict=True):
            assert (record["num_survivors"], record["num_dropped"], record["dropped"]) == (7, 1, {"too large": 1})
            assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert events(dropped.directory, "update-dropped") == [
            {"round": round, "client": 7, "reason": "too large"} for round in (1, 2, 3)
        ]

    @pytest.mark.parametrize("algorithm", ["fedrolex", "federated-dropout", "scaffold"])
    def test_other_algorithms(self, tmp_path: Path, algorithm: str) -> None:
        way = (mixed(algorithm) if algorithm != "scaffold" else SCAFFOLD) | ONE_STEP | {"clients.per_round": 8}
        dropped = run(faulty(way, clients=[7], fault="huge"), out=tmp_path / "dropped")
        absent = run(faulty(way | {"clients.sampler": "faulty:without_last"}), out=tmp_path / "absent")
        assert relative_error(dropped.params, absent.params) < 1e-6

    @pytest.mark.parametrize("num", [1, 2])
    def test_few_participants(self, tmp_path: Path, num: int) -> None:
        config = faulty(ONE_STEP | {"clients": {"num": num, "per_round": num}}, clients=[0], fault="huge")
        if num == 2:
            assert run(config, out=tmp_path / "run").metrics[-1]["num_survivors"] == 1
        else:
            with pytest.raises(QuorumError, match="only 0 of 1 updates are usable"):
                run(config, out=tmp_path / "run")

    def test_the_bound_is_an_option(self, tmp_path: Path) -> None:
        free = faulty(ONE_STEP | {"aggregation.max_update_norm_ratio": None, "rounds": 1}, clients=[7], fault="huge")
        done = run(free, out=tmp_path / "free")
        assert max(float(value.abs().max()) for value in done.params.values()) > 1e20
        strict = faulty(ONE_STEP | {"aggregation.max_update_norm_ratio": 1e30, "rounds": 1}, clients=[7], fault="huge")
        assert digest(run(strict, out=tmp_path / "strict").params) == digest(done.params)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_again_changes_no_bits(self, tmp_path: Path, workers: int) -> None:
        """From a model of zeros any change is infinitely many times as large; the others' are as large as it."""
        zeros = {"workload": {"name": "least-squares", "num_samples": 12}, "engine.workers": workers}
        way = zeros | {"train": {"lr": 0.05, "batch_size": 4}}
        free = run(configure(way | {"aggregation.max_update_norm_ratio": None}), out=tmp_path / "free")
        assert_same(run(configure(way), out=tmp_path / "bound"), free)


@pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
def test_an_infinite_loss_is_logged_as_such(tmp_path: Path, mode: dict[str, bool]) -> None:
    """The update is not infinite, and is used; the log is JSON still."""
    healthy = run(faulty(modes(**mode)), out=tmp_path / "healthy")
    done = run(faulty(modes(**mode), clients=[7], fault="infinite"), out=tmp_path / "run")
    assert digest(done.params) == digest(healthy.params)
    assert [record["train_loss"] for record in done.metrics] == [math.inf] * 3
    for line in (done.directory / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["train_loss"] == "Infinity"


class TestQuorum:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_lost_and_resumed(self, tmp_path: Path, workers: int) -> None:
        flag = tmp_path / "flag"
        flag.touch()
        rare = {"checkpoint.every_seconds": 1000, "engine.workers": workers}
        config = faulty(rare, clients=[0, 1, 2, 4, 7], first_round=2, flag=str(flag))
        for attempt in (lambda: run(config, out=tmp_path / "run"), lambda: resume(tmp_path / "run")):
            with pytest.raises(
                QuorumError, match=r"round 3: only 3 of 8 updates are usable and clients.quorum"
            ) as caught:
                attempt()
            assert "round 2 is committed" in str(caught.value)
            latest = Checkpoints(tmp_path / "run/checkpoints").latest()
            assert latest is not None
            assert latest.round == 2
            assert [record["round"] for record in read_metrics(tmp_path / "run")] == [1, 2]
        flag.unlink()
        assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "undisturbed"))

    @pytest.mark.parametrize(("quorum", "enough"), [(0.5, True), (0.51, False), (0.0, True), (1.0, False)])
    def test_share(self, tmp_path: Path, quorum: float, enough: bool) -> None:
        config = faulty({"clients.quorum": quorum, "rounds": 1}, clients=[0, 1, 2, 3])
        if enough:
            assert run(config, out=tmp_path / "run").metrics[0]["num_survivors"] == 4
        else:
            with pytest.raises(QuorumError):
                run(config, out=tmp_path / "run")

    def test_nobody_is_never_enough(self, tmp_path: Path) -> None:
        with pytest.raises(QuorumError, match="asks for 1"):
            run(faulty({"clients.quorum": 0.0}, clients=list(range(8))), out=tmp_path / "run")


class TestWorkers:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize(("fault", "code"), [("exit", 7), ("kill", -9)])
    @EITHER
    def test_one_that_dies(self, tmp_path: Path, fault: str, code: int, mode: dict[str, bool]) -> None:
        flag = tmp_path / "flag"
        flag.touch()
        way = modes(**mode) | {"engine.workers": 2}
        config = faulty(way, clients=[5], fault=fault, first_round=1, flag=str(flag))
        with pytest.raises(EngineError, match=f"died with exit code {code} "):
            run(config, out=tmp_path / "run")
        assert multiprocessing.active_children() == []
        assert [record["round"] for record in read_metrics(tmp_path / "run")] == [1]
        with pytest.raises(EngineError, match=f"died with exit code {code} "):
            resume(tmp_path / "run")
        flag.unlink()
        assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "undisturbed"))

    def test_one_that_fails_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="client 5 cannot count") as caught:
            run(faulty({"engine.workers": 2}, clients=[5], fault="raise", first_round=1), out=tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert multiprocessing.active_children() == []
        (event,) = events(tmp_path / "run", "worker-failed")
        assert event["message"] == str(caught.value)
        assert 'raise ArithmeticError(f"client {client} cannot count")' in event["traceback"]

    def test_without_workers_a_bug_is_told_alike(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"'faulty' fails with ArithmeticError: client 5 cannot count \(.*line"):
            run(faulty({}, clients=[5], fault="raise", first_round=1), out=tmp_path / "run")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_on_purpose_stays_one_sentence(self, tmp_path: Path, workers: int) -> None:
        config = faulty({"engine.workers": workers}, clients=[5], fault="refuse", first_round=1)
        with pytest.raises(GossamerError) as caught:
            run(config, out=tmp_path / "run")
        assert str(caught.value) == "client 5 has no data: give it some"
