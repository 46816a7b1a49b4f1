"""Runs that are loaded without their data: the model gives the logged accuracy to the digit, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gossamer
import user_modules
from federation import Injected, configure, failing
from gossamer.errors import CheckpointError, ConfigError, GossamerWarning
from gossamer.results.loading import LoadedRun
from gossamer.storage.model_file import CONSTANTS, DESCRIPTION
from gossamer.workloads.datasets import ImageData, digits, synthetic
from gossamer.workloads.supervised import Supervised
from slow_peers import decentralized

SUB_MODELS = {"submodel": {"capacities": [1.0, 0.5]}, "evaluation.by_capacity": True, "algorithm": "fedrolex"}
DIGITS = {"workload.dataset": "digits", "clients.num": 20, "clients.per_round": 3, "rounds": 2}
DIGITS |= {"workload.statistics_chunk": 300, "train": {"lr": 0.1, "steps": 8, "batch_size": 10}}


def module(name: str, **options: Any) -> dict[str, Any]:
    """Return the change that trains a module of a user."""
    return {"workload.model": {"name": f"user_modules:{name}", **options}}


def trained(where: Path, changes: Mapping[str, Any], hooks: Any = None) -> Path:
    """Run an experiment in modes that the rule chooses, and return its directory."""
    data = decentralized(changes) if "peers.num" in changes else configure(changes)
    return gossamer.run(data | {"engine": {"workers": 0}}, out=where, hooks=hooks).directory


@contextmanager
def without_data() -> Iterator[None]:
    """Let whoever asks for data fail."""

    def refuse(workload: Supervised) -> None:
        """Fail."""
        raise AssertionError("the data were asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "_load_data", refuse)
        patch.delenv("GOSSAMER_DATA", raising=False)
        yield


def accuracy(model: nn.Module, run: LoadedRun, data: ImageData) -> float:
    """Return the accuracy of a model as anybody would compute it."""
    with torch.no_grad():
        return float((model(run.normalize(data.test_images)).argmax(1) == data.test_labels).double().mean())


def small_images() -> ImageData:
    """Return the test data of `federation.BASE`."""
    return synthetic({"num_train": 150, "num_test": 40, "noise": 2.0})


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a plain module with BatchNorm on real digits, of two capacities."""
    return trained(tmp_path_factory.mktemp("runs") / "resnet", DIGITS | module("ResNet") | SUB_MODELS)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four peers with BatchNorm, two of which are evaluated by themselves."""
    changes = {"peers.num": 4, "evaluation.num_peers": 2, "train": {"lr": 0.1, "steps": 1}} | module("ResNet", width=4)
    return trained(tmp_path_factory.mktemp("runs") / "peers", changes)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds."""
    methods = {"small": {"train": {"lr": 0.01}}, "large": {}}
    changes = {"rounds": 1, "methods": methods, "seeds": [0, 1], "workload.model": "softmax"}
    return trained(tmp_path_factory.mktemp("runs") / "several", changes)


