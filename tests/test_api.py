"""What Python calls: objects in the place of names, callbacks, and where it is called from."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

import gossamer
from federation import BASE, assert_same, digest
from gossamer.cli.main import app
from gossamer.errors import ConfigError, DataError, GossamerError, GossamerWarning, Interrupted, RegistryError
from gossamer.storage.runlog import read_config
from gossamer.workloads import samples
from gossamer.workloads.datasets import ImageData, synthetic
from gossamer.workloads.partitions import iid

SYNTHETIC = {"num_train": 150, "num_test": 40, "noise": 2.0}


class Net(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_labels: int, hidden: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(int(np.prod(input_shape)), hidden), nn.ReLU(), nn.Linear(hidden, num_labels)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Items(Dataset[Any]):
    """A torch data set whose items can be spoilt."""

    def __init__(self, images: Tensor, labels: Tensor, spoilt: Mapping[int, Any] | None = None) -> None:
        self.images, self.labels, self.spoilt = images, labels, spoilt or {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.spoilt.get(index, (self.images[index], int(self.labels[index])))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return synthetic(SYNTHETIC)


def run(directory: Path, **changes: Any) -> gossamer.Run:
    """Run two rounds on the synthetic data set."""
    workload = {"dataset": {"name": "synthetic", **SYNTHETIC}, "model": "softmax"}
    return gossamer.run(BASE | {"workload": workload}, out=directory, **{"rounds": 2} | changes)


def pairs(data: ImageData) -> tuple[Items, Items]:
    """Return training and test data as data sets of torch."""
    assert isinstance(data.train_images, Tensor)
    assert isinstance(data.test_images, Tensor)
    return Items(data.train_images, data.train_labels), Items(data.test_images, data.test_labels)


def bytes_of(data: ImageData) -> ImageData:
    """The same data as bytes, which are normalised whoever gives them."""
    images = [(one * 20 + 128).clamp(0, 255).to(torch.uint8) for one in (data.train_images, data.test_images)]
    return ImageData("bytes", images[0], data.train_labels, images[1], data.test_labels, data.num_labels)


class TestEqualBits:
    def test_of_objects_and_names(self, tmp_path: Path, data: ImageData) -> None:
        """A class, a data set, and lists, against the names of the same things; sub-models and workers, too."""
        changes = {"submodel": {"capacities": [1.0, 0.5]}, "algorithm": "fedrolex", "engine": {"modes": "auto"}}
        named = run(tmp_path / "named", **changes, workload={"model": "test_api:Net"})
        divided = iid(data.train_labels.numpy(), 8, 10, 0, None)
        lists = [divided.of_client(client).tolist() for client in range(8)]
        given = run(tmp_path / "given", **changes, model=Net, data=data, partition=lists, clients={"num": None})
        assert_same(named, given)
        assert read_config(given.directory)["workload"]["model"] == {"name": f"{Net.__module__}:Net"}

    def test_of_arrays_and_data_sets_in_memory_and_read_while_training(
        self, tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = bytes_of(data)
        train, test = pairs(found)
        arrays = [one.numpy() for one in (train.images, train.labels, test.images, test.labels)]
        first = run(tmp_path / "0", data=found)
        for number, one in enumerate(
            [
                tuple(arrays),
                (train, test),
                {"train": (arrays[0], arrays[1]), "test": TensorDataset(test.images, test.labels)},
            ]
        ):
            assert_same(first, run(tmp_path / f"given-{number}", data=one))
        monkeypatch.setattr(samples, "SMALL_BYTES", 100)
        lazily = run(tmp_path / "lazily", data=(train, test), engine={"workers": 2})
        assert_same(first, lazily)

    def test_of_a_module_that_the_run_starts_from(self, tmp_path: Path) -> None:
        net = Net((1, 8, 8), 10)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        one, other = (run(tmp_path / name, model=model) for name, model in (("a", net), ("b", lambda: net)))
        assert_same(one, other)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert digest(one.params) != digest(before)


def test_a_model_of_ones_own_without_data_is_told_on_what_it_trains(tmp_path: Path) -> None:
    told = r"no data are given, so the model '.*Net' is trained on 'digits': give data=\.\.\. in Python"
    config = BASE | {"workload": {}, "rounds": 1}
    with pytest.warns(GossamerWarning, match=told):
        gossamer.run(config, model=Net, out=tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gossamer.run(config, model=Net, data="digits", out=tmp_path / "b")
        gossamer.run(config, model="softmax", out=tmp_path / "c")


class TestSizes:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Net((1, 8, 8), 10),
            lambda num_classes: Net((1, 8, 8), num_classes),
            lambda hidden=8, num_labels=3: Net((1, 8, 8), num_labels, hidden),
            lambda shape, count: Net(shape, count),
            partial(Net, hidden=8),
        ],
    )
    def test_are_given_to_whoever_takes_them(self, tmp_path: Path, make: Any) -> None:
        assert_same(run(tmp_path / "a", model=Net), run(tmp_path / "b", model=make))


class TestOtherSamples:
    def test_a_table_whose_test_data_are_taken_out(self, tmp_path: Path) -> None:
        features = np.random.default_rng(0).normal(size=(60, 3))
        given = gossamer.run(
            rounds=8, clients={"num": 3, "per_round": 3}, train={"lr": 1.0}, seed=1, model="softmax",
            data=(features, (features[:, 0] > 0).astype(np.int32)), out=tmp_path / "run",
        )  # fmt: skip
        assert given.metrics[-1]["accuracy"] > 0.8
        assert given.params["output.weight"].shape == (2, 3)

    def test_tokens(self, tmp_path: Path) -> None:
        tokens = torch.arange(80).view(40, 2) % 5
        model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
        found = run(tmp_path / "run", model=model, data=(tokens, torch.arange(40) % 2), clients={"num": 8})
        assert len(found.metrics) == 2

    def test_images_of_pil(self, tmp_path: Path, data: ImageData) -> None:
        from PIL import Image

        train, test = pairs(bytes_of(data))
        shown = [Image.fromarray(one[0].numpy()) for one in train.images]
        as_images = Items(shown, train.labels)  # type: ignore[arg-type]
        assert_same(run(tmp_path / "a", data=(train, test)), run(tmp_path / "b", data=(as_images, test)))


class Random(Items):
    def __getitem__(self, index: int) -> Any:
        return self.images[index] + torch.rand(1), int(self.labels[index])


class Growing(Items):
    calls = 0

    def __len__(self) -> int:
        self.calls += 1
        return len(self.labels) - (self.calls < 2)


class Short(Items):
    def __len__(self) -> int:
        return len(self.labels) + 1


class Raising(Items):
    def __getitem__(self, index: int) -> Any:
        raise OSError("no such picture")


X, Y = torch.zeros(20, 1, 4, 4), torch.arange(20) % 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (Items(X, Y, {3: (X[0, :, :2], 0)}), r"item 3 of the training data has the shape \(1, 2, 4\).*but item 0"),
        (Items(X, Y, {3: (X[0].double().to(torch.uint8), 0)}), "item 3 of the training data has .*torch.uint8"),
        (Items(X, Y, {3: (X[0], 0.5)}), "item 3 of the training data has the label 0.5: give a whole number"),
        (Items(X, Y, {3: X[0, 0]}), r"item 3 of the training data is a Tensor: give a pair \(sample, label\)"),
        (Items(X, Y, {3: ("a", 0)}), "item 3 of the training data hold a str, which is no array of numbers"),
        (Items(X, Y, {3: (X[0], -1)}), "the training data have the label -1: number the classes from 0 on"),
        (Items(X, Y, {3: (X[0], 999)}), "20 training samples have labels up to 999: number the classes from 0 on"),
        ((Items(X, Y), Items(X, Y + 1)), r"the test data have the label 2, outside 0 \.\. 1"),
        (Random(X, Y), "item 0 of the training data differs when it is read again: draw no random numbers"),
        (Growing(X, Y), "the training data had 19 items, and then 20: let the length stay"),
        (Short(X, Y), "item 20 of the training data is missing, though the length is 21: correct __len__"),
        (Raising(X, Y), r"item 0 of the training data fails with OSError: no such picture \(.*line \d+\)"),
        (Items(X[:0], Y[:0]), "the training data are empty"),
        (iter([1]), "the training data are of type list_iterator, which has no length"),
        (7, "the training data are of type int, which holds no samples: give a torch Dataset"),
        ((X, Y, X), r"data is a tuple of 3 \(Tensor, Tensor, Tensor\): give a torch Dataset"),
        ({"train": X}, r"data has the keys \['train'\]: give 'train' and 'test'"),
        ((X, Y[:5], X, Y), "the training data have 20 samples but 5 labels: give one for each"),
        ((X, Y.float(), X, Y), "the labels of the training data are of type torch.float32"),
        ((X, Y, X[:, :, :2], Y), "training images of type .*but test images of type"),
        ((X / 0, Y, X, Y), "a pixel that is not finite"),
        ((X[:2], Y[:2]), "2 samples are too few to take some for testing"),
        (Items, "data is the class Items: give a torch Dataset"),
    ],
)
def test_data_that_are_refused(tmp_path: Path, given: Any, sentence: str) -> None:
    with pytest.raises(GossamerError, match=sentence):
        run(tmp_path / "run", data=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (7, "model is a int: give a name, a torch.nn.Module class"),
        (Net((1, 8, 8), 7), r"returns \(3, 7\).*return one tensor of logits, here \(3, 10\)"),
        (lambda: 3, "workload.model 'object:<lambda>' is a int without"),
        (lambda hidden: hidden, "workload.model does not take these options: missing a required argument: 'hidden'"),
        ({"name": "object:Net"}, "model 'object:Net' was given in Python as an object, which no file holds"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, model: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "run", model=model)


FULL = [list(range(start, 150, 8)) for start in range(8)]


class TestPartitions:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ([*FULL[:7], [7, 150]], r"uses sample 150, which is outside 0 \.\. 149"),
            ([*FULL[:7], [7, 0]], "uses sample 0 2 times: use each of 150 samples once"),
            ([*FULL[:7], []], "gives client 7 0 samples, fewer than 1: lower the number of clients"),
            ({"indices": [*FULL[:7], []], "partial": True}, "gives client 7 0 samples, fewer than 1"),
            ({"indices": [*FULL[:7], [7, 0]], "partial": True}, "uses sample 0 2 times"),
            ({"indices": FULL, "partly": True}, r"partition has the keys \['partly'\]"),
            ([*FULL[:7], FULL[7][1:]], "uses sample 7 0 times: use each of 150 samples once, or say that some"),
            ([*FULL[:7], [0.5]], r"gives client 7 \[0\.5\]: give a list of sample numbers"),
            ([*FULL[:7], 7], "gives client 7 7: give a list of sample numbers"),
            ({0: FULL[0], 2: FULL[1]}, "has 2 clients, but none of number 1: number them from 0 on"),
            (FULL[:7], "made 7 clients instead of 8"),
            ([], r"holds \[\]: give a list"),
            (7, "is a int: give a list with the list of sample numbers of each client"),
        ],
    )
    def test_that_are_refused(self, tmp_path: Path, given: Any, sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            run(tmp_path / "run", partition=given)

    def test_in_every_form(self, tmp_path: Path) -> None:
        path = tmp_path / "lists.json"
        path.write_text(json.dumps({str(client): one for client, one in reversed(list(enumerate(FULL)))}))
        table = tmp_path / "table.csv"
        table.write_text(
            "sample,client\n" + "".join(f"{one},{client}\n" for client in range(8) for one in FULL[client])
        )
        forms: list[Any] = [FULL, dict(enumerate(FULL)), [np.array(one) for one in FULL], {"indices": FULL}]
        forms += [{"name": "file", "path": str(one)} for one in (path, table)]
        runs = [run(tmp_path / f"run-{number}", partition=one) for number, one in enumerate(forms)]
        for one in runs[1:]:
            assert_same(runs[0], one)

    def test_partial_ones_train_on_what_is_held_alone(self, tmp_path: Path, data: ImageData) -> None:
        held = {"indices": [one[:4] for one in FULL], "partial": True}
        other = ImageData(
            "other", data.train_images.clone(), data.train_labels, data.test_images, data.test_labels, 10,
            mean=data.mean, std=data.std,
        )  # fmt: skip
        other.train_images[32:] = 0  # which nobody holds
        model = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))  # noqa: E731
        runs = [
            run(tmp_path / name, data=one, partition=held, model=model) for name, one in (("a", data), ("b", other))
        ]
        assert_same(*runs)


class TestResume:
    def test_takes_the_same_objects(self, tmp_path: Path, data: ImageData) -> None:
        net = Net((1, 8, 8), 10)
        objects: dict[str, Any] = {"model": net, "data": pairs(data), "partition": FULL}
        whole = run(tmp_path / "whole", **objects)
        first = run(tmp_path / "run", **objects, on_round=lambda record: record["round"] == 1)
        assert len(first.metrics) == 1
        other = Net((1, 8, 8), 10)
        for wrong, sentence in (
            ({"model": other}, "model 'object:Net' is not the object that the run began with"),
            ({"data": (X, Y, X, Y)}, "data 'object:data' is not the object that the run began with"),
            ({"partition": FULL[::-1]}, "partition 'object:partition' is not the object that the run began with"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                gossamer.resume(first.directory, **objects | wrong)
        with pytest.raises(RegistryError, match="was given in Python as an object"):
            gossamer.resume(first.directory)
        assert_same(whole, gossamer.resume(first.directory, **objects))

    def test_at_the_command_line_it_is_refused(self, tmp_path: Path) -> None:
        run(tmp_path / "run", model=Net((1, 8, 8), 10), on_round=lambda record: True)
        done = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
        assert done.exit_code == 2
        assert "error: model 'object:Net' was given in Python as an object, which no file holds" in done.output


class TestCallbacks:
    def test_get_every_record_and_may_end_a_run(self, tmp_path: Path) -> None:
        seen: list[int] = []
        whole = run(tmp_path / "whole", rounds=3, on_round=lambda record: seen.append(record["round"]))
        short = run(tmp_path / "short", rounds=3, seeds=[0, 1], on_round=lambda record: record["round"] == 2)
        assert seen == [1, 2, 3]
        assert [len(one.metrics) for one in short.runs] == [2, 2]
        assert_same(whole, gossamer.resume(tmp_path / "short").runs[0])

    def test_what_they_raise_comes_after_a_commit(self, tmp_path: Path) -> None:
        def fail(record: Mapping[str, Any]) -> None:
            raise KeyError(record["round"])

        slow = {"checkpoint": {"every_seconds": 1000}}
        with pytest.raises(KeyError, match="1"):
            run(tmp_path / "run", seeds=[0, 1], on_round=fail, **slow)
        assert (tmp_path / "run" / "seed-1" / "metrics.jsonl").read_text() == ""
        whole = [run(tmp_path / f"whole-{seed}", seed=seed) for seed in (0, 1)]
        for one, other in zip(whole, gossamer.resume(tmp_path / "run").runs, strict=True):
            assert_same(one, other)

    def test_progress_is_a_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(tmp_path / "run", progress=True)
        assert "test: 2 rounds in 0:00:0" in capsys.readouterr().out.splitlines()[-1]


def test_a_number_of_clients_who_all_take_part(tmp_path: Path) -> None:
    one = run(tmp_path / "one", clients={"num": 8, "per_round": 8})
    assert_same(one, run(tmp_path / "other", clients=8))


def test_peers_may_end_a_run(tmp_path: Path) -> None:
    setting: dict[str, Any] = {"peers": {"num": 4, "topology": "ring"}, "train": {"lr": 0.1}, "data": "digits"}
    setting |= {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "engine": {"workers": 0}}
    whole = gossamer.run(rounds=2, out=tmp_path / "whole", **setting)
    short = gossamer.run(rounds=2, out=tmp_path / "short", on_round=lambda record: True, **setting)
    assert [len(one.metrics) for one in (whole, short)] == [2, 1]
    assert_same(whole, gossamer.resume(short.directory, model=setting["model"]))


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'round'; did you mean 'rounds'"):
        run(tmp_path / "run", round=3)


SCRIPT = """
import asyncio, sys, threading
import torch
from torch import nn
import gossamer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))

