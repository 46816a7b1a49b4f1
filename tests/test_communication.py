"""Codecs between clients and their server, and error feedback, which is private state that follows the window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federation import (
    LEVELS,
    SINGLY,
    STACKED,
    Injected,
    assert_same,
    configure,
    digest,
    events,
    failing,
    mixed,
    modes,
    relative_error,
)
from gossamer import resume, run
from gossamer.aggregate.codecs import make_codec
from gossamer.algorithms.base import Arrays
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.task import Task
from gossamer.engines.training import trainer
from gossamer.engines.training.compression import compress_, decoded_downlink
from gossamer.engines.training.job import Job
from gossamer.errors import ConfigError, GossamerWarning
from slow import initial_model
from slow_federated import Params, Sent, add, gradients_of, local_sgd, mean_change, train_round, window_of
from slow_peers import decentralized
from test_client_state import stored

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
TOP_K = {"uplink": {"name": "top-k", "share": 0.05}}
NEAREST = {"uplink": {"name": "int4", "rounding": "nearest"}, "downlink": "int8"}
LOW_RANK = {"uplink": {"name": "low-rank", "rank": 1}}
RANDOM_K = {"uplink": {"name": "random-k", "share": 0.1}}
RESIDUAL = "residual-x"


def compressing(communication: Mapping[str, Any], levels: tuple[float, ...] = LEVELS, **mode: bool) -> dict[str, Any]:
    """Return a federation on rolling windows, of a capacity drawn anew in every round."""
    return configure(
        mixed("fedrolex", levels, **mode)
        | {"submodel.assignment": "dynamic", "communication": dict(communication), "rounds": 5}
    )


def top_k(wanted: Params, share: float) -> Params:
    """Keep the largest entries of all parameters together."""
    size = np.concatenate([value.abs().flatten().numpy() for value in wanted.values()])
    least = np.sort(size)[-math.ceil(share * len(size) - 1e-9)]
    return {name: torch.where(value.abs() >= least, value, 0.0) for name, value in wanted.items()}


def slow_feedback(config: dict[str, Any], *, feeds_back: bool) -> tuple[Params, dict[int, Params]]:
    """Average what top-k leaves of changes; keep a dict of what is lost, in full rows by client."""
    parts = build(parse(config))
    model = {name: value.double() for name, value in initial_model(parts).items()}
    lost: dict[int, Params] = {}
    for round in range(parts.config.rounds):
        sent, plan = list[Sent](), parts.planner.plan(round)
        for client, variant, weight in zip(plan.client.tolist(), plan.variant, plan.weight, strict=True):
            capacity = parts.task.capacities[variant]
            where = window_of(parts, round, client, capacity, model)
            start = {name: value[where[name]].clone() for name, value in model.items()}
            change = local_sgd()(client, start, gradients_of(parts, round, client, 1 / capacity), plan.lr)
            residual = lost.setdefault(client, add((0.0, model)))
            if feeds_back:
                change = add((1.0, change), (1.0, {name: value[where[name]] for name, value in residual.items()}))
            kept = top_k(change, 0.05)
            for name in model:
                residual[name][where[name]] = change[name] - kept[name]
            sent.append(Sent(client, weight, 0, where, kept))
        model = add((1.0, model), (1.0, mean_change(model, sent)[0]))
    return model, lost


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("feeds_back", [True, False])
def test_slow_version(tmp_path: Path, mode: dict[str, bool], feeds_back: bool) -> None:
    config = compressing(TOP_K | {"error_feedback": feeds_back}, **mode)
    config["submodel"] = config["submodel"] | {"mask_labels": False}
    config["workload"] = config["workload"] | {"label_mask": "none"}
    done, (model, lost) = run(config, out=tmp_path / "run"), slow_feedback(config, feeds_back=feeds_back)
    assert relative_error(done.params, model) < 1e-5
    if not feeds_back:
        assert not (done.directory / "clients").exists()
        return
    rows, layout = stored(done.directory, RESIDUAL), build(parse(config)).workload.layout
    assert rows.keys() == lost.keys()
    for client, row in rows.items():
        assert relative_error(layout.views(row), lost[client]) < 1e-4


@pytest.mark.parametrize(
    "communication",
    [TOP_K, NEAREST, LOW_RANK, RANDOM_K, {"uplink": "sign"}, {"uplink": {"name": "quantise", "levels": 3}}],
    ids=lambda given: str(given["uplink"]),
)
def test_nothing_is_lost_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, communication: dict[str, Any]
) -> None:
    """What a client sent in all, and what it keeps, are its updates in all, coordinate by coordinate."""
    config = compressing(communication, **STACKED)
    task = build(parse(config)).task
    d, updates, sent = task.cutter.layout.d, dict[int, Tensor](), dict[int, Tensor]()

    def note(into: dict[int, Tensor], job: Job, rows: Tensor) -> None:
        for client, row in zip(job.client.tolist(), rows, strict=True):
            cut = task.cut(task.variants[job.block.variant], job.round, client)
            cut.add_(into.setdefault(client, torch.zeros(d, dtype=torch.float64)), row.double())

    def noting(task: Task, job: Job, payload: Any, residuals: Arrays) -> Arrays:
        note(updates, job, payload["x"])
        kept = compress_(task, job, payload, residuals)
        note(sent, job, payload["x"])
        return kept

    monkeypatch.setattr(trainer, "compress_", noting)
    done = run(config, out=tmp_path / "run")
    rows = stored(done.directory, RESIDUAL)
    assert rows.keys() == updates.keys()
    assert any(not torch.equal(sent[client], updates[client]) for client in rows)
    for client, row in rows.items():
        assert torch.allclose(sent[client] + row, updates[client], atol=1e-5)


@pytest.mark.sweep(keep=0.34, at_least=3)
@EITHER
@pytest.mark.parametrize("communication", [TOP_K, NEAREST, LOW_RANK], ids=lambda given: given["uplink"]["name"])
def test_workers_and_blocks_change_no_bits(
    tmp_path: Path, mode: dict[str, bool], communication: dict[str, Any]
) -> None:
    config = compressing(communication, **mode) | {"checkpoint": {"every_seconds": 1000}}
    reference = run(config, out=tmp_path / "reference")
    expected = stored(reference.directory, RESIDUAL)
    for workers, block_size in [(1, "auto"), (2, 1)]:
        engine = config["engine"] | {"workers": workers, "block_size": block_size}
        done = run(config | {"engine": engine}, out=tmp_path / f"{workers}")
        assert_same(done, reference)
        found = stored(done.directory, RESIDUAL)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[client], expected[client]) for client in found)
    assert digest(run(config | {"seed": 1}, out=tmp_path / "seed").params) != digest(reference.params)


def test_channels_last_sends_the_same_entries(tmp_path: Path) -> None:
    """A codec sees parameters as they are named, not as they lie in memory."""
    cnn = {"workload.model": {"name": "cnn", "width": 0.125}, "submodel.scaler": False, "rounds": 2}
    changes = mixed("fedrolex", (0.5, 1.0), **SINGLY) | cnn | {"communication": LOW_RANK}
    plain = run(configure(changes), out=tmp_path / "plain")
    last = run(configure(changes | modes((0.5, 1.0), **SINGLY, channels_last=True)), out=tmp_path / "last")
    assert relative_error(last.params, plain.params) < 1e-3


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize(("span", "started"), [("train", False), ("exchange", False), ("commit", True)])
def test_resumed(tmp_path: Path, span: str, started: bool) -> None:
    config = compressing(TOP_K | {"downlink": "int8"}, **STACKED)
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(Injected):
        run(config, out=tmp_path / "part", hooks=failing(span, started, 3))
    assert_same(resume(tmp_path / "part", overrides=["engine.workers=2"]), whole)
    rows, expected = stored(tmp_path / "part", RESIDUAL), stored(whole.directory, RESIDUAL)
    assert rows.keys() == expected.keys()
    assert all(torch.equal(rows[client], expected[client]) for client in rows)


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("communication", [TOP_K, RANDOM_K, LOW_RANK], ids=lambda given: given["uplink"]["name"])
def test_residuals_of_the_dropped_stay(tmp_path: Path, communication: dict[str, Any]) -> None:
    """Updates that are not finite are dropped, even where the codec would have sent finite entries only."""
    workload = {"name": "faulty:Faulty", "clients": [2], "first_round": 2, "model": {"name": "mlp", "hidden": [32]}}
    config = compressing(communication, **STACKED) | {"clients": {"num": 4, "per_round": 4}}
    config["workload"] = config["workload"] | workload
    before, after = (run(config | {"rounds": n}, out=tmp_path / f"{n}") for n in (2, 4))
    rows, later = stored(before.directory, RESIDUAL), stored(after.directory, RESIDUAL)
    assert {client: torch.equal(rows[client], later[client]) for client in rows} == {n: n == 2 for n in range(4)}
    assert all(bool(row.isfinite().all()) for row in later.values())
    dropped = [(event["round"], event["client"]) for event in events(after.directory, "update-dropped")]
    assert dropped == [(3, 2), (4, 2)]


def test_padding_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what lies between parameters nor what lay there before is sent."""
    config = compressing(TOP_K, (1.0,), **STACKED)
    parts = build(parse(config))
    layout, job = parts.workload.layout, build(parse(config)).planner.plan(0)
    real = torch.zeros(layout.d, dtype=torch.bool)
    real[layout.coordinates] = True
    assert not bool(real.all())
    rows = torch.where(real, torch.randn(2, layout.d, generator=torch.Generator().manual_seed(0)), 1e6)
    block = next(job.blocks(0, 2))
    one = Job(0, 0, block, job.client[:2], job.weight[:2], job.steps[:2], 0.1)
    kept = compress_(parts.task, one, {"x": rows}, parts.task.newcomers(torch.zeros(2, layout.d)))
    expected = math.ceil(0.05 * layout.num_parameters)
    assert [int((row[real] != 0).sum()) for row in rows] == [expected] * 2
    assert not bool(kept[RESIDUAL][:, ~real].any())


