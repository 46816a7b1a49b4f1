"""The workload: batches, losses, static BatchNorm, global and local evaluation, each against a slow version."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import ConfigError, DataError, RegistryError
from gossamer.testing import check_workload
from gossamer.workloads import label_sets
from gossamer.workloads.augment import crop_flip
from gossamer.workloads.base import ForwardContext, Workload, add_sums
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.label_sets import LabelSets, beaten_by
from gossamer.workloads.partitions import Partition

SYNTHETIC = {"name": "synthetic", "num_train": 120, "num_test": 50, "num_labels": 5, "shape": [2, 8, 8], "noise": 2.0}
RESNET = {"name": "preact-resnet18", "width": 0.0625}
needs_data = pytest.mark.skipif(not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA names no folder with mnist")


def build(num_clients: int = 6, partition: Any = "iid", seed: int = 0, **options: Any) -> ImageClassification:
    chosen = {"dataset": SYNTHETIC, "model": {"name": "mlp", "hidden": [16]}} | options
    return ImageClassification(chosen, num_clients=num_clients, partition=partition, seed=seed)


def params_of(workload: ImageClassification, seed: int = 0) -> dict[str, Tensor]:
    return workload.layout.views(workload.init(seed))


def all_statistics(workload: ImageClassification, params: dict[str, Tensor]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for chunk in range(workload.num_statistics_chunks):
        for name, value in workload.statistics(params, chunk).items():
            total[name] = total.get(name, torch.zeros(())) + value
    return total


def measured(workload: ImageClassification, params: dict[str, Tensor]) -> dict[str, float]:
    statistics = all_statistics(workload, params)
    chunks = range(workload.num_evaluation_chunks)
    return workload.metrics(add_sums([workload.evaluate(params, statistics, chunk) for chunk in chunks]))


def plug_in_data(options: dict[str, Any]) -> ImageData:
    """A user's data set: three owners of black images, or a wrong answer."""
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    labels, owner = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([7, 7, 3, 3, 3, 5])
    return ImageData("mine", images, labels, images, labels, 2, owner=owner) if options["right"] else None  # type: ignore


def faulty_partition(labels: Any, num_clients: int, num_labels: int, seed: int, owner: Any, *, lose: int) -> Partition:
    """A user's partition that loses samples."""
    return Partition.of_lists([range(len(labels) - lose)])


def test_it_is_a_workload() -> None:
    workload: Workload = build()
    assert workload.num_samples.tolist() == [20] * 6
    assert (workload.num_clients, workload.num_labels, workload.traits.has_images) == (6, 5, False)
    assert (workload.traits.supports_padding, workload.traits.supports_stacking) == (True, True)
    assert workload.num_statistics_chunks == 0
    assert workload.layout.num_parameters == 128 * 16 + 16 + 16 * 5 + 5
    assert torch.equal(workload.init(3), workload.init(3))
    assert not torch.equal(workload.init(3), workload.init(4))
    mixing = build(model=RESNET)
    assert (mixing.traits.supports_padding, mixing.traits.has_images, mixing.num_statistics_chunks) == (False, True, 1)


def test_a_batch_holds_the_clients_samples_normalised() -> None:
    workload = build(dataset="digits", partition={"name": "n-classes", "n": 2}, num_clients=20)
    clients, positions = np.array([3, 0, 19]), np.array([[0, 5, 2], [1, 1, 0], [9, 8, 7]])
    batch = workload.batch(clients, positions)
    assert set(batch.samples) == {"x", "y"}
    data = workload.data
    for i, client in enumerate(clients):
        samples = workload.partition.of_client(int(client))
        held = torch.zeros(10, dtype=torch.bool)
        held[data.train_labels[samples]] = True
        assert torch.equal(batch.client["labels"][i], held)
        assert held.sum() == 2
        for j, position in enumerate(positions[i]):
            pixels = data.train_images[samples[position]].double()
            assert torch.allclose(batch.samples["x"][i, j].double(), (pixels - data.mean[0]) / data.std[0], atol=1e-5)
            assert batch.samples["y"][i, j] == data.train_labels[samples[position]]
    assert torch.equal(workload.client_labels(clients), batch.client["labels"])
    everything = workload._normalised(data.train_images)
    assert everything.mean().item() == pytest.approx(0, abs=1e-5)
    assert everything.std().item() == pytest.approx(1, abs=1e-3)