class TestModels:
    def test_a_plain_module_gives_the_logged_accuracy(self, resnet: Path) -> None:
        with without_data():
            run = gossamer.load(resnet)
            model = run.model()
        assert type(model) is user_modules.ResNet
        assert not model.training
        assert 0.15 < accuracy(model, run, digits({})) == run.metrics[-1]["accuracy"]

    def test_so_does_its_sub_model_of_the_last_round(self, resnet: Path) -> None:
        with without_data():
            run = gossamer.load(resnet)
            model = run.model(capacity=0.5)
        assert accuracy(model, run, digits({})) == run.metrics[-1]["accuracy_by_capacity"]["0.5"]
        assert model.state_dict()["fc.weight"].shape == (10, 8)
        assert {*model.state_dict()} == {*run.state_dict(capacity=0.5)} == {*run.state_dict()}

    def test_it_needs_its_moments(self, resnet: Path) -> None:
        run = gossamer.load(resnet)
        model = run.model()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
        assert accuracy(model, run, digits({})) != run.metrics[-1]["accuracy"]

    def test_its_state_dict_fits_the_module_strictly(self, resnet: Path) -> None:
        run = gossamer.load(resnet)
        fresh = user_modules.ResNet((1, 8, 8), 10)
        fresh.load_state_dict(run.state_dict(), strict=True)
        assert accuracy(fresh.eval(), run, digits({})) == run.metrics[-1]["accuracy"]

    def test_a_built_in_model_with_batch_norm(self, tmp_path: Path) -> None:
        small = {"workload.model": {"name": "preact-resnet18", "width": 0.0625}, "rounds": 1}
        directory = trained(tmp_path / "run", DIGITS | SUB_MODELS | small)
        with without_data():
            run = gossamer.load(directory)
            models = {"1": run.model(), "0.5": run.model(capacity=0.5)}
        found = {capacity: accuracy(model, run, digits({})) for capacity, model in models.items()}
        assert found == run.metrics[-1]["accuracy_by_capacity"]
        x, model = run.normalize(digits({}).test_images[:9]), models["1"]
        assert not torch.equal(model(x), model.train()(x))
        model(x).sum().backward()
        assert all(param.grad is not None for param in model.parameters())

    @pytest.mark.parametrize("name", ["Adapted", "HalfFrozen", "Tied", "FixedNorm", "Drawn", "wrapped_drawn"])
    def test_frozen_tied_and_drawn_tensors(self, tmp_path: Path, name: str) -> None:
        directory = trained(tmp_path / "run", {"rounds": 1} | module(name))
        with without_data():
            run = gossamer.load(directory)
            model, state = run.model(), run.state_dict()
        assert accuracy(model, run, small_images()) == run.metrics[-1]["accuracy"]
        named = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
        assert named == {key for key in state if not key.endswith("num_batches_tracked")}
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)
        with torch.random.fork_rng():
            fresh = getattr(user_modules, name)((1, 8, 8), 10)
        if isinstance(fresh, nn.Module):
            fresh.load_state_dict(state, strict=True)
            assert accuracy(fresh.eval(), run, small_images()) == run.metrics[-1]["accuracy"]

    @pytest.mark.parametrize("model", ["Adapted", "Tied", None])
    def test_low_rank_factors_are_merged(self, tmp_path: Path, model: str | None) -> None:
        lora = {"workload.lora": {"rank": 2, "targets": ["there"] if model == "Tied" else ["output"]}}
        options = {"rounds": 2} | SUB_MODELS | {"algorithm": "heterofl"} | lora
        if model is None:
            text = {"name": "next-character", "dataset": "synthetic", "context": 8}
            text["model"] = {"name": "transformer", "num_blocks": 1, "stream": 16, "num_heads": 2, "hidden": 16}
            text["lora"] = {"rank": 2, "targets": ["*.query"]}
            run = gossamer.load(trained(tmp_path / "run", {"workload": text, "rounds": 1, "train.steps": 1}))
            assert not any("lora" in name for name, _ in run.model().named_parameters())
            return
        done = gossamer.run(configure(options | module(model)) | {"engine": {"workers": 0}}, out=tmp_path / "run")
        run = gossamer.load(done.directory)
        assert list(run.params) == list(done.params)
        assert all(torch.equal(value, done.params[name]) for name, value in run.params.items())
        for capacity, shown in ((1.0, "1"), (0.5, "0.5")):
            found = run.model(capacity=capacity)
            assert type(found).__name__ == model
            assert accuracy(found, run, small_images()) == run.metrics[-1]["accuracy_by_capacity"][shown]

    def test_frozen_parameters_of_a_built_in_model(self, tmp_path: Path) -> None:
        directory = trained(tmp_path / "run", {"rounds": 1, "workload.frozen": ["hidden0.*"]})
        with without_data():
            run = gossamer.load(directory)
            model = run.model()
        assert accuracy(model, run, small_images()) == run.metrics[-1]["accuracy"]

    @pytest.mark.parametrize("strategy", ["magnitude", "random", "covering"])
    def test_sub_models_of_other_windows(self, tmp_path: Path, strategy: str) -> None:
        chosen = {"algorithm": "fedavg", "submodel.strategy": strategy}
        run = gossamer.load(trained(tmp_path / "run", SUB_MODELS | chosen))
        expected = run.metrics[-1]["accuracy_by_capacity"]["0.5"]
        assert accuracy(run.model(capacity=0.5), run, small_images()) == expected

    def test_masked_models(self, tmp_path: Path) -> None:
        run = gossamer.load(trained(tmp_path / "run", SUB_MODELS | {"algorithm": "fiarse"}))
        model = run.model(capacity=0.5)
        assert accuracy(model, run, small_images()) == run.metrics[-1]["accuracy_by_capacity"]["0.5"]
        assert sum((value == 0).sum() for value in model.parameters()) > 100

    def test_a_language_model(self, tmp_path: Path) -> None:
        text = {"name": "next-character", "dataset": "synthetic", "context": 16}
        text["model"] = {"name": "transformer", "num_blocks": 1, "stream": 16, "num_heads": 2}
        directory = trained(tmp_path / "run", {"workload": text, "rounds": 1, "train": {"lr": 0.1, "steps": 1}})
        with without_data():
            run = gossamer.load(directory)
            logits = run.model()(torch.zeros(2, 16, dtype=torch.int64))
        assert logits.shape == (2, 16, len(run.facts["vocabulary"]))
        with pytest.raises(ConfigError, match="does not normalise"):
            run.normalize(torch.zeros(1))

    def test_a_module_that_was_given_as_an_object(self, tmp_path: Path) -> None:
        x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
        y, net = (x.sum(1) > 7).long(), nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        split = x[:40], y[:40], x[40:], y[40:]
        clients, train = {"num": 4, "per_round": 2}, {"lr": 0.1}
        done = gossamer.run(
            model=net, data=split, rounds=2, clients=clients, train=train, engine={"workers": 0}, out=tmp_path / "run"
        )
        run = gossamer.load(done.directory)
        with pytest.raises(ConfigError, match=r"load what state_dict\(\) returns into it"):
            run.model()
        net.load_state_dict(run.state_dict(), strict=True)
        found = (net.eval()(run.normalize(x[40:])).argmax(1) == y[40:]).double().mean()
        assert float(found) == run.metrics[-1]["accuracy"]


