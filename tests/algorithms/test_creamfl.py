"""CreamFL: losses against loops, what travels, who keeps what, and the same bits on every engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gossamer
from federation import Injected, assert_same, failing
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.creamfl import CreamFL, batches, inter_contrast, intra_contrast
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, DataError

NUM_PUBLIC, WIDTH = 20, 8
SENSES = {"image+audio": 0.34, "image": 0.33, "audio": 0.33}
WORKLOAD = {
    "name": "audio-visual-digits",
    "dataset": {"bands": 8, "frames": 8, "num_public": NUM_PUBLIC},
    "encoders": {"image": {"name": "mlp", "hidden": [12]}, "audio": {"name": "mlp", "hidden": [8]}},
    "width": WIDTH,
    "modalities": SENSES,
    "exchange": "representations",
}
pytestmark = pytest.mark.usefixtures("recorded")


def config(**changes: Any) -> dict[str, Any]:
    """Return a federation of six clients, two of each kind."""
    return {
        "rounds": 3,
        "workload": WORKLOAD | changes.pop("workload", {}),
        "clients": {"num": 6, "per_round": 6},
        "train": {"lr": 0.01, "batch_size": 4, "steps": 2, "optimizer": {"name": "adam"}},
        "algorithm": {"name": "creamfl", "public_batch_size": 8} | changes.pop("algorithm", {}),
        "checkpoint": {"every_seconds": 0},
        "engine": {"name": "local", "workers": 0, "modes": {"stacked": False}},
    } | changes


def parts(**changes: Any) -> Parts:
    """Return what a run of the configuration, with changes, consists of."""
    return build(parse(config(**changes)))


def units(*shape: int, seed: int) -> Tensor:
    """Return vectors of length 1, drawn."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- losses


def test_contrasts_against_loops() -> None:
    own, known, old, rows = (
        units(5, 4, seed=1),
        units(9, 4, seed=2),
        units(5, 4, seed=3),
        torch.tensor([8, 0, 3, 4, 1]),
    )
    expected = []
    for i, k in enumerate(rows.tolist()):
        powers = [math.exp(float(own[i] @ known[j]) / 0.5) for j in range(9)]
        expected.append(-math.log(powers[k] / sum(powers)))
    assert float(inter_contrast(own, known, rows, 0.5)) == pytest.approx(sum(expected) / 5, rel=1e-5)
    expected = []
    for i, k in enumerate(rows.tolist()):
        powers = [math.exp(float(own[i] @ one) / 0.5) for one in (known[k], old[i])]
        expected.append(-math.log(powers[0] / sum(powers)))
    assert float(intra_contrast(own, known[rows], old, 0.5)) == pytest.approx(sum(expected) / 5, rel=1e-5)


@pytest.mark.parametrize(("count", "sizes"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (3, [3])])
def test_a_public_sample_is_never_alone(count: int, sizes: list[int]) -> None:
    assert [len(piece) for piece in batches(torch.arange(count), 4)] == sizes


# ---- what travels


def test_what_travels_is_counted_to_the_byte(tmp_path: Path) -> None:
    """Public samples times width times 4 bytes: up for each modality that a client has, down for both."""
    one, made = NUM_PUBLIC * WIDTH * 4, parts()
    costs = {variant.holding: variant for variant in made.planner.costs[0].variants}
    assert {name: each.bytes_up for name, each in costs.items()} == {"image+audio": 2 * one, "image": one, "audio": one}
    assert {each.bytes_down for each in costs.values()} == {2 * one}
    record = gossamer.run(config(), out=tmp_path / "run").metrics[-1]
    assert record["total_bytes_up"] == 3 * one * 2 * (2 + 1 + 1)
    assert record["total_bytes_down"] == 3 * one * 2 * 6