def test_channels_are_normalised_each_by_its_own() -> None:
    workload = build()
    normal = workload._normalised(workload.data.train_images)
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(normal.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4)
    assert not torch.equal(normal, workload.data.train_images)


def test_padding_is_blank_and_masked() -> None:
    workload = build()
    batch = workload.batch(np.array([1, 2]), np.array([[0, 1, -1], [4, -1, -1]]))
    assert batch.samples["mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch.samples["mask"].dtype == torch.float32
    assert batch.samples["y"].dtype == torch.int64
    absent = batch.samples["mask"] == 0
    assert not batch.samples["x"][absent].any()
    assert not batch.samples["y"][absent].any()
    full = workload.batch(np.array([1]), np.array([[0, 1]]))
    assert torch.equal(full.samples["x"][0], batch.samples["x"][0, :2])


def test_positions_of_other_clients_are_out_of_reach() -> None:
    workload = build()
    workload.batch(np.array([0]), np.array([[19]]))
    with pytest.raises(IndexError, match=r"\[20\] of clients \[0\]"):
        workload.batch(np.array([0]), np.array([[20]]))


def one_client(workload: ImageClassification, client: int, positions: list[int]) -> dict[str, Any]:
    batch = workload.batch(np.array([client]), np.array([positions]))
    return {name: value[0] for name, value in (batch.samples | batch.client).items()}


def slow_loss(logits: Tensor, labels: Tensor, held: Tensor, kind: str) -> float:
    """Mean cross entropy, sample by sample and class by class."""
    total = 0.0
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        kept = {}
        for c, value in enumerate(row):
            if held[c] or kind == "none":
                kept[c] = value
            elif kind == "zero":
                kept[c] = 0.0
        total -= kept[label] - np.log(sum(np.exp(value) for value in kept.values()))
    return total / len(labels)


@pytest.mark.parametrize("kind", ["none", "zero", "minus-inf"])
def test_label_masks_equal_slow_versions(kind: str) -> None:
    workload = build(label_mask=kind, partition={"name": "n-classes", "n": 2}, model={"name": "mlp", "hidden": [16]})
    params = {name: 3 * value for name, value in params_of(workload).items()}
    for client in range(3):
        batch = one_client(workload, client, list(range(10)))
        expected = slow_loss(workload.model.apply(params, batch["x"]), batch["y"], batch["labels"], kind)
        assert workload.loss(params, batch).item() == pytest.approx(expected, rel=1e-5)


def gradients(workload: ImageClassification, params: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    loss = workload.loss(leaves, batch)
    return (loss.detach(), *torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("kind", ["none", "zero", "minus-inf"])
@pytest.mark.parametrize("model", ["softmax", {"name": "mlp", "hidden": [16]}, {"name": "cnn", "width": 0.1}])
def test_padding_equals_no_padding(kind: str, model: Any) -> None:
    """Also where class 0, which pads, is not one of the client's."""
    workload = build(label_mask=kind, partition={"name": "n-classes", "n": 2}, model=model)
    client = int(np.flatnonzero(workload._histogram[:, 0] == 0)[0])
    params = params_of(workload)
    full, padded = one_client(workload, client, [4, 0, 7]), one_client(workload, client, [4, -1, 0, 7, -1])
    for a, b in zip(gradients(workload, params, full), gradients(workload, params, padded), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    ones = gradients(workload, params, full | {"mask": torch.ones(3)})
    for a, b in zip(gradients(workload, params, full), ones, strict=True):
        assert torch.equal(a, b)  # whether a block pads must not change the bits of those that do not
    for value in gradients(workload, params, one_client(workload, client, [-1, -1])):
        assert not value.any()


@pytest.mark.parametrize("kind", ["none", "zero", "minus-inf"])
def test_stacked_losses_equal_single_ones(kind: str) -> None:
    workload = build(label_mask=kind, partition={"name": "n-classes", "n": 2})
    clients = np.array([0, 1, 2])
    positions = np.array([[0, 1, 2, 3], [5, 4, -1, -1], [9, 8, 7, -1]])
    batch = workload.batch(clients, positions)
    rows = torch.stack([workload.init(seed) for seed in range(3)])
    leaves = {name: view.detach().requires_grad_() for name, view in workload.layout.views(rows).items()}
    losses = torch.vmap(lambda p, b: workload.loss(p, b | {"scale": 2.0}))(leaves, batch.samples | batch.client)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    for i in range(3):
        alone = {name: value[i] for name, value in (batch.samples | batch.client).items()} | {"scale": 2.0}
        expected = gradients(workload, workload.layout.views(rows[i]), alone)
        assert torch.allclose(losses[i], expected[0], atol=1e-6)
        for grad, value in zip(grads, expected[1:], strict=True):
            assert torch.allclose(grad[i], value, atol=1e-6)


def test_scale_reaches_the_model() -> None:
    workload = build()
    params, batch = params_of(workload), one_client(workload, 0, [0, 1, 2])
    expected = F.cross_entropy(workload.model.apply(params, batch["x"], ForwardContext(scale=4.0)), batch["y"])
    assert workload.loss(params, batch | {"scale": 4.0}).item() == pytest.approx(expected.item(), rel=1e-6)
    assert workload.loss(params, batch).item() != pytest.approx(expected.item(), rel=1e-3)


def test_a_model_learns() -> None:
    workload = build(dataset="digits", num_clients=1, model="softmax")
    params = {name: value.clone().requires_grad_() for name, value in params_of(workload).items()}
    before = measured(workload, params)["accuracy"]
    batch = one_client(workload, 0, list(range(600)))
    for _ in range(60):
        for value, grad in zip(
            params.values(), torch.autograd.grad(workload.loss(params, batch), list(params.values())), strict=True
        ):
            value.data -= 0.3 * grad
    assert before < 0.4
    assert measured(workload, params)["accuracy"] > 0.85


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "cnn", "width": 0.1}, RESNET])
def test_metrics_do_not_depend_on_the_chunks(model: Any) -> None:
    expected = None
    for chunk in (50, 17, 7):
        workload = build(partition={"name": "n-classes", "n": 3}, model=model, evaluation_chunk=chunk)
        assert workload.num_evaluation_chunks == -(-50 // chunk)
        found = measured(workload, params_of(workload))
        assert list(found) == ["accuracy", "loss", "local_accuracy", "worst_client_accuracy"]
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-5)


def test_static_statistics_free_a_sample_from_its_batch() -> None:
    workload = build(model=RESNET, statistics_chunk=50)
    params = params_of(workload)
    statistics = all_statistics(workload, params)
    assert workload.num_statistics_chunks == 3
    assert statistics["norm.count"] == 120  # one pixel is left of 8 x 8
    assert statistics["stage0.block0.norm0.count"] == 120 * 64
    x = workload._normalised(workload.data.test_images)
    together = workload.model.apply(params, x, ForwardContext(statistics=statistics))
    alone = torch.cat(
        [workload.model.apply(params, x[i : i + 1], ForwardContext(statistics=statistics)) for i in (4, 0, 9)]
    )
    assert torch.allclose(together[[4, 0, 9]], alone, atol=1e-5)
    assert not torch.allclose(workload.model.apply(params, x)[:3], workload.model.apply(params, x[:3]), atol=1e-2)


def slow_metrics(workload: ImageClassification, logits: Tensor) -> dict[str, float]:
    """Client by client: restrict the argmax to its classes, weigh each class by its share of the training data."""
    data, local = workload.data, []
    labels = data.test_labels.numpy()
    for client in range(workload.num_clients):
        mine = data.train_labels.numpy()[workload.partition.of_client(client)]
        held, accuracy, weight = sorted(set(mine.tolist())), 0.0, 0.0
        for label in held:
            tested = np.flatnonzero(labels == label)
            if len(tested) == 0:
                continue
            right = np.mean([held[int(logits[i][held].argmax())] == label for i in tested])
            accuracy += right * np.mean(mine == label)
            weight += np.mean(mine == label)
        if weight:
            local.append(accuracy / weight)
    return {
        "accuracy": float((logits.argmax(1) == data.test_labels).double().mean()),
        "loss": F.cross_entropy(logits.double(), data.test_labels).item(),
        "local_accuracy": float(np.mean(local)),
        "worst_client_accuracy": float(np.min(local)),
    }


@pytest.mark.parametrize("partition", ["iid", {"name": "n-classes", "n": 2}, {"name": "dirichlet", "alpha": 0.3}])
@pytest.mark.parametrize(("num_test", "model"), [(50, "softmax"), (3, "softmax"), (50, {"name": "cnn", "width": 0.1})])
def test_metrics_equal_a_slow_version(partition: Any, num_test: int, model: Any) -> None:
    """With three test samples, classes 3 and 4 are never tested, and clients of these alone do not count."""
    workload = build(10, partition, dataset=SYNTHETIC | {"num_test": num_test}, model=model, evaluation_chunk=20)
    params = params_of(workload)
    logits = workload.model.apply(params, workload._normalised(workload.data.test_images))
    assert measured(workload, params) == pytest.approx(slow_metrics(workload, logits), rel=1e-5)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_sets_are_counted_as_an_argmax_would(num_labels: int, count: int, seed: int) -> None:
    """With ties, which the lower class wins."""
    source = np.random.default_rng(seed)
    logits = torch.from_numpy(source.integers(-2, 3, (count, num_labels)).astype(np.float32))
    labels = torch.from_numpy(source.integers(0, num_labels, count))
    histogram = source.integers(0, 2, (5, num_labels)).astype(np.int32)
    histogram[:, 0] += histogram.sum(axis=1) == 0
    beaten = beaten_by(logits, labels)
    first_best = np.array([int(np.argmax(row)) for row in logits.numpy()])
    assert (~beaten).all(1).tolist() == (first_best == labels.numpy()).tolist()
    sets = LabelSets.of(histogram)
    assert sets is not None
    counted = sets.correct(beaten, labels)
    for client in range(5):
        expected: NDArray[np.float64] = np.zeros(num_labels)
        held = np.flatnonzero(histogram[client])
        for row, label in zip(logits.numpy(), labels.tolist(), strict=True):
            expected[label] += label in held and held[int(np.argmax(row[held]))] == label
        assert counted[sets.set_of_client[client]].tolist() == expected.tolist()


def test_a_model_of_nan_is_never_right() -> None:
    assert not (~beaten_by(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 3]))).all(1).any()


