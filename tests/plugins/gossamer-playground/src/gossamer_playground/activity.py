"""What somebody does, and at what pace, from an accelerometer, a gyroscope and a note; clients carry some of these."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.options import Options, parse_options
from gossamer.submodel import Layout
from gossamer.workloads.base import Batch, Params, Sums, Workload
from gossamer.workloads.digests import digest_of
from gossamer.workloads.holdings import Holding, assigned
from gossamer.workloads.models import default_init
from gossamer.workloads.multimodal.modalities import missing_rates, parse_shares, presence
from gossamer.workloads.partitions import divide
from gossamer.workloads.traits import WorkloadTraits

Ints = NDArray[np.int64]
ACTIVITIES = ("still", "walking", "running")
MODALITIES = ("acceleration", "rotation", "note")
SENSORS, TASKS = MODALITIES[:2], ("activity", "pace")
CHANNELS, TIMES, NUM_WORDS, NOTE_LENGTH = 3, 16, 9, 4


class ActivityOptions(Options):
    """Options of `Activity`.

    Attributes:
        num_train, num_test: samples.
        hidden: width of each modality's encoder.
        shared: width of what all modalities are added up to.
        modalities: ``{names joined by +: share of the clients that have these}``.
        missing: probability that a sample lacks a modality that its client has: one number, or one for each.
    """

    num_train: int = Field(240, ge=1)
    num_test: int = Field(90, ge=1)
    hidden: int = Field(16, ge=1)
    shared: int = Field(12, ge=1)
    modalities: dict[str, float] = {"+".join(MODALITIES): 1.0}
    missing: float | dict[str, float] = 0.0


class Activity(Workload):
    """Two tasks by three modalities, each a module, and added up as far as a client and its sample have them."""

    Options = ActivityOptions
    traits = WorkloadTraits()

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str = "iid",
        seed: int = 0,
    ) -> None:
        """Make and divide the data, lay out the model, and draw who has what."""
        self.options = parse_options(ActivityOptions, options, "workload")
        self.num_clients = num_clients
        self._train = samples("train", self.options.num_train)
        self._test = samples("test", self.options.num_test)
        self.partition = divide(partition, num_clients, seed, self._train["activity"].numpy(), len(ACTIVITIES))
        self.num_samples = self.partition.num_samples
        self._shapes, axes = model(self.options.hidden, self.options.shared)
        self.layout = Layout.of(self._shapes, axes)
        kinds = parse_shares(self.options.modalities, MODALITIES, "workload.modalities")
        self.kind = assigned(kinds.shares.tolist(), num_clients, seed, "assign-modalities")
        self.held = [[name for name, has in zip(MODALITIES, row, strict=True) if has] for row in kinds.holds]
        self.holdings = tuple(
            Holding(name, frozenset([*held, *TASKS])) for name, held in zip(kinds.names, self.held, strict=True)
        )
        rates = missing_rates(self.options.missing, MODALITIES, "workload.missing")
        everything = np.ones((len(self._train["pace"]), len(MODALITIES)), dtype=bool)
        self._present = torch.from_numpy(presence(everything, rates, seed, "missing")).float()

    def init(self, seed: int) -> Tensor:
        """Return initial parameters, [d]."""
        return self.layout.flatten(default_init(self._shapes, rng.generator(seed, "init-activity")))

    def digest(self) -> str:
        """Return a digest of the data, their partition, and who has what."""
        return digest_of(self._train, self._test, self.partition, self.kind.astype(np.int64), self._present)

    def client_holdings(self, clients: Ints) -> NDArray[np.int16]:
        """Return which of `holdings` each client holds."""
        return self.kind[clients]

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Return the modalities that these clients have, ``"has_<modality>"`` [s, m] of each, and both targets."""
        held, padding = self.held[self.kind[clients[0]]], positions < 0
        places = self.partition.offsets[clients][:, None] + np.maximum(positions, 0)
        rows = torch.from_numpy(self.partition.indices[places])
        found = {name: self._train[name][rows] for name in (*held, *TASKS)}
        found |= {f"has_{name}": self._present[rows][..., MODALITIES.index(name)] for name in held}
        return Batch(found | ({"mask": torch.from_numpy(~padding).float()} if padding.any() else {}), {})

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean cross-entropy of activities plus the mean squared error of paces.

        Samples that lack every modality count in neither.
        """
        held = [name for name in MODALITIES if name in batch]
        weights = torch.stack([batch[f"has_{name}"] for name in held]).amax(0)
        if "mask" in batch:
            weights = weights * batch["mask"]
        found = predict(params, batch, held)
        each = F.cross_entropy(found["activity"], batch["activity"], reduction="none")
        each = each + (found["pace"][..., 0] - batch["pace"]).square()
        return (each * weights).sum() / weights.sum().clamp_min(1)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over the test data, with all modalities and without each of them."""
        test, found = self._test, {"count": float(len(self._test["pace"]))}
        known = [name for name in MODALITIES if f"{name}.input.weight" in params]
        for lacking in ("", *(known if len(known) > 1 else ())):  # without the only one, nothing can be told
            given = predict(params, test, [name for name in known if name != lacking])
            where = f"without_{lacking}" if lacking else "with_all"
            right = given["activity"].argmax(-1) == test["activity"]
            found[f"right_{where}"] = float(right.sum())
            found[f"loss_{where}"] = float(F.cross_entropy(given["activity"], test["activity"], reduction="sum"))
            found[f"squares_{where}"] = float((given["pace"][..., 0] - test["pace"]).square().sum())
        return {name: np.array([value]) for name, value in found.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return loss, accuracy and mean squared error, and the latter two without each modality."""
        mean = {name: float(value[0] / sums["count"][0]) for name, value in sums.items()}
        found = {"loss": mean["loss_with_all"] + mean["squares_with_all"]}
        for name in mean:
            kind, _, where = name.partition("_")
            if kind in ("right", "squares"):
                metric = "accuracy" if kind == "right" else "pace_error"
                found[metric + ("" if where == "with_all" else f"_{where}")] = mean[name]
        return found


def samples(split: str, count: int) -> dict[str, Tensor]:
    """Return sensors float32 [count, 3, 16], notes int64 [count, 4], and activities and paces.

    Whoever walks swings once in the time, whoever runs thrice; words 3 a to 3 a + 2 are likelier of activity a.
    """
    source = rng.generator(0, f"activity-{split}")
    activity, pace = source.integers(len(ACTIVITIES), size=count), source.uniform(0.5, 1.5, size=count)
    swings = np.array([0, 1, 3])[activity] * pace
    found = {"activity": torch.from_numpy(activity), "pace": torch.from_numpy(pace.astype(np.float32))}
    for name in SENSORS:
        phase = source.uniform(0, 2 * np.pi, size=(count, CHANNELS, 1))
        wave = np.sin(2 * np.pi * swings[:, None, None] * np.linspace(0, 1, TIMES) + 0.2 * phase)
        found[name] = torch.from_numpy((wave + 0.3 * source.normal(size=wave.shape)).astype(np.float32))
    words = activity[:, None] * 3 + source.integers(3, size=(count, NOTE_LENGTH))
    is_other = source.random(words.shape) < 0.3
    found["note"] = torch.from_numpy(np.where(is_other, source.integers(NUM_WORDS, size=words.shape), words))
    return found


def model(hidden: int, shared: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str | None, ...]]]:
    """Return shapes and axes: an encoder a modality, each with a width of its own, and a head a task."""
    shapes, axes = dict[str, tuple[int, ...]](), dict[str, tuple[str | None, ...]]()
    for name in MODALITIES:
        if name in SENSORS:
            shapes[f"{name}.input.weight"], axes[f"{name}.input.weight"] = (hidden, CHANNELS * TIMES), (name, None)
        else:
            shapes[f"{name}.input.weight"], axes[f"{name}.input.weight"] = (NUM_WORDS, hidden), (None, name)
        shapes[f"{name}.output.weight"], axes[f"{name}.output.weight"] = (shared, hidden), ("shared", name)
    for task, size in zip(TASKS, (len(ACTIVITIES), 1), strict=True):
        shapes[f"{task}.weight"], axes[f"{task}.weight"] = (size, shared), (None, "shared")
        shapes[f"{task}.bias"], axes[f"{task}.bias"] = (size,), (None,)
    return shapes, axes


def predict(params: Params, batch: Mapping[str, Any], modalities: Collection[str]) -> dict[str, Tensor]:
    """Return logits of activities [b, 3] and paces [b, 1], by those of these modalities that samples have."""
    features, scale = torch.zeros(()), batch.get("scale", 1.0)
    for name in modalities:
        weight = params[f"{name}.input.weight"]
        x = F.linear(batch[name].flatten(-2), weight) if name in SENSORS else F.embedding(batch[name], weight).mean(-2)
        encoded = F.linear(F.gelu(x) * scale, params[f"{name}.output.weight"])
        has = batch.get(f"has_{name}")
        features = features + (encoded if has is None else encoded * has[..., None])
    features = F.gelu(features) * scale
    return {task: F.linear(features, params[f"{task}.weight"], params[f"{task}.bias"]) for task in TASKS}
