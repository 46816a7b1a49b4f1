"""What is checked of `DecentralizedOptimizer` on four real ranks, in this order; see launch.py."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import numpy as np
import pytest
import torch
from slow_decentralized import Quadratics, drive, quadratics, start
from torch import Tensor, nn

import gossamer.distributed as gd
from gossamer.algorithms.decentralized.diffusion import ExactDiffusion
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.outer import GASLoC, NoLoCo
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, EngineError

SIZE = 4
METHODS: dict[str, tuple[dict[str, Any], Any, int]] = {  # arguments, the simulator's algorithm, steps of a round
    "atc": ({}, DSGD({}), 2),
    "awc": ({"mode": "combine-while-adapt"}, DSGD({"order": "combine-while-adapt"}), 2),
    "tracking": ({"mode": "gradient-tracking"}, DSGT({}), 2),
    "diffusion": ({"mode": "exact-diffusion"}, ExactDiffusion({}), 1),
    "gasloc": ({"outer": {"name": "gasloc", "gamma": 0.3}}, GASLoC({"gamma": 0.3}), 2),
    "noloco": ({"outer": NoLoCo({})}, NoLoCo({}), 2),
}


class Point(nn.Module):
    """A point in two parameters, as far from the minimum of a peer's quadratic loss as `forward` says."""

    def __init__(self, x: Tensor, problem: Quadratics, rank: int) -> None:
        super().__init__()
        self.head, self.tail = nn.Parameter(x[:1].clone()), nn.Parameter(x[1:].clone())
        self.curvature, self.centre = (torch.from_numpy(each[rank]) for each in (problem.curvature, problem.centre))

    @property
    def x(self) -> Tensor:
        return torch.cat([self.head, self.tail])

    def forward(self) -> Tensor:
        away = self.x - self.centre
        return away @ self.curvature @ away / 2