def test_too_many_label_sets_drop_local_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"partition": {"name": "n-classes", "n": 2}, "num_clients": 10}
    assert "local_accuracy" in measured(build(**options), params_of(build(**options)))
    assert build(**options).warnings == ()
    monkeypatch.setattr(label_sets, "MAX_COUNTS", 2)
    few = build(**options)
    assert list(measured(few, params_of(few))) == ["accuracy", "loss"]
    assert few.warnings[0].startswith("local_accuracy and worst_client_accuracy are not measured")
    off = build(local_evaluation=False)
    assert list(measured(off, params_of(off))) == ["accuracy", "loss"]
    assert off.warnings == ()


def test_a_width_of_a_model_without_any_is_warned_of() -> None:
    (warning,) = build(model={"name": "softmax", "width": 0.5}).warnings
    assert warning == "workload.model.width changes nothing, because model 'softmax' has no hidden width"
    assert build(model={"name": "cnn", "width": 0.5}).warnings == ()


def test_a_chunk_of_statistics_that_no_layer_asks_for_is_warned_of() -> None:
    assert build(model=RESNET, statistics_chunk=50).warnings == ()
    (warning,) = build(statistics_chunk=50).warnings
    assert warning.startswith("workload.statistics_chunk changes nothing, because the model has no BatchNorm")