@pytest.mark.parametrize(
    "communication", [TOP_K, NEAREST, LOW_RANK, {"uplink": "sign"}], ids=lambda given: str(given["uplink"])
)
def test_bytes_are_what_codecs_send(tmp_path: Path, communication: dict[str, Any]) -> None:
    config = compressing(communication, **STACKED)
    parts, up, down = build(parse(config)), 0, 0
    uplink, downlink = (make_codec(communication.get(way, "none")) for way in ("uplink", "downlink"))
    for round in range(5):
        for variant in parts.planner.plan(round).variant:
            layout = parts.task.variants[variant].layout
            up += uplink.of_shapes(layout.shapes).row_bytes(layout.num_parameters, 4)
            down += downlink.of_shapes(layout.shapes).row_bytes(layout.num_parameters, 4)
    last = run(config, out=tmp_path / "run").metrics[-1]
    assert (last["total_bytes_up"], last["total_bytes_down"]) == (up, down)


def test_downlink_is_one_for_all(tmp_path: Path) -> None:
    """Clients that hardly move remember what they received: the quantised model, not the server's."""
    changes = {"algorithm": "counting:Counting", "train.lr": 1e-30, "rounds": 1, "communication.downlink": "int8"}
    config = configure(changes)
    done = run(config, out=tmp_path / "run")
    parts = build(parse(config))
    x = parts.workload.init(0)[None]
    decoded = decoded_downlink(parts.task, {"x": x}, ["x"], 0, 0)["x"][0]
    rows = stored(done.directory, "last")
    assert all(torch.allclose(row, decoded, rtol=0, atol=1e-25) for row in rows.values())
    assert not torch.equal(decoded, x[0])
    views = parts.workload.layout.views(x[0])
    assert relative_error(done.params, views) < 1e-6
    for name, view in parts.workload.layout.views(decoded).items():
        assert float((view - views[name]).abs().max()) <= float(views[name].abs().max()) / 127 * (1 + 1e-5)


