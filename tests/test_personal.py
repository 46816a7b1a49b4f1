"""Parameters that stay with the clients (FedPer, FedRep, FedBN), and accuracy after local steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from federation import SINGLY, STACKED, assert_same, configure, digest, modes, relative_error
from gossamer import load, run
from gossamer.build import Parts, build
from gossamer.cli.main import app
from gossamer.config.loading import parse
from gossamer.config.resolve import resolve
from gossamer.errors import ConfigError
from gossamer.experiment import resume
from gossamer.storage.client_store import ClientStore
from gossamer.submodel import extract
from slow import AXES, perceptron
from slow_federated import UNEQUAL, Gradient, Params, add, slow_federation

HEAD = ("output.weight", "output.bias")
PERSONAL: dict[str, Any] = {"clients.personal": ["output.*"], "clients.per_round": 5}
EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


class SlowClients:
    """Local SGD of clients with a head of their own; afterwards `own` has the heads."""

    def __init__(self, head_share: float = 0.0) -> None:
        self.own: dict[int, Params] = {}
        self.head_share = head_share

    def __call__(self, client: int, start: Params, gradients: Sequence[Gradient], rate: float) -> Params:
        """Return a client's change: none of the head, which stays."""
        begin = add((1.0, start)) | self.own.get(client, {})
        found = add((1.0, begin))
        num_head = int(self.head_share * len(gradients))
        for step, gradient in enumerate(gradients):
            for name, grad in gradient(found).items():
                if not self.head_share or (step < num_head) == (name in HEAD):
                    found[name] = found[name] - rate * grad
        self.own[client] = {name: found[name] for name in HEAD}
        return add((1.0, found), (-1.0, begin)) | {name: torch.zeros_like(start[name]) for name in HEAD}