class Watched(CreamFL):
    """Remembers what arrives at the server."""

    rows: list[Tensor]

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Note the rows, and update."""
        Watched.rows = [*Watched.rows, inbox["x"].clone()]
        return super().update(state, inbox, num_clients)


def test_only_representations_leave_a_client(tmp_path: Path) -> None:
    """Whatever arrives is zero but for vectors of length 1 in the entries of what its client has."""
    Watched.rows, layout = [], parts().workload.layout
    gossamer.run(config(algorithm={"name": f"{__name__}:Watched"}), out=tmp_path / "run")
    assert len(Watched.rows) == 3
    for rows in Watched.rows:
        arrived = []
        for row in rows:
            views = {name: view for name, view in layout.views(row).items() if view.any()}
            arrived.append("+".join(name.removeprefix("public_").partition(".")[0] for name in views))
            for view in views.values():
                assert torch.allclose(view.norm(dim=1), torch.ones(NUM_PUBLIC), atol=1e-5)
        assert sorted(arrived) == sorted([*SENSES, *SENSES])


# ---- clients and server


def test_clients_keep_their_models_and_the_server_has_its_own(tmp_path: Path) -> None:
    """What a client begins the second round with is what it ended the first with; the server's row has none of it."""
    layout, start = parts().workload.layout, parts().workload.init(0)
    done = gossamer.run(config(rounds=2), out=tmp_path / "run")
    before = layout.views(start)
    server = {name for name, value in done.params.items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in server} == {
        *("server_image", "server_audio", "server_fusion", "public_image", "public_audio")
    }
    own = [gossamer.load(tmp_path / "run").state_dict(client=client) for client in range(6)]
    changed = [{name.partition(".")[0] for name in one if not torch.equal(one[name], done.params[name])} for one in own]
    assert sorted(map(sorted, changed)) == sorted(
        [["audio"], ["audio"], ["image"], ["image"], ["audio", "fusion", "image"], ["audio", "fusion", "image"]]
    )


def test_contrasts_change_what_clients_learn_from_the_second_round_on(tmp_path: Path) -> None:
    """In the first one the server has sent nothing yet; with both weights 0 there is nothing to learn ever."""
    alone = {"inter": 0.0, "intra": 0.0}
    for rounds, same in ((1, True), (2, False)):
        found = []
        for number, algorithm in enumerate(({}, alone)):
            folder = tmp_path / f"{rounds}-{number}"
            gossamer.run(config(rounds=rounds, algorithm=algorithm), out=folder)
            found.append(gossamer.load(folder).state_dict(client=0))
        assert same == all(
            torch.equal(found[0][name], found[1][name])
            for name in found[0]
            if "." in name and name.split(".")[0] in ("image", "audio", "fusion")
        )


def test_groups_hold_in_the_public_pass_too(tmp_path: Path) -> None:
    """What is at rate 0 stays as it is, while the rest learns."""
    made = parts()
    before = made.workload.layout.views(made.workload.init(0))
    given = config()
    given["train"] = given["train"] | {"groups": [{"match": "image.*", "lr": 0}]}
    gossamer.run(given, out=tmp_path / "run")
    own = [gossamer.load(tmp_path / "run").state_dict(client=client) for client in range(6)]
    for one in own:
        assert all(torch.equal(value, before[name]) for name, value in one.items() if name.startswith("image."))
    assert any(not torch.equal(one["audio.output.weight"], before["audio.output.weight"]) for one in own)


def test_flops_of_the_public_pass_are_counted() -> None:
    ways = [parts(algorithm=one).planner.costs[0].variants for one in ({}, {"inter": 0.0, "intra": 0.0})]
    for full, alone in zip(*ways, strict=True):
        assert full.flops_per_sample == alone.flops_per_sample
        assert full.flops_per_round >= alone.flops_per_round > 0


def test_the_server_learns(tmp_path: Path) -> None:
    first, last = (
        gossamer.run(config(rounds=rounds, algorithm={"server_lr": 0.01}), out=tmp_path / str(rounds)).metrics[-1]
        for rounds in (1, 12)
    )
    assert last["accuracy_image"] > first["accuracy_image"]
    assert "accuracy_personal" in last


# ---- bits