@pytest.mark.parametrize("at_a_time", [1, 3, 512])
def test_label_sets_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    source = np.random.default_rng(0)
    sets = LabelSets.of(source.integers(0, 2, (20, 6)).astype(np.int32))
    assert sets is not None
    logits, labels = torch.from_numpy(source.normal(size=(50, 6))), torch.from_numpy(source.integers(0, 6, 50))
    expected = sets.correct(beaten_by(logits, labels), labels)
    monkeypatch.setattr(label_sets, "SETS_AT_A_TIME", at_a_time)
    assert np.array_equal(sets.correct(beaten_by(logits, labels), labels), expected)


def test_augmentation_is_addressed() -> None:
    workload = build(augment="crop-flip")
    clients, positions = np.array([0, 1]), np.arange(20)[None].repeat(2, axis=0)
    first = workload.batch(clients, positions, round=3).samples["x"]
    assert torch.equal(first, workload.batch(clients, positions, round=3).samples["x"])
    assert not torch.equal(first, workload.batch(clients, positions, round=4).samples["x"])
    swapped = workload.batch(clients[::-1].copy(), positions[:, 5:9], round=3).samples["x"]
    assert torch.equal(swapped[1], first[0, 5:9])  # neither the block nor the order in it matters
    assert not torch.equal(first, build().batch(clients, positions).samples["x"])
    assert not torch.equal(first, build(augment="crop-flip", seed=1).batch(clients, positions, round=3).samples["x"])