EVERYBODY = {"clients": {"num": 4, "per_round": 4}, "rounds": 4}


@EITHER
def test_downlink_of_changes(tmp_path: Path, mode: dict[str, bool]) -> None:
    """Clients start from what they know: the sum of the largest entries of the differences to it."""
    config = configure(EVERYBODY | {"communication.downlink": TOP_K["uplink"]} | modes(**mode))
    parts = build(parse(config))
    model = {name: value.double() for name, value in initial_model(parts).items()}
    known = model
    for round in range(4):
        sent = train_round(parts, round, known, local_sgd())
        model = add((1.0, model), (1.0, mean_change(model, sent)[0]))
        known = add((1.0, known), (1.0, top_k(add((1.0, model), (-1.0, known)), 0.05)))
    done = run(config, out=tmp_path / "run")
    assert relative_error(done.params, model) < 1e-5
    plain = run(configure(EVERYBODY | modes(**mode)), out=tmp_path / "plain")
    assert relative_error(plain.params, model) > 1e-2
    size = make_codec(TOP_K["uplink"]).row_bytes(parts.workload.layout.num_parameters, 4)
    assert done.metrics[-1]["total_bytes_down"] == 4 * 4 * size


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("span", ["train", "exchange", "commit"])
def test_what_clients_know_is_resumed(tmp_path: Path, span: str) -> None:
    config = configure(
        EVERYBODY | {"communication": {"uplink": "int8", "downlink": {"name": "random-k", "share": 0.2}}}
    )
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(Injected):
        run(config, out=tmp_path / "part", hooks=failing(span, False, 2))
    assert_same(resume(tmp_path / "part", overrides=["engine.workers=2"]), whole)