class TestPeers:
    def test_merged_and_one_by_one(self, peers: Path) -> None:
        with without_data():
            run = gossamer.load(peers)
            merged, *single = run.model(), run.model(peer=0), run.model(peer=2)
        last = run.metrics[-1]
        assert accuracy(merged, run, small_images()) == last["accuracy"]
        found = [accuracy(model, run, small_images()) for model in single]
        assert sum(found) / 2 == last["accuracy_peers"]["mean"]
        assert min(found) == last["accuracy_peers"]["min"]

    def test_a_peer_that_was_not_evaluated(self, peers: Path) -> None:
        with pytest.raises(ConfigError, match=r"not known of peer=1 after round 3.*evaluation\.num_peers"):
            gossamer.load(peers).model(peer=1)

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [({"peer": 4}, "has 4 peers: give a number from 0 to 3"), ({"peer": 1, "capacity": 0.5}, "leave peer out")],
    )
    def test_what_there_is_not(self, peers: Path, chosen: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            gossamer.load(peers).state_dict(**chosen)

    def test_without_batch_norm_every_peer_is_known(self, tmp_path: Path) -> None:
        run = gossamer.load(trained(tmp_path / "run", {"peers.num": 4, "evaluation.num_peers": 0, "rounds": 1}))
        rows = [torch.cat([v.flatten() for v in run.state_dict(peer=peer).values()]) for peer in range(4)]
        merged = torch.cat([value.flatten() for value in run.params.values()])
        assert torch.allclose(torch.stack(rows).mean(0), merged, atol=1e-7)
        assert not torch.equal(rows[0], rows[1])


class TestUnfinishedRuns:
    BATCH_NORM = {"rounds": 6, "evaluation.every": 2, "train": {"lr": 0.1, "steps": 1}, **module("ResNet", width=4)}

    def test_the_last_commit_counts(self, tmp_path: Path) -> None:
        hooks = failing("exchange", True, 3)
        with pytest.raises(Injected):
            trained(tmp_path / "run", self.BATCH_NORM, hooks)
        run = gossamer.load(tmp_path / "run")
        assert (run.round, len(run.metrics)) == (2, 2)
        assert accuracy(run.model(), run, small_images()) == run.metrics[-1]["accuracy"]

    def test_moments_are_as_old_as_the_evaluation_also_after_a_resume(self, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        with pytest.raises(Injected):
            trained(directory, self.BATCH_NORM, failing("exchange", True, 4))
        with pytest.warns(GossamerWarning, match="those of round 2, the parameters those of round 3"):
            before = gossamer.load(directory).state_dict()
        with pytest.raises(Injected):  # commits round 3 again, as it was restored
            gossamer.resume(directory, hooks=failing("train", True, 1))
        with pytest.warns(GossamerWarning, match="those of round 2, the parameters those of round 3"):
            after = gossamer.load(directory).state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        gossamer.resume(directory)
        run = gossamer.load(directory)
        assert accuracy(run.model(), run, small_images()) == run.metrics[-1]["accuracy"]

    def test_no_commit(self, resnet: Path, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_bytes((resnet / "config.yaml").read_bytes())
        (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(CheckpointError, match="has no commit yet"):
            gossamer.load(tmp_path)

    def test_moments_before_any_evaluation(self, tmp_path: Path) -> None:
        with pytest.raises(Injected):
            trained(tmp_path / "run", self.BATCH_NORM, failing("train", True, 1))
        run = gossamer.load(tmp_path / "run")
        assert run.params["fc.bias"].shape == (10,)
        with pytest.raises(ConfigError, match="train on, until it is evaluated"):
            run.state_dict()


class TestSeveralRuns:
    def test_by_name(self, several: Path) -> None:
        run = gossamer.load(several, run="small/seed-1")
        assert (run.config["seed"], run.config["train"]["lr"]) == (1, 0.01)
        assert run.directory == gossamer.load(several / "small" / "seed-1").directory
        assert gossamer.load(several / "small", run="seed-1").directory == run.directory

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (None, "holds 4 runs: name one of them .*large/seed-0, large/seed-1"),
            ("small", "is 2 runs: give all of the name"),
            ("small/seed-2", "no run 'small/seed-2'.*did you mean 'small/seed-"),
        ],
    )
    def test_names_that_are_not_one_run(self, several: Path, name: str | None, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            gossamer.load(several, run=name)

    def test_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run in or below"):
            gossamer.load(tmp_path)
        with pytest.raises(ConfigError, match="no directory"):
            gossamer.load(tmp_path / "nowhere")


class TestRefusals:
    def test_other_code_than_that_of_the_run(self, resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Wider(user_modules.ResNet):
            def __init__(self, input_shape: Any, num_labels: int) -> None:
                super().__init__(input_shape, num_labels, width=10)
                self.more = nn.Linear(2, 2)

        monkeypatch.setattr(user_modules, "ResNet", Wider)
        with pytest.raises(ConfigError) as caught:
            gossamer.load(resnet).model()
        told = str(caught.value)
        assert "not those of model 'Wider'" in told
        assert "no more.weight, more.bias; conv1.weight of shape (8, 1, 3, 3) instead of (10, 1, 3, 3)" in told

    def test_other_options_of_a_built_in_model(self, tmp_path: Path) -> None:
        run = gossamer.load(trained(tmp_path / "run", {"rounds": 1}))
        run.config["workload"]["model"]["hidden"] = [16]
        with pytest.raises(ConfigError, match="not those of model 'MLP'"):
            run.model()

    def test_capacities_that_the_run_has_not(self, resnet: Path) -> None:
        with pytest.raises(ConfigError, match=r"capacity = 0.25, but the run has \[0.5, 1.0\]"):
            gossamer.load(resnet).model(capacity=0.25)
        with pytest.raises(ConfigError, match="peer = 0, but the run has a server"):
            gossamer.load(resnet).model(peer=0)

    def test_workloads_without_a_model(self, tmp_path: Path) -> None:
        changes = {"workload": {"name": "least-squares", "dim": 3, "num_samples": 5}, "rounds": 1}
        run = gossamer.load(trained(tmp_path / "run", changes))
        assert run.state_dict()["x"].shape == (3,)
        with pytest.raises(ConfigError, match="says not how its model is built"):
            run.model()

    @pytest.mark.parametrize("kind", ["described", "constants", "missing", "config"])
    def test_what_was_altered(self, tmp_path: Path, kind: str) -> None:
        directory = trained(tmp_path / "run", {"rounds": 1} | module("HalfFrozen"))
        described, config = directory / DESCRIPTION, directory / "config.yaml"
        if kind == "described":
            described.write_text(described.read_text().replace('"std"', '"mean"'))
        elif kind == "constants":
            content = bytearray((directory / CONSTANTS).read_bytes())
            content[-1] ^= 1
            (directory / CONSTANTS).write_bytes(content)
        elif kind == "missing":
            described.unlink()
        else:
            config.write_text(config.read_text().replace("lr: 0.1", "lr: 0.2"))
        with pytest.raises((CheckpointError, ConfigError), match=r"altered|resume the run|restore that entry"):
            gossamer.load(directory).model()
        if kind == "missing":
            gossamer.resume(directory)
            gossamer.load(directory).model()

    def test_damaged_commits_are_told(self, tmp_path: Path) -> None:
        directory = trained(tmp_path / "run", {"rounds": 2})
        newest = max((directory / "checkpoints").iterdir())
        (newest / "arrays.safetensors").write_bytes(b"")
        with pytest.warns(GossamerWarning, match="is damaged"):
            assert gossamer.load(directory).round == 1
        for one in (directory / "checkpoints").iterdir():
            (one / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            gossamer.load(directory)

    def test_code_that_is_no_plug_in(self, resnet: Path) -> None:
        run = gossamer.load(resnet)
        run.config["workload"]["model"]["name"] = "torch.nn:Linear"
        with pytest.raises(ConfigError, match="--trust"):
            run.model()


def test_frames(resnet: Path) -> None:
    run = gossamer.load(resnet)
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="needs pandas"):
            run.frame()
    else:
        assert list(run.frame()["accuracy_by_capacity.0.5"]) == [
            record["accuracy_by_capacity"]["0.5"] for record in run.metrics
        ]
    assert "2 rounds" in repr(run)


def test_files_hold_no_more_than_they_need(resnet: Path) -> None:
    described = json.loads((resnet / DESCRIPTION).read_text())
    assert not (resnet / CONSTANTS).exists()
    assert described["facts"]["input_size"] == [1, 8, 8]
    arrays = load_file(max((resnet / "checkpoints").iterdir()) / "arrays.safetensors")
    assert {name.split(".")[2] for name in arrays if "statistics" in name} == {"model", "capacity=0", "round"}