def test_crop_and_flip_are_what_they_say() -> None:
    images = torch.arange(1, 1 + 2 * 6 * 5, dtype=torch.uint8).view(1, 2, 6, 5).repeat(300, 1, 1, 1)
    changed = crop_flip(images, np.arange(300), 0, 0)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    padded = F.pad(images[0], (4, 4, 4, 4))
    windows = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 6, left : left + 5]
            windows[crop.numpy().tobytes()] = (top, left, False)
            windows[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    drawn = [windows[image.numpy().tobytes()] for image in changed]
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert len({(top, left) for top, left, _ in drawn}) > 60  # both are drawn, each on its own
    assert 100 < sum(flip for _, _, flip in drawn) < 200


def test_plug_ins_are_named_by_their_place() -> None:
    data = {"name": f"{__name__}:plug_in_data", "right": True}
    workload = build(3, "natural-id", dataset=data, model="gossamer.workloads.models:Softmax")
    assert workload.num_samples.tolist() == [3, 1, 2]
    with pytest.raises(DataError, match="returned NoneType"):
        build(3, "iid", dataset=data | {"right": False})
    partition = {"name": f"{__name__}:faulty_partition", "lose": 2}
    with pytest.raises(DataError, match="faulty_partition' uses sample 118 0 times"):
        build(1, partition)
    with pytest.raises(ConfigError, match=r"partition does not take these options: .*'loose'"):
        build(1, partition | {"loose": 2})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modle": "mlp"}, ConfigError, r"workload\.modle'; did you mean 'model'"),
        ({"model": {"name": "mlp", "hiden": [3]}}, ConfigError, "did you mean 'hidden'"),
        ({"model": "mpl"}, RegistryError, "did you mean 'mlp'"),
        ({"model": {"width": 0.5}}, ConfigError, r"workload\.model = .* has no name"),
        ({"dataset": {"name": "digits", "limits": 3}}, ConfigError, "did you mean 'limit'"),
        ({"label_mask": "inf"}, ConfigError, r"workload\.label_mask = 'inf'"),
        ({"evaluation_chunk": 0}, ConfigError, r"workload\.evaluation_chunk = 0"),
        ({"partition": {"name": "iid", "alpha": 1}}, ConfigError, r"unknown key 'partition\.alpha'"),
        ({"partition": {"nam": "iid"}}, ConfigError, "has no name"),
        ({"num_clients": 121}, DataError, "120 training samples cannot give 121 clients"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**options)


@needs_data
@pytest.mark.usefixtures("decoded_once")
def test_real_images_are_divided_and_evaluated() -> None:
    workload = build(100, {"name": "n-classes", "n": 2}, dataset={"name": "mnist", "limit": 2000}, model="mlp")
    assert workload.num_samples.sum() == 2000
    assert (workload.client_labels(np.arange(100)).sum(1) == 2).all()
    found = measured(workload, params_of(workload))
    assert found["accuracy"] < 0.3 < found["local_accuracy"] < 0.8


def test_validation_data_are_held_out_and_named() -> None:
    whole, some = build(), build(validation=0.2)
    assert len(some.data.test_labels) + len(some.data.train_labels) == len(whole.data.train_labels)
    assert int(some.num_samples.sum()) == len(some.data.train_labels)
    params = params_of(some)
    assert measured(some, params).keys() == {f"validation_{name}" for name in measured(whole, params)}
    logits = some.model.apply(params, some._forward_only(some.data.test_images))
    expected = float((logits.argmax(1) == some.data.test_labels).double().mean())
    assert measured(some, params)["validation_accuracy"] == pytest.approx(expected)
    shared = ImageClassification(  # what another process loaded is held out already
        {"dataset": SYNTHETIC, "model": {"name": "mlp", "hidden": [16]}, "validation": 0.2},
        num_clients=6,
        partition="iid",
        seed=0,
        data=some.data,
    )
    assert shared.digest() == some.digest() != whole.digest()
    check_workload(some)