def test_phases_have_residuals_of_their_own(tmp_path: Path) -> None:
    done = run(configure({"algorithm": "two_phases:FedLin", "communication": TOP_K}), out=tmp_path / "run")
    names = {path.name.partition(".")[0] for path in (done.directory / "clients").glob("*.rows")}
    assert names == {"gradient", "residual-gradient", "residual-1-x"}


def test_without_codecs_nothing_changes(tmp_path: Path) -> None:
    plain = run(configure(mixed("fedrolex")), out=tmp_path / "plain")
    none = run(configure(mixed("fedrolex") | {"communication": {"uplink": "none"}}), out=tmp_path / "none")
    assert_same(plain, none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"communication": {"uplink": {"name": "top-k", "share": 0}}}, "communication.uplink.share = 0: input should"),
        ({"communication": {"uplink": "topk"}}, "communication.uplink.name = 'topk' is no codec; did you mean 'top-k'"),
        ({"communication": {"uplink": {"name": "low-rank", "rank": 40}}}, "compresses nothing: no matrix of the model"),
        ({"communication.error_feedback": True}, "error_feedback = True, but nothing is lost that could be fed back"),
        (
            {"communication": {"uplink": "int8", "error_feedback": True}},
            r"unbiased and promises no contraction.*\(rounding: nearest\)",
        ),
        (
            {"communication": {"uplink": {"name": "random-k", "k": 3, "unbiased": True}, "error_feedback": True}},
            r"\(unbiased: false\)",
        ),
        (
            {"communication": {"downlink": {"name": "top-k", "k": 3}}},
            "downlink.name = 'top-k' is biased, .* but clients.per_round = 5 of 8 receive them: choose int8",
        ),
        (
            mixed("fedrolex") | {"clients.per_round": 8, "communication": {"downlink": "sign"}},
            r"but submodel.capacities = \[0.25, 0.5, 1.0\] receive parts of them",
        ),
        (
            {
                "clients.per_round": 8,
                "communication": {"downlink": "sign"},
                "device": {"availability": {"probability": 0.5}},
            },
            "is not always available",
        ),
        (
            {"communication": TOP_K, "algorithm": "scaffold"},
            "'scaffold' does not go with communication, because the server's control variate must stay",
        ),
        ({"communication.downlink": "int8", "algorithm": "fiarse"}, "'fiarse' does not go with communication, because"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse(configure(changes)))


def test_peers_have_their_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peers have none: leave it out, or choose algorithm 'choco-sgd'"):
        build(parse(decentralized({}) | {"communication": TOP_K}))


@pytest.mark.parametrize(
    ("communication", "message"),
    [
        (TOP_K | {"error_feedback": False}, "is biased, and without error feedback what it loses is lost for good"),
        ({"uplink": {"name": "random-k", "share": 0.1, "unbiased": True}}, "noise of 9 times the squared norm"),
        ({"uplink": {"name": "top-k", "share": 0.9}}, "sends .* bytes for a model of"),
    ],
    ids=str,
)
def test_warned_of(tmp_path: Path, communication: dict[str, Any], message: str) -> None:
    with pytest.warns(GossamerWarning, match=message):
        run(configure({"communication": communication, "rounds": 1}), out=tmp_path / "run")