found = {}

def train(name):
    run = gossamer.run(
        rounds=2, clients={"num": 8, "per_round": 4}, train={"lr": 0.1}, model=Net, data={"name": "synthetic"},
        engine={"workers": 2}, out=f"{sys.argv[1]}/{name}",
    )
    found[name] = run.params["layer.weight"]

async def notebook():
    train("loop")

train("script")
thread = threading.Thread(target=train, args=("thread",))
thread.start()
thread.join()
asyncio.run(notebook())
assert len(found) == 3 and all(torch.equal(found["script"], one) for one in found.values())
"""


def test_a_script_without_a_guard_a_thread_and_a_running_loop(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_config(tmp_path / "runs" / "thread")["workload"]["model"]["name"] == "object:Net"


def test_ray_refuses_what_its_actors_cannot_import(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"model 'object:Net' is an object .* put it into a file, such as mine\.py"):
        run(tmp_path / "run", model=Net((1, 8, 8), 10), engine={"name": "ray"})
    with pytest.raises(ConfigError, match=r"partition 'object:partition' is an object .* into a JSON file"):
        run(tmp_path / "run", model=Net, partition=FULL, engine={"name": "ray"})
    monkeypatch.setattr(samples, "SMALL_BYTES", 100)
    with pytest.raises(ConfigError, match="data 'object:data' are read while training from an object of this process"):
        run(tmp_path / "run", model=Net, data=pairs(data), engine={"name": "ray"})


@pytest.mark.usefixtures("one_ray")
def test_ray_trains_what_can_be_imported_on_data_in_memory(tmp_path: Path, data: ImageData) -> None:
    """Arrays go to the actors through Ray's object store, a class of a module by its name, lists in a file."""
    (tmp_path / "parts.json").write_text(json.dumps(FULL))
    parts = {"name": "file", "path": str(tmp_path / "parts.json")}
    objects: dict[str, Any] = {"model": Net, "data": pairs(data), "partition": parts}
    ray = BASE["engine"] | {"name": "ray", "workers": 2}
    assert_same(run(tmp_path / "local", **objects), run(tmp_path / "ray", **objects, engine=ray))


def test_a_stop_that_was_asked_for_is_no_end(tmp_path: Path) -> None:
    import os
    import signal

    def stop(record: Mapping[str, Any]) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(Interrupted, match="resume with"):
        run(tmp_path / "run", on_round=stop)