@pytest.mark.parametrize("modes", [{"stacked": False}, {"stacked": True, "padding": True}], ids=["singly", "stacked"])
def test_bits_do_not_depend_on_workers(tmp_path: Path, modes: dict[str, bool]) -> None:
    done = [
        gossamer.run(
            config(engine={"name": "local", "workers": workers, "modes": modes, "block_size": size}),
            out=tmp_path / str(workers),
        )
        for workers, size in ((0, "auto"), (1, 2), (2, 1))
    ]
    for other in done[1:]:
        assert_same(other, done[0])


def test_stacked_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    ways = ({"stacked": False}, {"stacked": True, "padding": True})
    runs = [
        gossamer.run(config(engine={"name": "local", "workers": 0, "modes": way}), out=tmp_path / str(number)).params
        for number, way in enumerate(ways)
    ]
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_run_that_was_cut_short_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = gossamer.run(config(), out=tmp_path / "whole")
    with pytest.raises(Injected):
        gossamer.run(config(), out=tmp_path / "cut", hooks=failing("exchange", started=False, number=2))
    assert_same(gossamer.resume(tmp_path / "cut"), done)


@pytest.mark.usefixtures("one_ray")
def test_bits_on_ray(tmp_path: Path) -> None:
    """Of clients of two architectures, too."""
    wide = {"image": {"name": "cnn", "width": 0.125}, "audio": "mlp"}
    kinds = {"narrow": {"share": 0.5}, "wide": {"share": 0.5, "encoders": wide}}
    done = gossamer.run(config(workload={"architectures": kinds}), out=tmp_path / "a")
    ray = config(workload={"architectures": kinds}, engine={"name": "ray", "workers": 2, "modes": {"stacked": False}})
    assert_same(gossamer.run(ray, out=tmp_path / "b"), done)


def test_clients_of_unequal_width(tmp_path: Path) -> None:
    """A narrow client keeps a narrow model, and sends representations that are as wide as all others."""
    given = config(submodel={"capacities": [0.5, 1.0], "strategy": "static"})
    costs = build(parse(given)).planner.costs[0].variants
    sizes = {(one.capacity, one.holding): one for one in costs}
    assert sizes[0.5, "image"].bytes_up == sizes[1.0, "image"].bytes_up == NUM_PUBLIC * WIDTH * 4
    assert sizes[0.5, "image"].num_parameters < sizes[1.0, "image"].num_parameters
    record = gossamer.run(given, out=tmp_path / "run").metrics[-1]
    assert math.isfinite(record["loss"])


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": {"dataset": {"bands": 8, "frames": 8, "num_public": 1}}}, "but it has 1: give it 8 or more"),
        ({"algorithm": {"name": "creamfl", "public_batch_size": 21}}, "batches of 21 samples, but it has 20: give"),
        ({"workload": {"dataset": {"bands": 8, "frames": 8}}}, "needs public pairs, of which there are none: set"),
        ({"workload": {"dataset": {"num_public": 60}}}, "num_public = 60 takes all of the 60 training pairs"),
        ({"workload": {"exchange": "parameters"}}, "'creamfl' sends representations of a public set, and the workload"),
        ({"algorithm": {"name": "fedavg"}}, "'fedavg' combines parameters: choose creamfl"),
        ({"communication": {"uplink": "int8"}}, "because clients send representations"),
        ({"submodel": {"capacities": [0.5, 1.0], "strategy": "rolling"}}, "contradicts algorithm 'creamfl', which is"),
        (
            {"submodel": {"capacities": [0.5, 1.0], "strategy": "static", "offsets": {"x": 1}}},
            "a client's model is its",
        ),
        ({"clients": {"num": 6, "per_round": 6, "personal": ["image.*"]}}, "keeps whole models with the clients"),
        ({"clients": None, "peers": {"num": 6, "topology": "ring"}}, "'creamfl' needs a server"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    given = config(**changes)
    if "name" in changes.get("algorithm", {}):
        given["algorithm"] = changes["algorithm"]
    with pytest.raises((ConfigError, DataError), match=message):
        build(parse({name: value for name, value in given.items() if value is not None}))