def accuracy_of(parts: Parts, params: Params, client: int) -> float:
    """Return the accuracy on the classes that a client holds, as training samples share them, predicted among these."""
    data, own = parts.workload.data, parts.workload.partition.of_client(client)
    held = torch.bincount(data.train_labels[torch.from_numpy(own)], minlength=10)
    images = (data.test_images - data.mean[0]) / data.std[0]
    logits = perceptron(params, images.double()).detach()
    logits[:, held == 0] = -torch.inf
    right = (logits.argmax(1) == data.test_labels).double()
    by_class = [
        float(right[data.test_labels == label].mean()) for label in range(10) if (data.test_labels == label).any()
    ]
    tested = [label for label in range(10) if (data.test_labels == label).any()]
    weight = np.array([float(held[label]) for label in tested])
    return float(weight @ np.array(by_class) / weight.sum())


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("algorithm", ["fedavg", "fedper", {"name": "fedrep", "head_share": 0.4}], ids=str)
def test_slow_version(tmp_path: Path, algorithm: Any, mode: dict[str, bool]) -> None:
    config = configure(UNEQUAL | PERSONAL | {"algorithm": algorithm, "evaluation.num_clients": 8} | modes(**mode))
    slow = SlowClients(algorithm["head_share"] if isinstance(algorithm, dict) else 0.0)
    parts = build(parse(config))
    done = run(config, out=tmp_path / "run")
    expected = slow_federation(parts, slow)
    assert relative_error(done.params, expected) < 1e-5
    initial = parts.workload.layout.views(parts.workload.init(0))
    assert all(torch.equal(done.params[name], initial[name]) for name in HEAD)
    accuracies = [accuracy_of(parts, expected | slow.own.get(client, {}), client) for client in range(8)]
    spread = done.metrics[-1]["accuracy_personal"]
    assert spread["mean"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert (spread["min"], spread["max"]) == pytest.approx((min(accuracies), max(accuracies)), abs=1e-6)
    assert len(slow.own) > 1


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FedPer in which some clients were never trained, all of them evaluated after the last round."""
    changes = UNEQUAL | PERSONAL | {"algorithm": "fedper", "evaluation.num_clients": 8, "rounds": 2}
    changes |= {"clients.per_round": 3} | modes(**SINGLY)
    return run(configure(changes), out=tmp_path_factory.mktemp("runs") / "personal").directory


class TestTakenHome:
    def test_a_clients_model_is_as_accurate_as_a_computation_by_hand(self, personal: Path) -> None:
        """Of the clients that were trained; the others have the server's model, and are refused."""
        loaded, slow = load(personal), SlowClients()
        parts = build(parse(loaded.config))
        expected = slow_federation(parts, slow)
        accuracies = []
        for client in range(8):
            if client not in slow.own:
                with pytest.raises(ConfigError, match=f"client = {client} has not been trained in 2 rounds"):
                    loaded.model(client=client)
                accuracies.append(accuracy_of(parts, doubled(loaded.params), client))
                continue
            found = loaded.state_dict(client=client)
            assert relative_error(found, expected | slow.own[client]) < 1e-5
            accuracies.append(accuracy_of(parts, doubled(found), client))
            x = loaded.normalize(parts.workload.data.test_images)
            logits = perceptron(doubled(found), x.double()).float()
            assert torch.allclose(loaded.model(client=client)(x), logits, atol=1e-5)
        spread = loaded.metrics[-1]["accuracy_personal"]
        assert 0 < len(slow.own) < 8
        assert spread["mean"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert (spread["min"], spread["max"]) == pytest.approx((min(accuracies), max(accuracies)), abs=1e-6)

    def test_exported(self, personal: Path, tmp_path: Path) -> None:
        loaded = load(personal)
        client = next(one for one in range(8) if not refusal(loaded, one))
        before = {path.name: path.read_bytes() for path in (personal / "clients").iterdir()}
        file = tmp_path / "own.safetensors"
        done = CliRunner().invoke(app, ["export", str(personal), "-o", str(file), "--client", str(client)])
        assert done.exit_code == 0, done.output
        found, expected = load_file(file), loaded.state_dict(client=client)
        assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in expected.items()}
        assert not torch.equal(found["output.weight"], loaded.params["output.weight"])
        assert torch.equal(found["hidden0.weight"], loaded.params["hidden0.weight"])
        assert {path.name: path.read_bytes() for path in (personal / "clients").iterdir()} == before

    def test_a_sub_model_has_the_windows_of_the_client(self, tmp_path: Path) -> None:
        """Windows are random, so that they differ between clients."""
        changes = PERSONAL | {"submodel": {"capacities": [0.5, 1.0], "strategy": "random"}}
        loaded = load(run(configure(changes | modes([0.5, 1.0], **SINGLY)), out=tmp_path / "run").directory)
        rows = []
        for client in [one for one in range(8) if not refusal(loaded, one)][:2]:
            whole, found = (loaded.state_dict(capacity=capacity, client=client) for capacity in (1.0, 0.5))
            expected = extract(whole, AXES, capacity=0.5, round=2, strategy="random", seed=0, client=client).params
            assert {name: value.tolist() for name, value in found.items()} == {
                name: value.tolist() for name, value in expected.items()
            }
            rows.append(found["hidden0.bias"])
        assert not torch.equal(*rows)

    def test_refusals(self, personal: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"client = 8, but the run has 8 clients: give a number from 0 to 7"):
            load(personal).model(client=8)
        plain = run(configure({"rounds": 1}), out=tmp_path / "plain").directory
        with pytest.raises(ConfigError, match=r"client = 0, but its clients keep no parameters, see clients\.personal"):
            load(plain).model(client=0)

    def test_batch_norm_has_the_moments_of_the_client(self, tmp_path: Path) -> None:
        """The mean accuracy of all clients' models, taken home, is that of the log; others are refused."""
        model = {"name": "preact-resnet18", "width": 0.0625}
        changes = {"algorithm": "fedbn", "workload.model": model, "clients.num": 3, "clients.per_round": 3, "rounds": 1}
        changes["clients.partition"] = {"name": "n-classes", "n": 10}
        data = build(parse(configure(changes))).workload.data
        accuracies = []
        loaded = load(run(configure(changes | {"evaluation.num_clients": 3}), out=tmp_path / "all").directory)
        for client in range(3):
            with torch.no_grad():
                logits = loaded.model(client=client)(loaded.normalize(data.test_images))
            accuracies.append(float((logits.argmax(1) == data.test_labels).double().mean()))
        assert loaded.metrics[-1]["accuracy_personal"]["mean"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        fewer = load(run(configure(changes | {"evaluation.num_clients": 1}), out=tmp_path / "one").directory)
        refused = [told for client in range(3) if (told := refusal(fewer, client))]
        assert len(refused) == 2
        assert all("not known of client=" in told and "raise or set evaluation.num_clients" in told for told in refused)


def doubled(params: Mapping[str, torch.Tensor]) -> Params:
    """Return parameters in double precision."""
    return {name: value.double() for name, value in params.items()}


def refusal(loaded: Any, client: int) -> str:
    """Return why the model of a client is refused; "" if it is not."""
    try:
        loaded.state_dict(client=client)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("levels", [[1.0], [0.5, 1.0]], ids=str)
def test_same_bits_on_any_number_of_workers_and_after_a_kill(tmp_path: Path, levels: list[float]) -> None:
    changes = PERSONAL | {"submodel": {"capacities": levels}, "evaluation.fine_tune_steps": 2} | modes(levels, **SINGLY)
    changes |= {"algorithm": "fedrolex", "communication.uplink": {"name": "top-k", "share": 0.2}}
    alone = run(configure(changes), out=tmp_path / "alone")
    assert_same(alone, run(configure(changes | {"engine.workers": 2}), out=tmp_path / "two"))

    run(configure(changes), out=tmp_path / "killed", on_round=lambda record: record["round"] == 2)
    assert_same(alone, resume(tmp_path / "killed"))


def test_only_what_is_shared_is_sent(tmp_path: Path) -> None:
    whole, shared = (
        run(configure(changes), out=tmp_path / str(n)).metrics[-1]
        for n, changes in enumerate([{"clients.per_round": 5}, PERSONAL])
    )
    num_rounds, num_clients, head = 3, 5, 32 * 10 + 10
    for name in ("total_bytes_up", "total_bytes_down"):
        assert whole[name] - shared[name] == 4 * head * num_rounds * num_clients
    assert whole["total_client_flops"] == shared["total_client_flops"]
    assert "accuracy_personal" not in whole


def test_batch_norm_stays_at_home(tmp_path: Path) -> None:
    model = {"name": "preact-resnet18", "width": 0.0625}
    config = configure({"algorithm": "fedbn", "workload.model": model, "rounds": 2, "evaluation.num_clients": 3})
    done = run(config, out=tmp_path / "run")
    workload = build(parse(config)).workload
    initial = workload.layout.views(workload.init(0))
    same = {name for name in initial if torch.equal(initial[name], done.params[name])}
    assert same == {name for name in initial if name.rpartition(".")[0] in workload.norms}
    assert 0.0 <= done.metrics[-1]["accuracy_personal"]["min"] <= done.metrics[-1]["accuracy_personal"]["max"] <= 1.0
    store = ClientStore(tmp_path / "run" / "clients")
    assert any("personal" in path.name for path in store.directory.iterdir())


def test_moments_are_those_of_the_client(tmp_path: Path) -> None:
    """Two clients of other data normalise otherwise, and the statistics are what one pass over their data gives."""
    model = {"name": "preact-resnet18", "width": 0.0625}
    parts = build(parse(configure({"workload.model": model, "clients.partition": {"name": "n-classes", "n": 2}})))
    params = parts.workload.layout.views(parts.workload.init(0))
    first, second = (parts.workload.client_statistics(params, client) for client in (0, 1))
    assert set(first) == set(parts.workload.statistics(params, 0))
    assert not torch.allclose(first["norm.sum"], second["norm.sum"])
    assert float(first["norm.count"]) == parts.workload.num_samples[0] * float(second["norm.count"]) / float(
        parts.workload.num_samples[1]
    )


@EITHER
def test_fine_tuning(tmp_path: Path, mode: dict[str, bool]) -> None:
    """Steps before an evaluation change what is measured, and nothing else; they are those of plain training."""
    changes = {"clients.partition": {"name": "n-classes", "n": 2}, "rounds": 2} | modes(**mode)
    plain = run(configure(changes), out=tmp_path / "plain")
    tuned = run(configure(changes | {"evaluation": {"fine_tune_steps": 30, "num_clients": 4}}), out=tmp_path / "tuned")
    assert digest(plain.params) == digest(tuned.params)
    last = tuned.metrics[-1]
    assert last["accuracy_fine_tuned"]["mean"] > last["local_accuracy"]
    assert last["accuracy"] == plain.metrics[-1]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"clients.personal": ["ouput.*"]},
            r"clients.personal: 'ouput.\*' matches no trained parameter; did you mean 'output'\? \(the model's modules",
        ),
        ({"clients.personal": ["*"]}, "keeps all parameters with the clients, so that nothing is learnt together"),
        ({"algorithm": "fedper"}, "'fedper' keeps layers with the clients, but clients.personal names none"),
        ({"algorithm": "fedbn"}, "'fedbn' keeps BatchNorm layers .* the model has none"),
        ({"algorithm": "fedbn", "clients.personal": ["output.*"]}, "'fedbn' keeps the BatchNorm layers .* leave"),
        ({"algorithm": "scaffold", "clients.personal": ["output.*"]}, "clients send more than one mean"),
        (PERSONAL | {"communication.downlink": "int8"}, r"downlink compresses whole models, but 'output\.bias' is"),
        ({"algorithm": "streaming-diloco", "communication.downlink": "int8"}, "downlink compresses whole models"),
        ({"algorithm": {"name": "fedrep", "head_share": 1}, "clients.personal": ["output.*"]}, "head_share"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(parse(configure(changes)))


def test_what_changes_nothing_is_said() -> None:
    [warning] = resolve(parse(configure({"evaluation.num_clients": 3}))).warnings
    assert warning.startswith("evaluation.num_clients = 3 changes nothing, because clients keep no parameters")