def mlp() -> nn.Module:
    """Return the same model on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a rank's step."""
    source = torch.Generator().manual_seed(10 * seed + rank)
    return torch.randn(8, 5, generator=source), torch.randn(8, 2, generator=source)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    """Take steps on a rank's batches."""
    for seed in steps:
        x, y = batch(rank, seed)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def equal(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    """Say whether two models have the same parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(mine, theirs, rtol=0, atol=tolerance) for mine, theirs in pairs)


def check_data_parallel_is_the_complete_graph(rank: int) -> None:
    ours, theirs = mlp(), nn.parallel.DistributedDataParallel(mlp())
    optimizer = gd.DecentralizedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), gd.topology("complete"))
    train(ours, optimizer, rank, range(50))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), rank, range(50))
    assert equal(ours, theirs.module, 1e-6)
    assert not equal(ours, mlp(), 1e-2)
    assert optimizer.rounds == 50


def check_every_method_is_the_simulators(rank: int) -> None:
    problem, x = quadratics(SIZE), start(SIZE)
    for name, (arguments, algorithm, steps) in METHODS.items():
        graph = gd.topology("ring" if name == "diffusion" else "od-equidyn", seed=4)
        expected = drive(algorithm, graph, problem, x, 5, 0.1, steps=steps)[-1]["x"]
        model = Point(torch.from_numpy(x[rank]), problem, rank)
        optimizer = gd.DecentralizedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), graph, every=steps, bucket_bytes=8, **arguments
        )
        for _ in range(5 * steps):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        assert torch.allclose(model.x, expected[rank], rtol=0, atol=1e-12), name
        assert optimizer.rounds == 5


def check_unequal_data_leave_no_bias(rank: int) -> None:
    problem, x = quadratics(SIZE), start(SIZE)
    optimum, squares = torch.from_numpy(problem.optimum), {}
    for mode in ("gradient-tracking", "exact-diffusion", "adapt-then-combine"):
        model = Point(torch.from_numpy(x[rank]), problem, rank)
        optimizer = gd.DecentralizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), gd.topology("ring"), mode)
        for _ in range(60):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        squares[mode] = float((model.x.detach() - optimum).square().sum())
    assert squares["gradient-tracking"] < 1e-20, squares
    assert squares["exact-diffusion"] < 1e-20, squares
    assert squares["adapt-then-combine"] > 1e-4, squares


def check_outer_optimizers_of_whole_runs(rank: int) -> None:
    """Against what `gossamer run` made, see test_ranks.py."""
    with open(os.environ["REFERENCES"], encoding="utf-8") as file:
        references = json.load(file)
    names = [each["config"]["algorithm"]["name"] for each in references]
    assert names == ["gasloc", "noloco", "diloco", "streaming-diloco"]
    for one in references:
        config, models = one["config"], one["models"]
        workload, train = build(parse(config)).workload, config["train"]
        batch = workload.batch(np.array([rank]), np.arange(train["batch_size"])[None])
        samples = {name: value[0] for name, value in (batch.samples | batch.client).items()}
        views = workload.layout.views(workload.init(config["seed"]))
        params = {name: nn.Parameter(value.clone()) for name, value in views.items()}
        graph = None
        if "peers" in config:
            graph = gd.topology(config["peers"]["topology"], seed=config["seed"])
        inner = torch.optim.AdamW(params.values(), lr=train["lr"])
        optimizer = gd.DecentralizedOptimizer(inner, graph, every=train["steps"], outer=config["algorithm"])
        for _ in range(config["rounds"] * config["algorithm"].get("fragments", 1) * train["steps"]):
            optimizer.zero_grad()
            workload.loss(params, samples).backward()
            optimizer.step()
        found = [*params.values()] if graph is not None else optimizer.outer_parameters()
        for (name, initial), value in zip(views.items(), found, strict=True):
            expected = models[rank % len(models)][name]
            assert np.allclose(value.detach().numpy(), expected, rtol=0, atol=1e-6), (config["algorithm"], name)
            assert not np.allclose(initial.numpy(), expected, atol=0.02), name


def check_a_state_continues_with_the_same_bits(rank: int) -> None:
    ring, streaming = gd.topology("ring"), {"name": "streaming-diloco", "fragments": 2}
    methods = {name: (arguments | {"topology": ring}, every) for name, (arguments, _, every) in METHODS.items()}
    for name, (arguments, every) in (methods | {"streaming": ({"outer": streaming}, 2)}).items():

        def made(model: nn.Module, arguments: Any = arguments, every: int = every) -> gd.DecentralizedOptimizer:
            inner = torch.optim.Adam(model.parameters(), lr=0.01)
            return gd.DecentralizedOptimizer(inner, every=every, bucket_bytes=64, **arguments)

        model = mlp()
        optimizer = made(model)
        train(model, optimizer, rank, range(3))  # in the midst of a round, if it has two steps
        saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        train(model, optimizer, rank, range(3, 6))
        again = mlp()
        later = made(again)
        train(again, later, rank, range(every))  # other rounds in between
        again.load_state_dict(weights)
        later.load_state_dict(saved)
        train(again, later, rank, range(3, 6))
        assert later.rounds == optimizer.rounds == 6 // every
        assert equal(model, again), name
        other = gd.DecentralizedOptimizer(torch.optim.SGD(mlp().parameters(), lr=0.1), ring, every=3)
        with pytest.raises(ConfigError, match="the state is that of"):
            other.load_state_dict(saved)
        with pytest.raises(ConfigError, match="a state without 'decentralized'"):
            other.load_state_dict(torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict())


def check_parameters_leave_during_the_backward_pass(rank: int) -> None:
    model, (x, y), graph = mlp(), batch(rank), gd.topology("ring")
    whole, halves = copy.deepcopy(model), copy.deepcopy(model)
    num_bytes = 2 * 4 * sum(each.numel() for each in model.parameters())

    def wrapped(module: nn.Module) -> gd.DecentralizedOptimizer:
        inner = torch.optim.SGD(module.parameters(), lr=0.1)
        return gd.DecentralizedOptimizer(inner, graph, "combine-while-adapt", bucket_bytes=100)

    for module, parts in ((whole, 1), (halves, 2)):  # gradients that are accumulated over several passes
        optimizer, before = wrapped(module), gd.bytes_sent()
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.mse_loss(module(part_x), part_y) / parts).backward()
            assert gd.bytes_sent() - before == num_bytes
        optimizer.step()
        assert gd.bytes_sent() - before == num_bytes
    assert equal(whole, halves, 1e-6)
    unused, before = copy.deepcopy(model), gd.bytes_sent()
    optimizer = wrapped(unused)
    (unused[0](x) if rank == 1 else unused(x)).square().mean().backward()  # one rank has no use for the last layer
    assert gd.bytes_sent() - before == (0 if rank == 1 else num_bytes)
    optimizer.step()
    assert gd.bytes_sent() - before == num_bytes


def check_infinite_gradients_skip_a_step_and_no_exchange(rank: int) -> None:
    graph, slope = gd.topology("ring"), torch.arange(1.0, 1 + SIZE)
    matrix, expected = torch.from_numpy(graph.mixing(0).dense()).float(), torch.zeros(SIZE)
    x = nn.Parameter(torch.zeros(1))
    optimizer = gd.DecentralizedOptimizer(torch.optim.SGD([x], lr=0.1), graph)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        gradients = slope.clone()
        optimizer.zero_grad()
        scaler.scale(x * (torch.inf if (rank, step) == (1, 2) else slope[rank])).sum().backward()
        if step == 3:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        gradients[1] *= step != 2
        expected = matrix @ (expected - 0.1 * gradients)
        assert torch.allclose(x.detach(), expected[rank], rtol=0, atol=1e-6)
    assert optimizer.rounds == 4
    assert scaler.get_scale() == (4.0 if rank == 1 else 8.0)


def check_compiled_models_autocast_and_schedules(rank: int) -> None:
    model = mlp()
    run = torch.compile(model, backend="aot_eager") if rank == 0 else model
    optimizer = gd.DecentralizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), gd.topology("complete"), "combine-while-adapt"
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for seed in range(2):
        x, y = batch(rank, seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(run(x).float(), y)
        before = gd.bytes_sent()
        loss.backward()
        assert gd.bytes_sent() - before == 3 * 4 * sum(each.numel() for each in model.parameters())
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    gd.neighbor_allreduce([each.detach() for each in model.parameters()], topology=gd.topology("complete"))
    assert 0 < gd.consensus_distance([*model.parameters()]) < 0.1  # a step apart


def check_running_moments_are_averaged_where_asked(rank: int) -> None:
    model, (x, _) = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), batch(rank)
    gd.broadcast([*model.parameters()])
    alone = copy.deepcopy(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gd.DecentralizedOptimizer(inner, gd.topology("complete"), buffers=model.buffers())
    for module in (model, alone):
        module(x).square().sum().backward()
    optimizer.step()
    own = [alone[1].running_mean, alone[1].running_var]
    assert gd.consensus_distance(own) > 0.01
    for found, expected in zip((model[1].running_mean, model[1].running_var), gd.allreduce(own), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert model[1].num_batches_tracked == 1


def check_arguments_of_an_optimizer(rank: int) -> None:
    ring, directed = gd.topology("ring"), gd.topology("od-equidyn")
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("none of adapt-then-combine, ", ring, {"mode": "atc"}),
        ("every = 0: give a whole number", ring, {"every": 0}),
        ("every = 2, but the correction removes", ring, {"every": 2, "mode": "exact-diffusion"}),
        ("ExactDiffusion does not go with topology 'od-equidyn'", directed, {"mode": "exact-diffusion"}),
        ("DSGD does not go with topology 'ceca'", gd.topology("ceca"), {}),
        ("averages over all processes, not over 'ring'", ring, {"outer": "diloco"}),
        ("ChocoSGD does more than an outer step", ring, {"outer": "choco-sgd"}),
        ("fragments = 9, but the model has 4", None, {"outer": {"name": "streaming-diloco", "fragments": 9}}),
        ("leave mode out", ring, {"outer": "gasloc", "mode": "gradient-tracking"}),
        ("gamma", ring, {"outer": {"name": "gasloc", "gamma": 2.0}}),
        ("the ranks do not agree: ranks 0, 1, 2 have .* every 1 over", ring, {"every": 1 + (rank == 3)}),
    ]
    for words, graph, arguments in cases:
        with pytest.raises(ConfigError, match=words):
            gd.DecentralizedOptimizer(torch.optim.SGD(mlp().parameters(), lr=0.1), graph, **arguments)
    inner = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"wire_dtype = torch.bfloat16 is for messages to neighbours"):
        gd.DecentralizedOptimizer(inner, outer="diloco", wire_dtype=torch.bfloat16)
    unequal = torch.optim.SGD([nn.Parameter(torch.full((2,), float(rank == 2)))], lr=0.1)
    with pytest.raises(ConfigError, match=r"ranks 0, 1, 3 have initial .*; rank 2 has .*: call .*broadcast"):
        gd.DecentralizedOptimizer(unequal, outer="diloco")
    frozen = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ConfigError, match="needs parameters that require gradients"):
        gd.DecentralizedOptimizer(frozen, ring)
    optimizer = gd.DecentralizedOptimizer(torch.optim.SGD(mlp().parameters(), lr=0.1), ring)
    with pytest.raises(ConfigError, match="no model that all ranks share without outer"):
        optimizer.outer_parameters()
    with pytest.raises(ConfigError, match="groups are fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def check_a_rank_that_is_gone(rank: int) -> None:
    """The last check: the group is of no use after it."""
    gd.neighbor_allreduce(torch.zeros(7), topology=gd.topology("complete"))
    if rank == 3:
        gd.shutdown()
        with pytest.raises(ConfigError, match="joined no group"):
            gd.size()
        return
    with pytest.raises(EngineError, match=rf"rank {rank} waited in vain for .*3.*same order"):
        gd.neighbor_allreduce(torch.zeros(7), topology=gd.topology("complete"))
